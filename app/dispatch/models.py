"""Which model of the catalogue a request names."""

from typing import TypeVar

from catalogue import Catalogue, ModelEntry, TaskSpec
from protocol.errors import InvalidRequest, ModelNotFound

Entry = TypeVar("Entry", bound=ModelEntry)


def find_model(catalogue: Catalogue, name: str, task: TaskSpec[Entry]) -> Entry:
    """Return a model's entry. Raises ModelNotFound, and InvalidRequest if it does not support `task`."""
    entry = catalogue.get(name)
    if entry is None:
        raise ModelNotFound(
            f"model {name!r} does not exist; this endpoint serves: {_names(catalogue, task)}", param="model"
        )
    if task.name not in entry.tasks or not isinstance(entry, task.entry):
        raise InvalidRequest(
            f"model {name!r} does not support {task.name!r}; it supports: {', '.join(entry.tasks)}",
            param="model",
        )
    return entry


def only_model(catalogue: Catalogue, task: TaskSpec[ModelEntry]) -> str:
    """Return the name of the only model with this task, for a form that names none. Raises InvalidRequest."""
    names = [model.name for model in catalogue.models if task.name in model.tasks]
    if len(names) != 1:
        raise InvalidRequest(
            f"model is required; this endpoint serves: {_names(catalogue, task)}", param="model"
        )
    return names[0]


def _names(catalogue: Catalogue, task: TaskSpec[ModelEntry]) -> str:
    return ", ".join(model.name for model in catalogue.models if task.name in model.tasks) or "none"
