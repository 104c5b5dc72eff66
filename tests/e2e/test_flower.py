"""Flower beside real workers: it requires the password, lists workers and tasks, and shows no prompt."""

import base64
import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import ECHO_CATALOGUE, Deployment, Process, free_port, wait_until

PASSWORD = "operator:s3cret"
MARKER = "a-prompt-that-flower-must-not-show"


def ask(port: int, path: str, password: str = "") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Authorization": "Basic " + base64.b64encode(password.encode()).decode()} if password else {}
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment of two workers, not started."""
    with Deployment(tmp_path, catalogue=ECHO_CATALOGUE.format(step_ms=0, slots=4)) as service:
        yield service


def test_flower(service: Deployment) -> None:
    service.start("echo", "echo")
    port = free_port()
    command = [sys.executable, "-m", "celery", "-A", "workers", "flower", f"--port={port}"]
    flower = Process(
        "flower", command, service.environment(FLOWER_BASIC_AUTH=PASSWORD), service.folder / "flower.log"
    )
    try:
        wait_until(lambda: ask(port, "/api/workers")[0], timeout_s=60, what="Flower answers")
        assert ask(port, "/api/workers")[0] == 401
        assert ask(port, "/api/workers", "operator:wrong")[0] == 401
        for path in ("/", "/workers", "/tasks", "/broker", "/metrics", "/healthcheck"):
            assert (path, ask(port, path)[0]) == (path, 401)
            assert (path, ask(port, path, "operator:wrong")[0]) == (path, 401)
            assert (path, ask(port, path, PASSWORD)[0]) == (path, 200)

        def workers() -> list[str]:
            status, body = ask(port, "/api/workers?refresh=1", PASSWORD)
            found = sorted(json.loads(body)) if status == 200 else []
            return found if len(found) == 2 else []

        names = wait_until(workers, timeout_s=60, what="Flower sees both workers")
        assert [name.partition("@")[0] for name in names] == ["echo-1", "echo-2"]

        def tasks() -> dict[str, Any]:
            assert service.chat(MARKER, "echo", max_tokens=2)[0] == 200
            status, body = ask(port, "/api/tasks", PASSWORD)
            found = json.loads(body) if status == 200 else {}
            return found if any(task["state"] == "SUCCESS" for task in found.values()) else {}

        seen = wait_until(tasks, timeout_s=60, what="Flower sees a finished task")
        assert MARKER not in json.dumps(seen)
        assert all(task["name"] in ("generate", None) for task in seen.values())
        pages = [ask(port, path, PASSWORD)[1] for path in ("/", "/tasks", f"/worker/{names[0]}")]
        assert all(pages)
        assert not any(MARKER in page for page in pages)
    finally:
        flower.end()


def test_flower_does_not_start_without_a_password(service: Deployment) -> None:
    command = [sys.executable, "-m", "celery", "-A", "workers", "flower", f"--port={free_port()}"]
    flower = Process("flower", command, service.environment(), service.folder / "flower.log")
    assert flower.popen.wait(60) != 0
    assert "FLOWER_BASIC_AUTH" in flower.tail()
