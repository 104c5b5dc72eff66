"""Streams of images through gunicorn, Redis and a worker: how they end, and that they are counted."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import Deployment, Stream, wait_until

GENERATIONS = "/v1/images/generations"
CATALOGUE = """
project = "Test"
[[models]]
name = "quick"
tasks = ["generation"]
weights = "echo:"
[[models]]
name = "slow"
tasks = ["generation"]
weights = "echo:step_ms=3000"
"""
"""The engine makes an image in four steps, so that `slow` takes twelve seconds."""
DEADLINE_S = 8


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder: Path = tmp_path_factory.mktemp("image-streams")
    with Deployment(folder, catalogue=CATALOGUE, GENERATION_DEADLINE_S=str(DEADLINE_S)) as service:
        yield service.start("quick", "slow")


def begin(service: Deployment, model: str, **fields: Any) -> Stream:
    return service.stream_of(GENERATIONS, {"model": model, "prompt": "a cat", "stream": True, **fields})


def last_request(service: Deployment, model: str) -> dict[str, Any] | None:
    """The newest ended request of a model, as operators see it."""
    rows = service.get("/v1/activity")[1]["requests"]
    return next((row for row in rows if row["model"] == model), None)


def wait_outcome(service: Deployment, model: str, outcome: str) -> dict[str, Any]:
    def ended() -> bool:
        row = last_request(service, model)
        return row is not None and row["outcome"] == outcome

    wait_until(ended, timeout_s=30, what=f"a request of {model} has ended with {outcome}")
    row = last_request(service, model)
    assert row is not None
    return row


def test_a_stream_is_answered_and_counted_as_other_requests_are(service: Deployment) -> None:
    stream = begin(service, "quick", partial_images=2, n=2)
    assert stream.status == 200
    assert stream.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    events = list(stream.events())
    assert [(each["type"], each["image_index"]) for each in events] == [
        *[("image_generation.partial_image", index) for _ in range(2) for index in range(2)],
        ("image_generation.completed", 0),
        ("image_generation.completed", 1),
    ]
    assert b": step 1 of 4\n\n" in stream.raw and not stream.done
    row = wait_outcome(service, "quick", "completed")
    assert (row["images"], row["status"], row["route"]) == (2, 200, GENERATIONS)
    assert row["queued_ms"] is not None and row["cid"] is not None


def test_a_refusal_has_a_status_of_its_own(service: Deployment) -> None:
    body = {"model": "quick", "prompt": "a cat", "stream": True}
    for more, param in (
        ({"partial_images": 4}, "partial_images"),
        ({"response_format": "url"}, "response_format"),
    ):
        status, answer = service.post(GENERATIONS, body | more)
        assert (status, answer["error"]["param"]) == (400, param)


def test_a_client_that_disconnects_stops_the_worker(service: Deployment) -> None:
    stream = begin(service, "slow", partial_images=3)
    assert next(stream.events())["type"] == "image_generation.partial_image"
    stream.close()
    wait_until(lambda: service.running_tasks() == 0, timeout_s=20, what="the worker has stopped")
    assert wait_outcome(service, "slow", "cancelled")["images"] is None


def test_the_deadline_ends_a_stream_with_an_error(service: Deployment) -> None:
    first, *_, last = begin(service, "slow", partial_images=1).events()
    assert first["type"] == "image_generation.partial_image"
    assert (last["code"], last["error"]["code"]) == (504, "deadline_exceeded")
    assert wait_outcome(service, "slow", "deadline_exceeded")["status"] == 200


def test_a_worker_that_is_lost_ends_a_stream_with_an_error(tmp_path: Path) -> None:
    with Deployment(tmp_path, catalogue=CATALOGUE, redis_server=None) as service:
        service.start("slow")
        stream = begin(service, "slow")
        assert stream.response.readline() == b": step 1 of 4\n"
        (worker,) = service.workers.values()
        worker.signal(signal.SIGKILL)
        (error,) = stream.events()
        assert error["error"]["code"] == "worker_lost"
        assert b"event: error\n" in stream.raw
