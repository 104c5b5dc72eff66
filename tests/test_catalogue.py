"""The catalogue: a class of entry for each kind of model, a row for each task, errors with their place."""

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

import catalogue.entries
from catalogue import (
    CHAT,
    COMPLETION,
    EDIT,
    EMBEDDING,
    GENERATION,
    TASKS,
    Catalogue,
    ChatModelEntry,
    EmbeddingModelEntry,
    ImageModelEntry,
    TaskSpec,
    TextModelEntry,
)
from catalogue.entries import ModelEntry
from catalogue.options import EngineOptions, Table
from config import ConfigurationError, Settings
from node.registration import registration_for
from protocol.jobs import ChatJob, CompletionJob, EmbeddingJob, ImageJob
from workers.canary import JOBS

MODEL = '[[models]]\nname = "m"\nweights = "w"\n'


def read(folder: Path, text: str) -> Catalogue:
    path = folder / "models.toml"
    path.write_text('project = "P"\n' + text)
    return Catalogue.from_file(path)


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, text)
    return str(caught.value).removeprefix(f"{folder}/models.toml: ")


@pytest.mark.parametrize(
    ("tasks", "kind"),
    [
        ('["chat"]', ChatModelEntry),
        ('["completion"]', TextModelEntry),
        ('["generation"]', ImageModelEntry),
        ('["edit"]', ImageModelEntry),
        ('["embedding"]', EmbeddingModelEntry),
        ('["generation", "edit"]', ImageModelEntry),
        ('["edit", "generation"]', ImageModelEntry),
    ],
)
def test_the_tasks_of_a_model_decide_on_the_class_of_its_entry(
    tmp_path: Path, tasks: str, kind: type[ModelEntry]
) -> None:
    (entry,) = read(tmp_path, f"{MODEL}tasks = {tasks}").models
    assert type(entry) is kind
    assert entry.engine.max_batch_size == kind.model_validate(entry.model_dump()).engine.max_batch_size


@pytest.mark.parametrize(
    "tasks",
    ['["chat", "edit"]', '["chat", "completion"]', '["speech"]', "[]", '["edit", "edit"]', '["chat", 3]'],
)
def test_tasks_that_no_model_serves_together_are_named_with_those_that_do(tmp_path: Path, tasks: str) -> None:
    found = complaint(tmp_path, f"{MODEL}tasks = {tasks}\n[models.engine]\nanything = 1")
    if "3" in tasks:
        assert found == "models.0.tasks.1: Input should be a valid string"
    else:
        choices = (
            '["chat"], ["completion"], ["generation"], ["edit"], ["embedding"] or ["generation", "edit"]'
        )
        assert found == f"models.0.tasks: must be {choices}"


