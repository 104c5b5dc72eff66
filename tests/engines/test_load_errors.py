"""What may pass and what a person must change, after a failed load."""

import errno
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import SafetensorError

from catalogue import CHAT, EDIT, ChatModelEntry, ImageModelEntry, ModelEntry
from tests.deployment import ROOT
from workers.engines import LazyEngine
from workers.engines.base import EngineLoadError, TemporaryLoadError
from workers.engines.load_errors import load_error, no_room, refuse_too_large

CHATS = ChatModelEntry(name="tiny", tasks=(CHAT.name,), weights="owner/name")
IMAGES = ImageModelEntry(name="tiny", tasks=(EDIT.name,), weights="owner/name")


def at(entry: ModelEntry, weights: Path | str) -> ModelEntry:
    return entry.model_copy(update={"weights": str(weights)})


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.ENOSPC, "No space left on device"),
        ConnectionResetError(),
        TimeoutError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        SafetensorError("Error while deserializing header: Stale file handle (os error 116)"),
        caused(OSError("We couldn't connect"), caused(FileNotFoundError("not in the cache"), TimeoutError())),
        caused(EngineLoadError("m: can't load"), OSError(errno.EIO, "Input/output error")).__cause__,
    ],
    ids=repr,
)
def test_trouble_of_disk_network_and_memory_may_pass(error: Exception) -> None:
    found = load_error(CHATS, error, "words")
    assert isinstance(found, TemporaryLoadError) and str(found) == "tiny: words"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        ValueError("Unrecognized model"),
        ImportError("tiktoken is missing"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        SafetensorError("Error while deserializing header: incomplete metadata"),
        EngineLoadError("the weights lack lm_head.weight"),
        caused(EngineLoadError("config.json is cut off"), TimeoutError()),
        caused(OSError("We couldn't connect"), OfflineModeIsEnabled("offline mode is enabled")),
    ],
    ids=repr,
)
def test_what_stays_until_a_person_changes_it(error: Exception) -> None:
    assert type(load_error(CHATS, error, "words")) is EngineLoadError


@pytest.mark.parametrize("entry", [CHATS, IMAGES], ids=["chat", "images"])
@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_folder_that_is_away_may_come_back(tmp_path: Path, entry: ModelEntry, state: str) -> None:
    folder = tmp_path / "weights"
    if state == "empty":  # as the folder of a disk that is not mounted
        folder.mkdir()
    with pytest.raises(TemporaryLoadError, match=f"tiny: the folder {folder} is missing, empty"):
        LazyEngine(at(entry, folder)).load(lambda gained: None)


@pytest.mark.parametrize("entry", [CHATS, IMAGES], ids=["chat", "images"])
def test_a_folder_without_a_model_does_not(tmp_path: Path, entry: ModelEntry) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(EngineLoadError) as caught:
        LazyEngine(at(entry, tmp_path)).load(lambda gained: None)
    assert type(caught.value) is EngineLoadError


def test_memory_that_others_use_may_become_free() -> None:
    assert type(no_room("words", needed=2, room=1)) is EngineLoadError
    assert type(no_room("words", needed=1, room=1)) is TemporaryLoadError


def test_weights_that_are_larger_than_the_gpu_never_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(1024, 1024, bias=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 4 * 2**20))
    refuse_too_large([layer, layer], torch.device("cuda"))
    with pytest.raises(EngineLoadError, match="the weights take"):
        refuse_too_large([layer, torch.nn.Linear(8, 8)], torch.device("cuda"))


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers requests for `owner/<status>-<code of the hub's error>` with this error."""

    def do_HEAD(self) -> None:
        _, _, name = self.path.partition("/owner/")  # at first, or after /api/models
        status, _, code = name.split("/")[0].partition("-")
        self.send_response(int(status or 404))
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


LOAD = """
import json, sys
import huggingface_hub.utils._http as client
from tests.engines.test_load_errors import CHATS, IMAGES, at
from workers.engines import LazyEngine
from workers.engines.base import EngineLoadError
client.time.sleep = lambda seconds: None  # the pauses between the client library's own attempts
for entry in (CHATS, IMAGES):
    for weights in sys.argv[1:]:
        try:
            LazyEngine(at(entry, weights)).load(lambda gained: None)
        except EngineLoadError as error:
            print(json.dumps([entry.tasks[0], weights, type(error).__name__, str(error)]))
"""


@pytest.mark.slow
def test_a_hub_that_is_down_may_come_back_and_one_that_refuses_may_not(hub: str, tmp_path: Path) -> None:
    """In a process of its own, because the client library reads its address when it is imported."""
    names = ["owner/503-x", "owner/429-x", "owner/404-RepoNotFound", "owner/403-GatedRepo", "owner/401-x"]

    def load(endpoint: str, *weights: str) -> list[list[str]]:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-W", "ignore", "-c", LOAD, *weights]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=340)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    found = {(task, weights): kind for task, weights, kind, _ in load(hub, *names)}
    passing = {pair for pair, kind in found.items() if kind == "TemporaryLoadError"}
    assert len(found) == 10
    assert passing == {(task, name) for task in ("chat", "edit") for name in names[:2]}
    away = load("http://127.0.0.1:9", "owner/name")
    assert [kind for _, _, kind, _ in away] == ["TemporaryLoadError"] * 2
    told = "tiny: can't load owner/name (no folder here, so a model of the hub): "
    assert all(message.startswith(told) for *_, message in away), away
