"""app.dispatch.activity against a real Redis: what web processes write, and what one of them reads."""

from typing import Any

import pytest
from flask import Flask
from redis.exceptions import ResponseError

from app.dispatch.activity import (
    GROWTH,
    KEPT_S,
    REQUESTS_KEPT,
    REQUESTS_READ,
    SAMPLE_S,
    Activity,
    EndedRequest,
    ModelSample,
    Queue,
    upper_bound_ms,
)
from app.dispatch.worker_view import WorkerView
from app.http.auth import Gate
from app.http.operators import Operators
from app.http.origin import OriginCheck
from app.operations.activity import blueprint
from config import Settings
from protocol.drains import Drains
from protocol.leases import Leases
from protocol.names import Keys
from tests.deployment import RedisServer


def ended(name: str, **fields: Any) -> EndedRequest:
    common = {"model": "a", "route": "/v1/chat/completions", "status": 200, "outcome": "completed"}
    return EndedRequest(**{"id": name, "total_ms": 9, **common, **fields})


@pytest.fixture
def activity(redis_server: RedisServer, keys: Keys) -> Activity:
    return Activity(redis_server.client, keys, ["a", "b"])


def test_an_idle_deployment_has_empty_queues(activity: Activity) -> None:
    found = activity.read()
    assert (found.requests, found.samples) == ([], [])
    assert found.queues == [Queue("a", 0, 0), Queue("b", 0, 0)]


def test_requests_of_all_processes_come_newest_first_and_once(
    activity: Activity, redis_server: RedisServer, keys: Keys
) -> None:
    other = Activity(redis_server.client, keys, ["a", "b"])
    request = ended(
        "one", cid="w", queued_ms=1, first_token_ms=2, total_ms=3, prompt_tokens=4, completion_tokens=5
    )
    activity.note(request)
    activity.write()
    other.note(ended("two", model="b", status=503, outcome="no_worker", images=2))
    other.write()
    found = activity.read()
    assert [entry.id for entry in found.requests] == ["two", "one"]
    first = found.requests[1]
    assert 0 <= found.now - first.ended_at < 60
    first.ended_at = request.ended_at
    assert first == request

    assert activity.read(found.cursor).requests == []
    activity.note(ended("three"))
    activity.write()
    assert [entry.id for entry in activity.read(found.cursor).requests] == ["three"]


def test_the_list_is_capped_and_expires(activity: Activity, redis_server: RedisServer, keys: Keys) -> None:
    for _ in range(3):
        for number in range(REQUESTS_KEPT):
            activity.note(ended(str(number)))
        activity.write()
    assert REQUESTS_KEPT <= redis_server.client.xlen(keys.ended_requests) < 2 * REQUESTS_KEPT
    assert redis_server.client.ttl(keys.ended_requests) > 0
    found = activity.read().requests
    assert [entry.id for entry in found[:2]] == [str(REQUESTS_KEPT - 1), str(REQUESTS_KEPT - 2)]
    assert len(found) == REQUESTS_READ


def test_samples_count_first_tokens_and_keep_the_longest_queue(
    activity: Activity, redis_server: RedisServer, keys: Keys
) -> None:
    client = redis_server.client
    (now, _) = client.time()
    client.zadd(keys.waiting("a"), {"x": now + 60, "y": now + 60, "expired": now - 1})
    client.zadd(keys.running("b"), {"z": now + 60})
    for ms in (100, 101, 350, None):
        activity.note(ended("r", first_token_ms=ms))
    activity.write()
    client.zrem(keys.waiting("a"), "x")
    activity.note(ended("r", first_token_ms=100))
    activity.write()

    found = activity.read()
    assert found.queues == [Queue("a", 1, 0), Queue("b", 0, 1)]
    # the two calls may fall into two samples
    assert max(sample.models["a"].waiting for sample in found.samples) == 2
    assert all(sample.models["b"] == ModelSample(running=1) for sample in found.samples)
    counts: dict[int, int] = {}
    for sample in found.samples:
        assert sample.at % SAMPLE_S == 0 and sample.at <= found.now
        assert 0 < client.ttl(keys.sample(sample.at)) <= KEPT_S
        for bound, count in sample.models["a"].first_token_ms.items():
            counts[bound] = counts.get(bound, 0) + count
    assert counts == {upper_bound_ms(100): 3, upper_bound_ms(350): 1}


def test_a_cursor_asks_again_only_for_the_last_sample(
    activity: Activity, redis_server: RedisServer, keys: Keys
) -> None:
    (now, _) = redis_server.client.time()
    old = now - now % SAMPLE_S - 4 * SAMPLE_S
    redis_server.client.hset(keys.sample(old), "waiting a", 7)
    found = activity.read()
    assert [sample.at for sample in found.samples] == [old]
    activity.write()
    again = activity.read(found.cursor).samples
    assert again and all(sample.at > old for sample in again)
    for wrong in ("", "x", "1", "1.2", "1.2-3.4", "99999999999999.0-0", "1.0-0 ", "-1.0-0"):
        with pytest.raises(ValueError):
            activity.read(wrong)


def test_what_can_not_be_written_is_kept(activity: Activity, redis_server: RedisServer, keys: Keys) -> None:
    redis_server.client.set(keys.ended_requests, "not a stream")
    activity.note(ended("one", first_token_ms=1))
    with pytest.raises(ResponseError):
        activity.write()
    redis_server.client.delete(keys.ended_requests)
    activity.note(ended("two"))
    activity.write()
    activity.write()
    assert [entry.id for entry in activity.read().requests] == ["two", "one"]


def test_an_entry_of_another_version_hides_no_other(
    activity: Activity, redis_server: RedisServer, keys: Keys
) -> None:
    activity.note(ended("one"))
    activity.write()
    redis_server.client.xadd(keys.ended_requests, {"late_s": "0", "body": '{"id": 1}'})
    assert [entry.id for entry in activity.read().requests] == ["one"]


@pytest.mark.parametrize("ms", [0, 1, 2, 17, 180, 181, 59_999, 170_000])
def test_classes_of_times_hold_their_times(ms: int) -> None:
    bound = upper_bound_ms(ms)
    assert bound / GROWTH - 1 <= max(ms, 1) <= bound + 1


@pytest.mark.parametrize(
    ("peer", "shown"), [("10.0.0.7", "cmpl-01234567"), ("127.0.0.1", "cmpl-0123456789abcdef")]
)
def test_without_keys_strangers_do_not_see_the_ids_that_resume_streams(
    peer: str, shown: str, activity: Activity, redis_server: RedisServer, keys: Keys
) -> None:
    settings = Settings(bind="0.0.0.0:1088", redis_url=redis_server.url)
    operators = Operators(settings, OriginCheck(settings), Gate(settings).carries_one_of)
    view = WorkerView(Leases(redis_server.client, keys))
    view.refresh()
    app = Flask("test")
    app.register_blueprint(
        blueprint(
            activity,
            Drains(redis_server.client, keys),
            view,
            check_may_look=operators.check_may_look,
            may_act=operators.may_act,
        )
    )
    activity.note(ended("cmpl-0123456789abcdef"))
    activity.write()
    answer = app.test_client().get("/v1/activity", environ_overrides={"REMOTE_ADDR": peer})
    assert [request["id"] for request in answer.get_json()["requests"]] == [shown]
