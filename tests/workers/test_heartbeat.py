"""workers.heartbeat.Heartbeat: how it stops, and for which web processes it cancels requests."""

import threading
from typing import Any, cast

import pytest
import redis

from protocol.leases import LEASE_TTL_S, Leases, WorkerRecord
from protocol.names import Keys
from workers.engines.base import EngineStatus
from workers.heartbeat import Heartbeat


def nothing(*_: object) -> None:
    raise AssertionError("neither expired nor replaced nor hung")


class Bench:
    """A heartbeat on real leases, with a clock of its own. Stands in for engine, runner and queue."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self.now = 1000.0
        self.reachable = True
        self.client, self.keys = client, keys
        self.leases = Leases(client, keys)
        self.webs = {"web"}
        self.lost: set[str] = set()
        self.heartbeat = Heartbeat(
            cast(Any, self),
            cast(Any, self),
            describe=self.describe,
            on_expired=lambda: None,
            on_replaced=nothing,
            on_hung=nothing,
            hang_s=60,
            clock=lambda: self.now,
        )
        self.heartbeat.watch(cast(Any, self), cast(Any, self))

    def describe(self) -> WorkerRecord:
        return WorkerRecord(
            cid="cid",
            incarnation_id="cid:1",
            model="echo",
            tasks=("chat",),
            project="P",
            pid=1,
            host="h",
            service_id="s",
            node="",
            gpus=[],
        )

    def renew_worker(self, record: WorkerRecord) -> str:
        if not self.reachable:
            raise redis.ConnectionError("gone")
        return self.leases.renew_worker(record)

    def living_webs(self, web_ids: list[str]) -> set[str]:
        return self.leases.living_webs(web_ids)

    def status(self) -> EngineStatus:
        return EngineStatus(alive=True, running=0, waiting=0, steps=0)

    def web_ids(self) -> set[str]:
        return self.webs

    def set_lost_webs(self, web_ids: set[str]) -> None:
        self.lost = web_ids

    def running(self) -> list[str]:
        return []

    def cancelled(self, request_ids: list[str]) -> set[str]:
        return set()

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


def test_a_stop_waits_for_a_renewal_under_way_which_would_undo_the_release() -> None:
    begun, go, order = threading.Event(), threading.Event(), []

    class SlowLeases:
        def renew_worker(self, record: object) -> None:
            begun.set()
            go.wait(60)
            order.append("renewed")

    heartbeat = Heartbeat(
        cast(Any, SlowLeases()),
        cast(Any, None),
        describe=lambda: cast(Any, object()),
        on_expired=nothing,
        on_replaced=nothing,
        on_hung=nothing,
        hang_s=60,
    )

    def stop() -> None:
        heartbeat.stop()
        order.append("stopped")

    heartbeat.start()
    assert begun.wait(30)
    stopper = threading.Thread(target=stop)
    stopper.start()
    stopper.join(0.2)  # one that doesn't wait is through by now
    go.set()
    stopper.join(30)
    heartbeat.join(30)
    assert order == ["renewed", "stopped"]
