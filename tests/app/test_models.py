"""app.dispatch.models: the model that a request names, or does not name."""

import pytest

from app.dispatch.models import find_model, only_model
from catalogue import CHAT, COMPLETION, EDIT, GENERATION, Catalogue
from protocol.errors import InvalidRequest, ModelNotFound


def catalogue(*editors: str) -> Catalogue:
    """A catalogue with one chat model, and with image models for edits."""
    models = [{"name": name, "tasks": ["edit"], "weights": "w"} for name in editors]
    chat = {"name": "chat", "tasks": ["chat"], "weights": "w"}
    return Catalogue.model_validate({"project": "p", "models": [chat, *models]})


def test_a_model_is_found_by_name_and_task():
    assert find_model(catalogue("one"), "one", EDIT).name == "one"
    assert find_model(catalogue("one"), "chat", CHAT).name == "chat"


def texts(*tasks: str) -> Catalogue:
    """A catalogue with one model for each task, named as the task."""
    models = [{"name": task, "tasks": [task], "weights": "w"} for task in tasks]
    return Catalogue.model_validate({"project": "p", "models": models})


def test_a_chat_model_serves_completions_and_a_model_for_completions_no_chats():
    both = texts("chat", "completion")
    assert [find_model(both, name, COMPLETION).name for name in ("chat", "completion")] == [
        "chat",
        "completion",
    ]
    with pytest.raises(InvalidRequest, match=r"has no chat template.* /v1/completions") as caught:
        find_model(both, "completion", CHAT)
    assert caught.value.param == "model"
    with pytest.raises(ModelNotFound, match=r"this endpoint serves: chat, completion$"):
        find_model(both, "other", COMPLETION)
    with pytest.raises(ModelNotFound, match=r"this endpoint serves: chat$"):
        find_model(both, "other", CHAT)
    assert only_model(texts("completion"), COMPLETION) == "completion"
    with pytest.raises(InvalidRequest, match=r"serves: chat, completion$"):
        only_model(both, COMPLETION)


def test_an_unknown_model_is_refused_with_the_names_for_the_endpoint():
    with pytest.raises(ModelNotFound, match=r"'two' does not exist; this endpoint serves: one$") as caught:
        find_model(catalogue("one"), "two", EDIT)
    assert caught.value.param == "model"


@pytest.mark.parametrize(("name", "task"), [("one", CHAT), ("one", GENERATION), ("chat", EDIT)])
def test_a_model_of_another_task_is_refused_with_its_own_tasks(name, task):
    with pytest.raises(InvalidRequest, match=f"does not support '{task.name}'; it supports: ") as caught:
        find_model(catalogue("one"), name, task)
    assert caught.value.param == "model"


def test_a_form_without_model_uses_the_only_model_for_edits():
    def catalogue(*names: str) -> Catalogue:
        models = [{"name": name, "tasks": ["edit"], "weights": "w"} for name in names]
        chat = {"name": "chat", "tasks": ["chat"], "weights": "w"}
        return Catalogue.model_validate({"project": "p", "models": [chat, *models]})

    assert only_model(catalogue("one"), EDIT) == "one"
    with pytest.raises(InvalidRequest, match="one, two") as caught:
        only_model(catalogue("one", "two"), EDIT)
    assert caught.value.param == "model"
    with pytest.raises(InvalidRequest, match="none"):
        only_model(catalogue(), EDIT)
