"""What web process and workers log of requests, as text and as JSON."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import ECHO_CATALOGUE, Deployment, Process, wait_until
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


def entries(process: Process, name: str) -> dict[str, dict[str, Any]]:
    """The lines of a process about requests or jobs, by their ids."""
    found = [line for line in lines_of(process) if line["message"] == name]
    assert len({line["request_id"] for line in found}) == len(found), "one line for each"
    return {line["request_id"]: line for line in found}


def test_a_request_has_one_line_in_web_and_one_in_its_worker(service: Deployment) -> None:
    web = service.web
    assert web is not None
    (worker,) = service.workers.values()
    path, body = "/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}
    plain = service.post(path, {**body, "max_tokens": 2}, {"X-Request-Id": "mine"})[1]["id"]
    stream = service.stream("Hi", "echo", max_tokens=3)
    streamed = next(stream.events())["id"]
    stream.text()
    hung_up = service.stream("Hi", "echo", max_tokens=100_000)
    left = next(hung_up.events())["id"]
    hung_up.close()
    assert service.chat("raise", "echo")[0] == 500
    assert service.chat("Hi", "unknown")[0] == 404
    wait_until(lambda: len(entries(web, "request")) == 5, timeout_s=20, what="all requests are logged")
    wait_until(lambda: len(entries(worker, "job")) == 4, timeout_s=20, what="all jobs are logged")
    requests, jobs = entries(web, "request"), entries(worker, "job")
    (failed,) = jobs.keys() - {plain, streamed, left}

    def shown(rows: dict[str, dict[str, Any]], *names: str) -> dict[str, tuple[Any, ...]]:
        return {request_id: tuple(row.get(name) for name in names) for request_id, row in rows.items()}

    (unknown,) = requests.keys() - jobs.keys()
    assert shown(requests, "status", "outcome", "model", "client_request_id") == {
        plain: (200, "completed", "echo", "mine"),
        streamed: (200, "completed", "echo", None),
        left: (200, "cancelled", "echo", None),
        failed: (500, "engine_error", "echo", None),
        unknown: (404, "model_not_found", None, None),
    }
    assert shown(jobs, "outcome", "finish_reason", "prompt_tokens", "completion_tokens") == {
        plain: ("completed", "length", 1, 2),
        streamed: ("completed", "length", 1, 3),
        left: ("cancelled", None, None, None),
        failed: ("engine_error", None, None, None),
    }
    for request_id in (plain, streamed):
        request, job = requests[request_id], jobs[request_id]
        assert 0 <= request["queued_s"] <= request["first_token_s"] <= request["seconds"]
        assert 0 <= job["queued_s"] <= job["first_token_s"] <= job["total_s"]


def test_clients_get_the_times_of_complete_answers(service: Deployment) -> None:
    names = ["X-Queued-Ms", "X-First-Token-Ms", "X-Total-Ms"]
    body = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    response, connection = service.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    with closing(connection):
        assert response.status == 200
    queued, first, total = (int(response.headers[name]) for name in names)
    assert 0 <= queued <= first <= total
    for options in ({}, {"stream_options": {"include_usage": True}}):
        stream = service.stream("Hi", "echo", max_tokens=3, **options)
        *others, last = stream.events()
        assert stream.done and "usage" in last
        assert not any("timings" in chunk for chunk in others)
        times = last["timings"]
        assert 0 <= times["queued_ms"] <= times["first_token_ms"] <= times["total_ms"]
    response, connection = service.request("GET", "/v1/models")
    with closing(connection):
        assert not any(name in response.headers for name in names)


def test_a_plain_answer_that_nobody_received_says_so(service: Deployment) -> None:
    web = service.web
    assert web is not None
    body = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400}
    with closing(http.client.HTTPConnection("127.0.0.1", service.port)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        wait_until(lambda: service.running_tasks(), timeout_s=20, what="it runs")
    found = wait_until(lambda: entries(web, "request"), timeout_s=20, what="it is logged")
    assert [row["outcome"] for row in found.values()] == ["cancelled"]
