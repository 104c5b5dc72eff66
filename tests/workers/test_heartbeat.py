"""workers.heartbeat: renewals on a real Redis, lost web processes, and how it ends."""

import threading
from typing import Any, cast

import pytest
import redis

from protocol.leases import LEASE_TTL_S, REFRESH_S, Leases, WorkerRecord
from protocol.names import Keys
from tests.records import worker_record
from workers.abandoned import AbandonedRequests
from workers.heartbeat import Heartbeat
from workers.held_lease import HeldLease, WorkerReplaced
from workers.queue_watch import DEAF_LOOKS, NotConsuming, QueueWatch
from workers.watchdog import EngineHung


def record() -> WorkerRecord:
    return worker_record()


class Bench:
    """A heartbeat on real leases, with a clock of its own. Stands in for runner, queue and watchdog."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self.now = 1000.0
        self.reachable = True
        self.client, self.keys = client, keys
        self.leases = Leases(client, keys)
        self.renew_now = threading.Event()
        self.renewals = 0
        self.expired = 0
        self.hung = False
        self.webs = {"web"}
        self.lost: set[str] = set()
        self.requests: list[str] = []
        self.looks: list[int] = []
        self.received = 0
        self.messages = 0
        self.slots = 2
        self.state = "loading"
        self.marked: set[str] = set()
        self.cancelled_requests: list[str] = []
        self.published = 0
        self.drain_looks: list[int] = []
        """For each look, how many renewals there were before it."""
        stand_in = cast(Any, self)
        self.heartbeat = Heartbeat(
            stand_in,
            HeldLease(
                stand_in,
                get_record=lambda: worker_record(state=self.state),
                changed=self.renew_now,
                on_expired=self.on_expired,
                clock=lambda: self.now,
            ),
            QueueWatch(stand_in, stand_in, stand_in, model="m", is_ready=lambda: self.state == "ready"),
            AbandonedRequests(stand_in, stand_in, stand_in, stand_in, lambda: self.now),
            look_for_drain=self.look_for_drain,
            publish_metrics=self.publish_metrics,
        )

    def on_expired(self) -> None:
        self.expired += 1

    def check(self) -> None:
        if self.hung:
            raise EngineHung("stuck")

    def renew_worker(self, record: WorkerRecord) -> str:
        if not self.reachable:
            raise redis.ConnectionError("gone")
        self.renewals += 1
        return self.leases.renew_worker(record)

    def seize_worker(self, record: WorkerRecord) -> str:
        return self.leases.seize_worker(record)

    def living_webs(self, web_ids: list[str]) -> set[str]:
        return self.leases.living_webs(web_ids)

    def web_ids(self) -> set[str]:
        return self.webs

    def set_lost_webs(self, web_ids: set[str]) -> None:
        self.lost = web_ids

    def follow(self) -> None:
        pass

    def leave_lost(self, web_ids: set[str]) -> None:
        pass

    def running(self) -> list[str]:
        return self.requests

    def cancelled(self, request_ids: list[str]) -> set[str]:
        return self.marked.intersection(request_ids)

    def cancel(self, request_id: str) -> None:
        self.cancelled_requests.append(request_id)

    def waiting(self, model: str) -> int:
        return 3

    def queued(self, model: str) -> int:
        return self.messages

    def look(self, waiting: int) -> None:
        self.looks.append(waiting)

    def look_for_drain(self) -> None:
        self.drain_looks.append(self.renewals)

    def publish_metrics(self) -> None:
        self.published += 1

    def expire(self) -> None:
        self.client.delete(self.keys.web_lease("web"), self.keys.lease("cid"))

    def watch(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.heartbeat.tick()


@pytest.fixture
def bench(redis_client: Any, keys: Keys) -> Bench:
    bench = Bench(redis_client, keys)
    bench.leases.renew_web("web")
    bench.watch(LEASE_TTL_S + 5)
    assert not bench.lost
    return bench


def test_the_lease_is_renewed_every_three_seconds_and_when_the_record_has_changed(bench: Bench) -> None:
    bench.renewals = 0
    bench.watch(3 * REFRESH_S)
    assert bench.renewals == 3
    bench.renew_now.set()
    bench.heartbeat.tick()
    bench.heartbeat.tick()
    assert bench.renewals == 4


def test_a_drain_is_looked_for_in_each_tick_before_the_lease_is_renewed(bench: Bench) -> None:
    bench.renewals = 0
    bench.drain_looks.clear()
    bench.renew_now.set()
    bench.watch(2)
    assert bench.renewals == 1
    assert bench.drain_looks == [0, 1]


def test_a_changed_record_is_written_when_redis_is_back(bench: Bench) -> None:
    bench.renewals, bench.reachable = 0, False
    bench.renew_now.set()
    bench.heartbeat.tick()
    bench.reachable = True
    bench.heartbeat.tick()
    assert bench.renewals == 1


def test_a_lease_that_had_expired_is_renewed_and_reported(bench: Bench) -> None:
    bench.expire()
    bench.watch(REFRESH_S)
    assert bench.expired == 1
    assert bench.client.get(bench.keys.lease("cid")) == b"cid:1"


def test_metrics_are_published_with_each_renewal_and_never_without_the_lease(bench: Bench) -> None:
    renewals, published = bench.renewals, bench.published
    bench.watch(4 * REFRESH_S)
    assert bench.renewals - renewals == bench.published - published >= 4
    published = bench.published
    bench.leases.seize_worker(worker_record(incarnation_id="cid:2"))
    with pytest.raises(WorkerReplaced):
        bench.watch(REFRESH_S)
    assert bench.published == published


def test_a_lease_of_another_incarnation_ends_the_worker(bench: Bench) -> None:
    other = record()
    other.incarnation_id = "cid:2"
    bench.leases.seize_worker(other)
    with pytest.raises(WorkerReplaced):
        bench.watch(REFRESH_S)
    assert bench.client.get(bench.keys.lease("cid")) == b"cid:2"
    (shown,) = bench.leases.workers()
    assert (shown.incarnation_id, shown.state) == ("cid:2", "loading"), (
        "nothing of the newer one is overwritten"
    )


def test_an_earlier_incarnation_of_this_worker_is_replaced(redis_client: Any, keys: Keys) -> None:
    earlier = record()
    earlier.incarnation_id = "cid:0"
    Leases(redis_client, keys).seize_worker(earlier)
    bench = Bench(redis_client, keys)
    bench.watch(REFRESH_S)
    assert redis_client.get(keys.lease("cid")) == b"cid:1"
    assert not bench.expired


def test_an_engine_that_hangs_ends_the_worker_without_redis_too(bench: Bench) -> None:
    bench.reachable, bench.hung = False, True
    with pytest.raises(EngineHung):
        bench.heartbeat.run()


def test_requests_that_were_marked_as_cancelled_are_cancelled_within_a_second(bench: Bench) -> None:
    bench.requests, bench.marked = ["a", "b"], {"b", "elsewhere"}
    bench.heartbeat.tick()
    assert bench.cancelled_requests == ["b"]


def test_throughput_learns_every_second_how_many_requests_wait(bench: Bench) -> None:
    bench.looks.clear()
    bench.watch(2)
    assert bench.looks == [3, 3]


def test_a_web_process_whose_lease_expired_is_lost_and_may_come_back(bench: Bench) -> None:
    bench.expire()
    bench.watch(3)
    assert bench.lost == {"web"}
    bench.leases.renew_web("web")
    bench.watch(3)
    assert not bench.lost


def test_no_web_process_is_lost_for_a_pause_of_the_worker(bench: Bench) -> None:
    bench.now += LEASE_TTL_S + 3
    bench.expire()
    bench.watch(LEASE_TTL_S)
    assert not bench.lost
    bench.watch(3)
    assert bench.lost == {"web"}, "it had the time to renew its lease"


def test_no_web_process_is_lost_for_a_redis_that_was_away(bench: Bench) -> None:
    bench.reachable = False
    bench.watch(4)
    bench.reachable = True
    bench.expire()
    bench.watch(LEASE_TTL_S)
    assert not bench.lost
    bench.watch(3)
    assert bench.lost == {"web"}


def test_a_stop_waits_for_a_renewal_in_progress_which_would_undo_the_release(bench: Bench) -> None:
    begun, go, order = threading.Event(), threading.Event(), []

    def renew_slowly(record: WorkerRecord) -> str:
        begun.set()
        go.wait(60)
        order.append("renewed")
        return record.incarnation_id

    cast(Any, bench).renew_worker = renew_slowly
    bench.renew_now.set()

    def stop() -> None:
        bench.heartbeat.stop()
        order.append("stopped")

    thread = threading.Thread(target=bench.heartbeat.run, daemon=True)
    thread.start()
    assert begun.wait(30)
    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    stopper.join(0.2)  # time enough for one that doesn't wait
    go.set()
    stopper.join(30)
    thread.join(30)
    assert order == ["renewed", "stopped"]


def test_after_a_stop_nothing_is_renewed(bench: Bench) -> None:
    """A renewal that begins after the release would undo it."""
    bench.heartbeat.stop()
    bench.expire()
    bench.watch(LEASE_TTL_S)
    assert not bench.client.exists(bench.keys.lease("cid"))


def test_a_worker_that_receives_nothing_though_messages_wait_ends(bench: Bench) -> None:
    bench.state, bench.messages = "ready", 1
    bench.watch(DEAF_LOOKS)
    with pytest.raises(NotConsuming):
        bench.watch(2)


@pytest.mark.parametrize("reason", ["loading", "draining", "busy", "receives", "empty now and then"])
def test_messages_may_wait(bench: Bench, reason: str) -> None:
    bench.state, bench.messages = "ready", 1
    if reason in ("loading", "draining"):
        bench.state = reason
    if reason == "busy":
        bench.requests = ["a", "b"]
    for second in range(3 * DEAF_LOOKS):
        if reason == "receives":
            bench.received += second % 5 == 0
        if reason == "empty now and then":
            bench.messages = int(second % 5 > 0)
        bench.watch(1)


def test_a_redis_that_stalls_makes_no_worker_deaf(bench: Bench) -> None:
    bench.state, bench.messages = "ready", 1
    bench.watch(DEAF_LOOKS - 1)
    bench.reachable = False
    bench.watch(5)
    bench.now += 60
    bench.reachable = True
    bench.watch(DEAF_LOOKS - 1)