def test_a_class_of_entry_refuses_the_tasks_of_another() -> None:
    with pytest.raises(ValidationError, match="tasks"):
        ImageModelEntry.model_validate({"name": "m", "weights": "w", "tasks": ["chat"]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f'{MODEL}tasks = ["chat"]\n[models.engine]\nbatch_size = 3',
            "models.0: [models.engine] batch_size: Extra inputs are not permitted",
        ),
        (
            f'{MODEL}tasks = ["chat"]\n[models.defaults]\nguidance_scale = 3',
            "models.0: [models.defaults] guidance_scale: Extra inputs are not permitted",
        ),
        (
            f'{MODEL}tasks = ["edit"]\n[models.defaults]\nstrength = 3',
            "models.0: [models.defaults] strength: Input should be less than or equal to 1",
        ),
        (
            f'{MODEL}tasks = ["completion"]\n[models.engine]\ntool_format = "none"',
            "models.0: [models.engine] tool_format: Extra inputs are not permitted",
        ),
        (f'{MODEL}tasks = ["chat"]\ntask = 1', "models.0.task: Extra inputs are not permitted"),
        (MODEL, "models.0.tasks: Field required"),
        (
            f'{MODEL}tasks = ["chat"]\n' * 2,
            "models: the name 'm' is used twice; each model needs a name of its own",
        ),
        ("models = [3]", "models.0: Input should be a valid dictionary or instance of ModelEntry"),
        ("models = 3", "models: Input should be a valid tuple"),
        ("", "models: Field required"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    assert complaint(tmp_path, text) == expected


def test_a_file_of_other_bytes_than_utf8_is_a_configuration_error(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(b"project = '\xff'")
    with pytest.raises(ConfigurationError, match="not TOML"):
        Catalogue.from_file(path)


def test_a_folder_of_weights_is_told_by_a_file(tmp_path: Path) -> None:
    found = {
        kind: kind.lacks(tmp_path)
        for kind in (TextModelEntry, ChatModelEntry, ImageModelEntry, EmbeddingModelEntry)
    }
    assert found == {
        TextModelEntry: "config.json",
        ChatModelEntry: "config.json",
        ImageModelEntry: "model_index.json",
        EmbeddingModelEntry: "config.json or modules.json",
    }
    (tmp_path / "modules.json").touch()
    assert EmbeddingModelEntry.lacks(tmp_path) is None and ChatModelEntry.lacks(tmp_path)
    (tmp_path / "modules.json").unlink()
    (tmp_path / "config.json").touch()
    assert EmbeddingModelEntry.lacks(tmp_path) is None and ChatModelEntry.lacks(tmp_path) is None


def test_weights_are_searched_beside_the_file_first(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (found,) = read(tmp_path, f'{MODEL}tasks = ["chat"]').models
    assert found.weights == str(tmp_path / "w")
    (hub,) = read(tmp_path, '[[models]]\nname = "m"\nweights = "owner/name"\ntasks = ["chat"]').models
    assert hub.weights == "owner/name"


def test_the_table_holds_every_task_and_names_what_exists() -> None:
    rows = [value for value in vars(catalogue.entries).values() if isinstance(value, TaskSpec)]
    assert list(TASKS.values()) == rows == [CHAT, COMPLETION, GENERATION, EDIT, EMBEDDING]
    assert set(JOBS) == set(TASKS)
    for task in rows:
        assert Settings.model_fields[task.deadline].annotation is float
        assert task.job in {
            kind.__struct_config__.tag for kind in (ChatJob, CompletionJob, ImageJob, EmbeddingJob)
        }


def test_a_task_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue, the deadline and the registration at the node use nothing of a task but its row."""

    class Options(EngineOptions):
        max_batch_size: int = 32
        torch_threads: int | None = None

    class Entry(ModelEntry):
        engine: Options = Field(default_factory=Options)
        defaults: Table = Field(default_factory=Table)

    row = TaskSpec(
        name="rerank",
        path="/v1/rerank",
        node_type=None,
        deadline="chat_deadline_s",
        job="rerank",
        entry=Entry,
    )
    monkeypatch.setitem(TASKS, "rerank", row)
    (entry,) = read(tmp_path, f'{MODEL}tasks = ["rerank"]\n[models.engine]\nmax_batch_size = 8').models
    settings = Settings(chat_deadline_s=7)
    assert isinstance(entry, Entry) and entry.engine.max_batch_size == 8
    assert row.deadline_s(settings) == 7
    assert registration_for(entry, settings, "P", "c-1") is None
    assert '"embedding"], ["rerank"] or ["generation"' in complaint(tmp_path, f'{MODEL}tasks = ["x"]')


def test_messages_tell_what_weights_were_taken_for(tmp_path: Path) -> None:
    def source(weights: str) -> str:
        return ChatModelEntry(name="m", tasks=(CHAT.name,), weights=weights).source

    assert source("owner/name") == "owner/name (no folder here, so a model of the hub)"
    assert source(str(tmp_path)) == str(tmp_path)
    assert source("/missing/folder") == "/missing/folder"
