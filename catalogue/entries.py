"""The kinds of models, and the table of tasks that a model can serve."""

import json
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from catalogue.options import (
    ChatDefaults,
    ChatEngineOptions,
    EmbeddingDefaults,
    EmbeddingEngineOptions,
    EngineOptions,
    ImageDefaults,
    ImageEngineOptions,
    Table,
    TextDefaults,
    TextEngineOptions,
)
from config import Settings

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # "gpt2", "meta-llama/Llama-3.1-8B-Instruct"


class ModelEntry(Table):
    """One `[[models]]`. `tasks` decides on its class, and so on the keys of its two tables."""

    weights_files: ClassVar[tuple[str, ...]]
    """Names of files. Every folder of such weights holds one of them."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+ -]{0,127}$",
        description="what requests send as `model`, unique in the file; letters, digits, spaces, `._:/@+-`",
    )
    tasks: tuple[str, ...] = Field(description="the endpoints that the model serves")
    weights: str = Field(
        min_length=1, description="a hub id, or a folder (a relative one is searched beside the file first)"
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit on the hub; pin a commit in production"
    )
    workers: tuple[tuple[int, ...], ...] | None = Field(
        default=None,
        description="one item for each worker: the indices of its GPUs, `[]` for a worker on the CPU. "
        "Default: one worker, on the first GPU or, without one, on the CPU",
    )
    engine: EngineOptions
    defaults: Table

    @property
    def weights_folder(self) -> Path | None:
        """The folder that `weights` names, which need not exist at the moment; None if it can be a hub id."""
        return None if _HUB_ID.fullmatch(self.weights) else Path(self.weights).expanduser()

    @property
    def paths(self) -> frozenset[str]:
        """The endpoints that serve the model."""
        return frozenset(path for task in self.tasks for path in TASKS[task].paths)

    @classmethod
    def lacks(cls, folder: Path) -> str | None:
        """Return what file a folder of such weights would have, None if `folder` has it."""
        if any((folder / name).is_file() for name in cls.weights_files):
            return None
        return " or ".join(cls.weights_files)

    @property
    def source(self) -> str:
        """`weights` for messages.

        A misspelt relative folder looks like a hub id, so what it was taken for is told.
        """
        is_here = self.weights_folder is not None or Path(self.weights).is_dir()
        return self.weights if is_here else f"{self.weights} (no folder here, so a model of the hub)"

    @field_validator("tasks")
    @classmethod
    def _can_be_served_together(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if sorted(tasks) not in [sorted(names) for kind, names in _combinations() if kind is cls]:
            *others, last = (json.dumps(names) for _, names in _combinations())
            raise ValueError(f"must be {', '.join(others)} or {last}")
        return tasks

    @field_validator("weights")
    @classmethod
    def _beside_the_file(cls, weights: str, info: ValidationInfo) -> str:
        beside = info.context / weights if info.context else None
        return str(beside.resolve()) if beside and _exists(beside) else weights


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # its disk does not answer at the moment: the load says so, and is tried again
        return True


class TextModelEntry(ModelEntry):
    """A decoder-only language model that transformers loads, without a chat template."""

    weights_files = ("config.json",)

    engine: TextEngineOptions = Field(default_factory=TextEngineOptions)
    defaults: TextDefaults = Field(default_factory=TextDefaults)


class ChatModelEntry(TextModelEntry):
    """A decoder-only language model that transformers loads, with a chat template."""

    engine: ChatEngineOptions = Field(default_factory=ChatEngineOptions)
    defaults: ChatDefaults = Field(default_factory=ChatDefaults)


class ImageModelEntry(ModelEntry):
    """An image model that diffusers loads."""

    weights_files = ("model_index.json",)

    engine: ImageEngineOptions = Field(default_factory=ImageEngineOptions)
    defaults: ImageDefaults = Field(default_factory=ImageDefaults)


class EmbeddingModelEntry(ModelEntry):
    """A sentence embedding model that transformers loads."""

    # with modules.json the transformer may have a folder of its own
    weights_files = ("config.json", "modules.json")

    engine: EmbeddingEngineOptions = Field(default_factory=EmbeddingEngineOptions)
    defaults: EmbeddingDefaults = Field(default_factory=EmbeddingDefaults)


Entry_co = TypeVar("Entry_co", bound=ModelEntry, covariant=True)


@dataclass(frozen=True, kw_only=True)
class TaskSpec(Generic[Entry_co]):
    """One row of TASKS.

    `path`: its endpoint. `node_type`: the task at the network node (0 text to text, 1 text to image, 2 image
    to image), None if the node does not know it. `deadline`: the setting that limits a request. `job`: the
    tag of its job class in protocol/jobs.py. `entry`: the class of models that serve it, with their options
    and defaults. `more_paths`: further endpoints of these models, unknown to the network node.
    """

    name: str
    path: str
    node_type: Literal[0, 1, 2] | None
    deadline: str
    job: str
    entry: type[Entry_co]
    more_paths: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All endpoints of the task."""
        return (self.path, *self.more_paths)

    def deadline_s(self, settings: Settings) -> float:
        """Seconds from a request's first byte to the last byte of its answer, time in the queue included."""
        seconds: float = getattr(settings, self.deadline)
        return seconds


COMPLETIONS_PATH = "/v1/completions"
TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"

CHAT = TaskSpec(
    name="chat",
    path="/v1/chat/completions",
    more_paths=(COMPLETIONS_PATH, TOKENIZE_PATH, DETOKENIZE_PATH),
    node_type=0,
    deadline="chat_deadline_s",
    job="chat",
    entry=ChatModelEntry,
)
COMPLETION = TaskSpec(
    name="completion",
    path=COMPLETIONS_PATH,
    more_paths=(TOKENIZE_PATH, DETOKENIZE_PATH),
    node_type=None,
    deadline="chat_deadline_s",
    job="completion",
    entry=TextModelEntry,
)
GENERATION = TaskSpec(
    name="generation",
    path="/v1/images/generations",
    node_type=1,
    deadline="generation_deadline_s",
    job="image",
    entry=ImageModelEntry,
)
EDIT = TaskSpec(
    name="edit",
    path="/v1/images/edits",
    node_type=2,
    deadline="edit_deadline_s",
    job="image",
    entry=ImageModelEntry,
)
EMBEDDING = TaskSpec(
    name="embedding",
    path="/v1/embeddings",
    node_type=None,
    deadline="embedding_deadline_s",
    job="embedding",
    entry=EmbeddingModelEntry,
)

TASKS: dict[str, TaskSpec[ModelEntry]] = {
    task.name: task for task in (CHAT, COMPLETION, GENERATION, EDIT, EMBEDDING)
}
"""Every task, by name. A model that serves several is registered at the network node under the first one."""


def _combinations() -> list[tuple[type[ModelEntry], tuple[str, ...]]]:
    """Which tasks one model can serve together: those of one class of entry. Single tasks come first."""
    kinds: dict[type[ModelEntry], list[str]] = {}
    for task in TASKS.values():
        kinds.setdefault(task.entry, []).append(task.name)
    found = [
        (kind, names)
        for kind, own in kinds.items()
        for count in range(1, len(own) + 1)
        for names in combinations(own, count)
    ]
    return sorted(found, key=lambda choice: len(choice[1]))
