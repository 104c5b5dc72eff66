"""What web process and workers log of requests, as text and as JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import ECHO_CATALOGUE, Deployment, Process
from tests.security.conftest import converse

pytestmark = pytest.mark.slow


def lines_of(process: Process) -> list[dict[str, Any]]:
    """The lines of a process whose logs are JSON, each of which must be an object."""
    return [json.loads(line) for line in process.log.read_text().splitlines()]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Deployment]:
    catalogue = ECHO_CATALOGUE.format(step_ms=1, slots=8)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None, LOG_FORMAT="json") as service:
        service.start("echo")
        yield service


def test_every_line_of_web_and_worker_is_json(service: Deployment) -> None:
    """Also those of gunicorn and Celery, at a start, for errors and at a stop."""
    assert service.chat("Hi", "echo", max_tokens=2)[0] == 200
    assert service.chat("raise", "echo")[0] == 500
    assert converse(service.port, b"GET / HTTP/1.1\r\nbad header\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert service.web is not None
    (worker,) = service.workers.values()
    for process in (worker, service.web):
        process.popen.terminate()
        assert process.popen.wait(60) == 0
    web, work = lines_of(service.web), lines_of(worker)
    for line in web + work:
        assert line.keys() >= {"time", "level", "process", "message"}
    assert {line["process"] for line in web} == {"web"}
    assert {line["process"] for line in work} == {"echo-1"}
    assert any(line["message"].startswith("Starting gunicorn") for line in web)
    assert any(line.get("logger") == "celery.worker.strategy" for line in work), (
        "at -l INFO Celery logs each task"
    )


def test_a_process_that_ends_for_its_configuration_says_so_in_json(service: Deployment) -> None:
    name = service.start_worker("unknown")
    worker = service.workers.pop(name)
    assert worker.popen.wait(60) == 78
    (line,) = lines_of(worker)
    assert line["level"] == "CRITICAL" and "'unknown' is not in the catalogue" in line["message"]
    assert service.web is not None
    service.web.end()
    web = service.launch_web(MODELS_FILE="/absent.toml")
    assert web.popen.wait(60) == 78
    assert "absent.toml" in lines_of(web)[-1]["message"]
