"""Untrusted input: messages in the queue that are not JSON, and weights that would run code."""

import base64
import json
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import ROOT, Deployment, wait_until


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


def message(body: bytes, **changes: Any) -> bytes:
    """Return a Celery message in the form of kombu's Redis transport, with any body."""
    task_id = uuid.uuid4().hex
    properties = {
        "correlation_id": task_id,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": "model.echo"},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": uuid.uuid4().hex,
    }
    whole = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "binary",
        "content-type": "application/x-python-serialize",
        "headers": {
            "lang": "py",
            "task": "generate",
            "id": task_id,
            "root_id": task_id,
            "argsrepr": "('x',)",
        },
        "properties": properties,
    }
    return json.dumps({**whole, **changes}).encode()


def as_pickle(bomb: Path) -> bytes:
    return message(pickle.dumps(([Bomb(bomb)], {}, {})))


def as_old_pickle_message(bomb: Path) -> bytes:
    body = pickle.dumps({"task": "generate", "id": "x", "args": [Bomb(bomb)], "kwargs": {}})
    return message(body, headers={})


def as_pickle_under_another_name(bomb: Path) -> bytes:
    return message(pickle.dumps(Bomb(bomb)), **{"content-type": "application/x-pickle"})


def as_yaml(bomb: Path) -> bytes:
    body = f"!!python/object/apply:pathlib.Path.write_text [{bomb}, executed]".encode()
    return message(body, **{"content-type": "application/x-yaml", "content-encoding": "utf-8"})


def as_pickle_called_json(bomb: Path) -> bytes:
    return message(pickle.dumps(Bomb(bomb)), **{"content-type": "application/json"})


def as_another_task(bomb: Path) -> bytes:
    body = json.dumps([[str(bomb)], {}, {}]).encode()
    headers = {"lang": "py", "task": "celery.backend_cleanup_of_mine", "id": "x", "root_id": "x"}
    return message(body, headers=headers, **{"content-type": "application/json", "content-encoding": "utf-8"})


def as_an_unknown_job(bomb: Path) -> bytes:
    body = json.dumps([[f"../../{bomb}"], {}, {}]).encode()
    return message(body, **{"content-type": "application/json", "content-encoding": "utf-8"})


HOSTILE: list[Callable[[Path], bytes]] = [
    as_pickle,
    as_old_pickle_message,
    as_pickle_under_another_name,
    as_yaml,
    as_pickle_called_json,
    as_another_task,
    as_an_unknown_job,
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda function: function.__name__)
def test_no_message_in_the_queue_runs_code(
    echo: Deployment, tmp_path: Path, hostile: Callable[[Path], bytes]
) -> None:
    """It is taken off the queue and refused, and the same worker process goes on serving."""
    bomb = tmp_path / "bomb"
    client = echo.redis.client
    process = next(process for name, process in echo.workers.items() if name.startswith("echo-1"))
    client.lpush("Test:model.echo", hostile(bomb))
    wait_until(
        lambda: not client.exists("Test:model.echo") and not echo.running_tasks(),
        timeout_s=30,
        what="the message is taken and settled",
    )
    status, answer = echo.chat("Hi", "echo", max_tokens=3)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "0 1 2 ", answer
    assert not bomb.exists(), "the message was executed"
    process.check_alive()


def test_the_bomb_works(tmp_path: Path) -> None:
    """The test above would see an execution."""
    bomb = tmp_path / "bomb"
    pickle.loads(pickle.dumps(Bomb(bomb)))
    assert bomb.read_text() == "executed"


# ----- weights

CATALOGUE = """
project = "Test"
[[models]]
name = "bad"
tasks = ["{task}"]
weights = "{weights}"
"""


def chat_folder(folder: Path) -> None:
    """Write the demo model with its weights as a pickle."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    source = ROOT / "demo" / "models" / "chat"
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    weights: dict[str, Any] = {}
    for file in source.glob("*.safetensors"):
        weights |= load_file(file)
    torch.save(weights, folder / "pytorch_model.bin")


def with_own_code(folder: Path) -> None:
    """Write the demo model with a configuration that names a class in a file beside it."""
    chat_folder(folder)
    source = ROOT / "demo" / "models" / "chat"
    for file in source.glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'bomb')!r}, 'w').write('executed')\n")


def image_folder(folder: Path) -> None:
    """Write a pipeline whose denoiser is a pickle."""
    import torch

    (folder / "unet").mkdir(parents=True)
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.42.1"}
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index | parts))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": 8}')
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")


def pipeline_with_own_code(folder: Path) -> None:
    """Write a pipeline whose index names a class in a file beside it."""
    image_folder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "OwnPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    bomb = folder / "bomb"
    (folder / "pipeline.py").write_text(
        f"open({str(bomb)!r}, 'w').write('executed')\nfrom diffusers import DiffusionPipeline\n"
        "class OwnPipeline(DiffusionPipeline):\n    pass\n"
    )


WEIGHTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "pickled chat weights": ("chat", chat_folder, "safetensors"),
    "a chat model with code of its own": ("chat", with_own_code, "custom code"),
    "pickled image weights": ("generation", image_folder, "safetensors"),
    "a pipeline with code of its own": ("generation", pipeline_with_own_code, "custom code"),
}
LOAD = """
import sys
from pathlib import Path
from catalogue import Catalogue, ChatModelEntry
from workers.engines.base import EngineLoadError
from workers.engines.chat.model.loader import in_one_line, load_model
from workers.engines.images.loader import load_pipelines
for path in sys.argv[1:]:
    (entry,) = Catalogue.from_file(Path(path)).models
    try:
        if isinstance(entry, ChatModelEntry):
            with in_one_line(entry):
                load_model(entry)
        else:
            load_pipelines(entry)
        print("LOADED")
    except EngineLoadError as error:
        print("REFUSED", error)
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """What a worker's loaders say of each folder. One process loads all: importing torch takes seconds."""
    folder = tmp_path_factory.mktemp("weights")
    catalogues = []
    for number, (task, make, _) in enumerate(WEIGHTS.values()):
        make(folder / f"{number}")
        catalogue = folder / f"{number}.toml"
        catalogue.write_text(CATALOGUE.format(task=task, weights=folder / f"{number}"))
        catalogues.append(str(catalogue))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *catalogues],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("REFUSED", "LOADED"))]
    assert len(lines) == len(WEIGHTS), done.stdout + done.stderr[-3000:]
    return {name: (line, folder / f"{n}") for n, (name, line) in enumerate(zip(WEIGHTS, lines, strict=True))}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "demo/models/chat").is_dir(), reason="needs demo/models/chat")
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_would_run_code_are_refused(verdicts: dict[str, tuple[str, Path]], name: str) -> None:
    line, folder = verdicts[name]
    assert not (folder / "bomb").exists(), "code from the folder of the weights was executed"
    assert line.startswith("REFUSED bad: can't load ") and WEIGHTS[name][2] in line, line
