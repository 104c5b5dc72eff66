"""app.dispatch.worker_view.WorkerView: when its snapshot is used, when it is refreshed, and who is lost."""

from typing import Any, cast

import pytest
import redis

from app.dispatch.worker_view import WorkerView
from protocol.leases import LEASE_TTL_S, Leases, WorkerRecord
from protocol.names import Keys
from tests.records import worker_record

INCARNATION = "cid:1"


def record(incarnation_id: str = INCARNATION) -> WorkerRecord:
    return worker_record(incarnation_id=incarnation_id, state="ready")


class Bench:
    """A WorkerView on real leases, with a clock of its own. `workers` counts its reads of them."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self.now = 100.0
        self.reads = 0
        self.reachable = True
        self.client, self.keys = client, keys
        self.leases = Leases(client, keys)
        self.view = WorkerView(cast(Any, self), lambda: self.now)

    def workers(self) -> list[WorkerRecord]:
        self.reads += 1
        if not self.reachable:
            raise redis.ConnectionError("gone")
        return self.leases.workers()

    def expire(self) -> None:
        self.client.delete(self.keys.lease("cid"))

    def watch(self, seconds: int) -> None:
        """Let time pass, with a refresh each second as the heartbeat does it."""
        for _ in range(seconds):
            self.now += 1
            self.view.refresh()


@pytest.fixture
def bench(redis_client: Any, keys: Keys) -> Bench:
    return Bench(redis_client, keys)


def test_it_refreshes_before_it_says_no_but_not_for_each_request(bench: Bench) -> None:
    view = bench.view
    view.refresh()
    bench.leases.renew_worker(record())
    assert not view.has_ready("echo", look_again=True), "the snapshot is new"
    bench.now += 0.2
    assert not view.has_ready("echo")
    assert view.has_ready("echo", look_again=True)
    assert bench.reads == 2
    bench.now += 0.2
    assert view.has_ready("echo", look_again=True)
    assert bench.reads == 2


def test_a_failed_refresh_keeps_the_snapshot_and_says_unreachable(bench: Bench) -> None:
    view = bench.view
    assert not view.reachable
    bench.leases.renew_worker(record())
    view.refresh()
    assert view.reachable
    bench.reachable = False
    with pytest.raises(redis.ConnectionError):
        view.refresh()
    assert not view.reachable
    assert view.has_ready("echo")


def test_a_worker_whose_lease_expired_is_lost_at_once_by_a_view_that_watched(bench: Bench) -> None:
    bench.leases.renew_worker(record())
    bench.watch(LEASE_TTL_S + 1)
    assert not bench.view.is_lost(INCARNATION)
    bench.expire()
    bench.watch(1)
    assert bench.view.is_lost(INCARNATION)


def test_a_newer_incarnation_needs_no_waiting_period(bench: Bench) -> None:
    bench.leases.seize_worker(record("cid:2"))
    bench.watch(1)
    assert bench.view.is_lost(INCARNATION)
    assert not bench.view.is_lost("cid:2")


def test_no_worker_is_lost_for_a_pause_of_the_web_process(bench: Bench) -> None:
    bench.leases.renew_worker(record())
    bench.watch(LEASE_TTL_S + 1)
    bench.now += LEASE_TTL_S + 3
    bench.expire()
    bench.watch(LEASE_TTL_S)
    assert not bench.view.is_lost(INCARNATION)
    bench.watch(1)
    assert bench.view.is_lost(INCARNATION), "it had the time to renew its lease"


def test_no_worker_is_lost_for_a_redis_that_was_away(bench: Bench) -> None:
    bench.leases.renew_worker(record())
    bench.watch(LEASE_TTL_S + 1)
    bench.reachable = False
    with pytest.raises(redis.ConnectionError):
        bench.view.refresh()
    bench.reachable = True
    bench.expire()
    bench.watch(LEASE_TTL_S)
    assert not bench.view.is_lost(INCARNATION)
    bench.watch(1)
    assert bench.view.is_lost(INCARNATION)


def test_the_context_of_a_model_is_the_least_that_its_ready_workers_tell(bench: Bench) -> None:
    told = {
        "one": ("ready", 8192),
        "two": ("ready", 4096),
        "three": ("loading", 0),
        "four": ("draining", 1024),
    }
    assert bench.view.max_model_len("echo") is None
    for cid, (state, tokens) in told.items():
        bench.leases.renew_worker(worker_record(cid, state=state, max_model_len=tokens))
    bench.view.refresh()
    assert bench.view.max_model_len("echo") == 4096
    assert bench.view.max_model_len("other") is None


def test_a_model_takes_images_if_all_ready_workers_do(bench: Bench) -> None:
    assert bench.view.takes_images("echo"), "no worker has told it yet"
    for cid, state, takes in (("one", "ready", True), ("two", "loading", False)):
        bench.leases.renew_worker(worker_record(cid, state=state, takes_images=takes))
    bench.view.refresh()
    assert bench.view.takes_images("echo")
    bench.leases.renew_worker(worker_record("two", state="ready"))
    bench.view.refresh()
    assert not bench.view.takes_images("echo")
