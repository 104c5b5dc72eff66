"""Prompts of megabytes, whose tokenization takes seconds, beside short ones."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from app.chat.routes import MAX_TEXT_BYTES
from tests.deployment import ROOT, Deployment, wait_until
from tests.faults.conftest import Reader

CATALOGUE = """
project = "Test"
[[models]]
name = "chat"
tasks = ["chat"]
weights = "{weights}"
[models.engine]
torch_threads = 1
kv_cache_tokens = 8192
[models.defaults]
temperature = 0.0
"""
LONG = "the quick brown fox " * (MAX_TEXT_BYTES // 20 - 10)
LONGEST_TOKEN = 4096
"""Characters. With the model's context of 4096 tokens, no prompt of 8 MiB is refused before it is encoded."""


def save_model(folder: Path) -> Path:
    """Copy the demo chat model to `folder`, with a long token in place of `<|tool|>`. Returns `folder`."""
    shutil.copytree(ROOT / "demo" / "models" / "chat", folder)
    for file in folder.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<|tool|>", "-" * LONGEST_TOKEN))
    return folder


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Deployment]:
    catalogue = CATALOGUE.format(weights=save_model(tmp_path / "weights"))
    with Deployment(tmp_path / "run", catalogue=catalogue) as service:
        yield service.start("chat")


def send(service: Deployment, content: str) -> HTTPConnection:
    """Send a chat request and don't wait for its answer."""
    body = {"model": "chat", "messages": [{"role": "user", "content": content}]}
    connection = HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.slow
def test_a_short_prompt_does_not_wait_for_long_ones_whose_clients_have_disconnected(
    service: Deployment,
) -> None:
    Reader(service.stream("Hi", "chat", max_tokens=3)).wait_end(30)
    began = len(service.redis.client.keys("Test:claim:*"))
    long = [send(service, LONG) for _ in range(2)]
    wait_until(
        lambda: len(service.redis.client.keys("Test:claim:*")) == began + 2,
        timeout_s=60,
        what="the worker has both long prompts",
    )
    for connection in long:
        connection.close()
    waits = []
    while service.running_tasks():
        asked_at = time.monotonic()
        reader = Reader(service.stream("Hi", "chat", max_tokens=3))
        reader.wait_parts(1, timeout_s=10)
        waits.append(time.monotonic() - asked_at)
        reader.wait_end(10)
        assert reader.done
    print(f"{len(waits)} short ones, the slowest had its first token after {max(waits):.2f} s")
    assert len(waits) > 1, "the long prompts were not encoded meanwhile"

    with closing(send(service, LONG)) as connection:
        response = connection.getresponse()
        assert response.status == 400
        assert json.loads(response.read())["error"]["code"] == "context_length_exceeded"
