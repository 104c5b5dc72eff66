"""The file that MODELS_FILE names, read and checked."""

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from catalogue.entries import TASKS, ModelEntry
from catalogue.options import Table
from config import ConfigurationError, first_complaint


def _entry_of(value: Any, info: ValidationInfo) -> Any:
    """The entry for a table of the file, of the class that its tasks ask for."""
    if not isinstance(value, dict):
        return value
    given = value.get("tasks")
    names = given if isinstance(given, list | tuple) else ()
    # without a known task the base class says what is wrong with `tasks`
    kind = next((task.entry for task in TASKS.values() if task.name in names), ModelEntry)
    return kind.model_validate(value, context=info.context)


class Catalogue(Table):
    """The models of one deployment, as `MODELS_FILE` lists them."""

    project: str = Field(
        min_length=1,
        max_length=128,
        description="the project of the models at the node; also the default of NAMESPACE",
    )
    models: tuple[Annotated[ModelEntry, BeforeValidator(_entry_of)], ...] = Field(min_length=1)

    @field_validator("models")
    @classmethod
    def _unique_names(cls, models: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
        names = [model.name for model in models]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"the name {repeated[0]!r} is used twice; each model needs a name of its own")
        return models

    def get(self, name: str) -> ModelEntry | None:
        """The entry that requests name as `model`, or None."""
        return next((model for model in self.models if model.name == name), None)

    @classmethod
    def from_file(cls, path: Path) -> "Catalogue":
        """Read a catalogue. A relative `weights` folder that exists beside the file is taken from there.

        Raises ConfigurationError with one line that names the file and the place in it.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(data, context=path.parent)
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}; MODELS_FILE names the catalogue") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path}: not TOML: {error}") from error
        except ValidationError as error:
            place, message = first_complaint(error)
            raise ConfigurationError(f"{path}: {_shown(place)}: {message}") from error


def _shown(place: tuple[str, ...]) -> str:
    """A place in the file, with the tables of a model as the file spells them."""
    if len(place) > 2 and place[2] in ("engine", "defaults"):
        return f"{'.'.join(place[:2])}: " + " ".join([f"[models.{place[2]}]", ".".join(place[3:])]).strip()
    return ".".join(place) or "catalogue"
