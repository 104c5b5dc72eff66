"""The catalogue: the models of one deployment, as `MODELS_FILE` lists them, with their engine options and defaults."""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from config import ConfigurationError, first_complaint

Task = Literal["chat", "generation", "edit"]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatEngineOptions(_Options):
    """`[models.engine]` of a chat model."""

    max_batch_size: int = Field(
        default=64, ge=1, le=1024, description="requests decoded together in one step"
    )
    max_context: int | None = Field(
        default=None, ge=16, description="tokens of prompt and answer; default: the model's own"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    kv_cache_tokens: int | None = Field(
        default=None, ge=64, description="budget of the KV cache; wins over memory_fraction"
    )
    memory_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of a GPU's free memory after loading that the KV cache may take",
    )
    prefill_chunk: int = Field(
        default=512, ge=16, description="prompt tokens computed between two decode steps"
    )
    prefix_cache: bool = Field(
        default=True, description="keep the KV of finished requests for prompts that start alike"
    )
    compile: bool = Field(default=True, description="on a GPU: capture decode steps as CUDA graphs")
    torch_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of torch; default: on a CPU all cores but one, else torch's own",
    )


class ImageEngineOptions(_Options):
    """`[models.engine]` of a picture model."""

    max_batch_size: int = Field(
        default=4, ge=1, le=64, description="pictures denoised together in one pipeline call"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    default_size: int | None = Field(
        default=None, ge=8, description="pixels of a side; default: the pipeline's own"
    )
    max_side: int = Field(
        default=2048, ge=8, description="largest width or height a caller may ask for, pixels"
    )
    max_pixels: int = Field(
        default=4_194_304, ge=64, description="largest width x height a caller may ask for"
    )
    size_multiple: int = Field(default=8, ge=1, description="width and height must be multiples of this")
    max_n: int = Field(default=10, ge=1, description="pictures a single request may ask for")
    max_steps: int = Field(
        default=100, ge=1, description="largest `step` (num_inference_steps) a caller may ask for"
    )
    compile: bool = Field(default=False, description="on a GPU: torch.compile the denoiser")
    torch_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch; default: torch's own"
    )


class ChatDefaults(_Options):
    """`[models.defaults]` of a chat model: what a request leaves out (then the model's generation config decides)."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    max_tokens: int = Field(default=2048, ge=1)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class ImageDefaults(_Options):
    """`[models.defaults]` of a picture model: what a request leaves out (then the pipeline's own defaults decide)."""

    num_inference_steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)
    strength: float | None = Field(default=None, gt=0, le=1)
    negative_prompt: str | None = None


class ModelEntry(_Options):
    """One `[[models]]` of the catalogue."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+ -]{0,127}$")
    tasks: tuple[Task, ...]
    weights: str = Field(min_length=1)
    revision: str | None = None
    workers: tuple[tuple[int, ...], ...] | None = None
    engine: ChatEngineOptions | ImageEngineOptions
    defaults: ChatDefaults | ImageDefaults

    @model_validator(mode="before")
    @classmethod
    def _pick_kind(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`tasks` decides which options and defaults the two tables hold, so that a wrong key is named exactly."""
        chat = tuple(data.get("tasks", ())) == ("chat",)
        kinds: tuple[type[_Options], type[_Options]] = (
            (ChatEngineOptions, ChatDefaults) if chat else (ImageEngineOptions, ImageDefaults)
        )
        tables: dict[str, _Options] = {}
        for table, kind in zip(("engine", "defaults"), kinds, strict=True):
            try:
                tables[table] = kind.model_validate(data.get(table, {}))
            except ValidationError as error:
                raise ValueError(f"[models.{table}] {first_complaint(error)}") from error
        return {**data, **tables}

    @field_validator("tasks")
    @classmethod
    def _known_combination(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        if sorted(tasks) not in (["chat"], ["generation"], ["edit"], ["edit", "generation"]):
            raise ValueError('must be ["chat"], ["generation"], ["edit"] or ["generation", "edit"]')
        return tasks

    @property
    def is_chat(self) -> bool:
        return "chat" in self.tasks


class Catalogue(_Options):
    """The models of one deployment, as `MODELS_FILE` lists them."""

    project: str = Field(min_length=1, max_length=128)
    models: tuple[ModelEntry, ...] = Field(min_length=1)

    @field_validator("models")
    @classmethod
    def _unique_names(cls, models: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
        names = [model.name for model in models]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"name {doubled[0]!r} stands twice; each model needs a name of its own")
        return models

    def get(self, name: str) -> ModelEntry | None:
        """The entry that callers name as `model`, or None."""
        return next((model for model in self.models if model.name == name), None)

    @classmethod
    def from_file(cls, path: Path) -> "Catalogue":
        """Read a catalogue. A relative `weights` folder that exists beside the file is taken from there.

        Raises ConfigurationError with one line that names the file and the place in it.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
            for model in data.get("models", ()):
                beside = path.parent / str(model.get("weights", ""))
                if model.get("weights") and beside.exists():
                    model["weights"] = str(beside.resolve())
            return cls.model_validate(data)
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}; MODELS_FILE names the catalogue") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"{path}: not TOML: {error}") from error
        except ValidationError as error:
            raise ConfigurationError(f"{path}: {first_complaint(error)}") from error
