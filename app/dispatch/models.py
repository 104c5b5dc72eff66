"""Which model of the catalogue a request names."""

from typing import TypeVar

from catalogue import CHAT, COMPLETION, Catalogue, ModelEntry, TaskSpec, TextModelEntry
from protocol.errors import InvalidRequest, ModelNotFound

Entry = TypeVar("Entry", bound=ModelEntry)


def find_model(catalogue: Catalogue, name: str, task: TaskSpec[Entry]) -> Entry:
    """Return a model's entry. Raises ModelNotFound, and InvalidRequest if it does not support `task`."""
    entry = catalogue.get(name)
    if entry is None:
        raise ModelNotFound(
            f"model {name!r} does not exist; this endpoint serves: {_names(catalogue, task)}", param="model"
        )
    if task.path not in entry.paths or not isinstance(entry, task.entry):
        if task is CHAT and isinstance(entry, TextModelEntry):
            raise no_chat_template(name)
        raise InvalidRequest(
            f"model {name!r} does not support {task.name!r}; it supports: {', '.join(entry.tasks)}",
            param="model",
        )
    return entry


def no_chat_template(name: str) -> InvalidRequest:
    """The error for a chat with a model that continues plain prompts only."""
    return InvalidRequest(
        f"model {name!r} has no chat template, so it takes no messages; send a prompt to {COMPLETION.path}",
        param="model",
    )


def only_model(catalogue: Catalogue, task: TaskSpec[ModelEntry]) -> str:
    """Return the name of the only model with this task, for a form that names none. Raises InvalidRequest."""
    names = [model.name for model in catalogue.models if task.path in model.paths]
    if len(names) != 1:
        raise InvalidRequest(
            f"model is required; this endpoint serves: {_names(catalogue, task)}", param="model"
        )
    return names[0]


def _names(catalogue: Catalogue, task: TaskSpec[ModelEntry]) -> str:
    return ", ".join(model.name for model in catalogue.models if task.path in model.paths) or "none"
