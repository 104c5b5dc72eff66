"""protocol.open_requests on a real Redis: which requests are open, and cancelling one."""

from typing import Any

import pytest

from config import Settings
from protocol.celery_app import create_celery
from protocol.jobs import ChatJob, SamplingParams
from protocol.names import Keys
from protocol.open_requests import OpenRequests
from protocol.queue import JobQueue
from tests.deployment import RedisServer

MODELS = ["one", "two"]


@pytest.fixture
def queue(redis_server: RedisServer, keys: Keys) -> JobQueue:
    return JobQueue(
        redis_server.client, keys, create_celery(Settings(redis_url=redis_server.url), keys), claim_ttl_s=100
    )


@pytest.fixture
def requests(redis_client: Any, keys: Keys) -> OpenRequests:
    return OpenRequests(redis_client, keys, mark_ttl_s=100)


def admit(queue: JobQueue, name: str, model: str = "one") -> None:
    job = ChatJob(id=name, model=model, messages=[], sampling=SamplingParams())
    queue.admit(job, web_id="w", deadline_s=60, max_waiting=9)


def states(requests: OpenRequests) -> list[tuple[str, str, str]]:
    return [(found.id, found.model, found.incarnation_id) for found in requests.of_models(MODELS)]


def test_a_request_waits_runs_and_ends(queue: JobQueue, requests: OpenRequests) -> None:
    assert states(requests) == []
    for name, model in [("b", "two"), ("a", "one"), ("c", "one")]:
        admit(queue, name, model)
    assert states(requests) == [("a", "one", ""), ("c", "one", ""), ("b", "two", "")]
    assert all(0 <= found.age_s < 60 for found in requests.of_models(MODELS))

    queue.claim("c", "one", "gpu0:1")
    assert states(requests) == [("a", "one", ""), ("c", "one", "gpu0:1"), ("b", "two", "")]
    queue.end("c", "one")
    assert states(requests) == [("a", "one", ""), ("b", "two", "")]


def test_what_has_ended_leaves_nothing_behind(queue: JobQueue, redis_client: Any, keys: Keys) -> None:
    admit(queue, "a")
    queue.claim("a", "one", "gpu0:1")
    assert redis_client.ttl(keys.running("one")) > 0
    queue.end("a", "one")
    assert not redis_client.exists(keys.running("one"))


def test_a_request_of_a_lost_worker_does_not_run_any_more_once_its_client_knows(
    queue: JobQueue, redis_client: Any, keys: Keys
) -> None:
    admit(queue, "a")
    queue.claim("a", "one", "gpu0:1")
    queue.cancel("a", "one")
    assert not redis_client.exists(keys.running("one"))


def test_a_request_whose_client_has_left_is_not_open(queue: JobQueue, requests: OpenRequests) -> None:
    for name in "ab":
        admit(queue, name)
        queue.cancel(name, "one") if name == "a" else queue.claim(name, "one", "gpu0:1")
    queue.cancel("b", "one")
    assert states(requests) == []


def test_a_cancelled_request_is_not_claimed_and_its_worker_is_told(
    queue: JobQueue, requests: OpenRequests
) -> None:
    for name in "abc":
        admit(queue, name)
    queue.claim("b", "one", "gpu0:1")
    for name in "ab":
        assert requests.cancel(name, MODELS)
    assert queue.claim("a", "one", "gpu0:1") is None
    assert queue.cancelled(["a", "b", "c"]) == {"a", "b"}
    assert [requests.cancelled_by_operator(name) for name in "abc"] == [True, True, False]
    assert queue.waiting("one") == 1
    assert not requests.cancel("missing", MODELS)


def test_a_client_that_leaves_is_no_operator(queue: JobQueue, requests: OpenRequests) -> None:
    admit(queue, "a")
    queue.cancel("a", "one")
    assert not requests.cancelled_by_operator("a")
