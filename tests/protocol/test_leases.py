"""protocol.leases: what a missing lease proves, and what Redis holds of workers and web processes."""

import json

import msgspec
import pytest

from protocol.leases import GAP_S, LEASE_TTL_S, Leases, Observation
from protocol.names import Keys
from tests.deployment import RedisServer
from tests.records import worker_record


class Watch:
    """An Observation with a clock of its own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.observation = Observation(lambda: self.now)

    def look(self, *pauses: float) -> None:
        """Look after each of these pauses."""
        for pause in pauses:
            self.now += pause
            self.observation.seen()


@pytest.fixture
def watch() -> Watch:
    watch = Watch()
    watch.look(0)
    return watch


def test_nothing_counts_before_the_first_look() -> None:
    observation = Observation()
    assert observation.interrupted
    assert not observation.absence_counts()


def test_a_missing_lease_counts_after_a_whole_lease_of_watching(watch: Watch) -> None:
    watch.look(*[1] * (LEASE_TTL_S - 1))
    assert not watch.observation.absence_counts()
    watch.look(1)
    assert watch.observation.absence_counts()
    assert not watch.observation.absence_counts(after_s=LEASE_TTL_S + 1)


def test_a_failed_look_restarts_the_waiting_period(watch: Watch) -> None:
    watch.look(*[1] * 60)
    watch.observation.interrupt()
    assert watch.observation.interrupted
    assert not watch.observation.absence_counts()
    watch.look(1)
    assert not watch.observation.interrupted
    watch.look(*[1] * (LEASE_TTL_S - 1))
    assert not watch.observation.absence_counts()
    watch.look(1)
    assert watch.observation.absence_counts()


def test_a_pause_in_which_leases_can_expire_restarts_the_waiting_period(watch: Watch) -> None:
    watch.look(*[1] * 60)
    watch.look(GAP_S)
    assert watch.observation.absence_counts()
    watch.look(GAP_S + 0.1)
    assert watch.observation.watched_s == 0
    assert not watch.observation.interrupted, "the look itself succeeded"
    watch.look(*[GAP_S] * 2)
    assert watch.observation.absence_counts()


def test_time_after_the_latest_look_is_not_watched(watch: Watch) -> None:
    """A process that is paused between its look and its question learns nothing meanwhile."""
    watch.look(*[1] * (LEASE_TTL_S - 1))
    watch.now += 60
    assert not watch.observation.absence_counts()


def test_a_record_of_another_version_hides_nobody(redis_server: RedisServer, keys: Keys) -> None:
    leases, client = Leases(redis_server.client, keys), redis_server.client
    ours = worker_record("ours")
    leases.renew_worker(ours)
    newer = json.loads(client.get(keys.worker("ours"))) | {"cid": "newer", "incarnation_id": "newer:1"}
    for cid, change in (("newer", {"state": "warming", "more": 1}), ("newest", {"pid": "a string"})):
        body = json.dumps(newer | {"cid": cid, "incarnation_id": f"{cid}:1"} | change)
        client.set(keys.worker(cid), body)
        client.set(keys.lease(cid), f"{cid}:1")
        client.sadd(keys.workers, cid)
    found = {each.cid: each for each in leases.workers()}
    assert set(found) == {"ours", "newer", "newest"}
    assert found["newer"].state == "warming"
    assert found["newest"].state == "unknown" and found["newest"].incarnation_id == "newest:1"
    client.delete(keys.lease("newest"))
    assert {each.cid: each.state for each in leases.workers()}["newest"] == "lost"


def test_a_lease_of_another_incarnation_is_seized_and_neither_renewed_nor_released(
    redis_server: RedisServer, keys: Keys
) -> None:
    leases = Leases(redis_server.client, keys)
    older = worker_record("c")
    newer = msgspec.structs.replace(older, incarnation_id="c:2", state="ready")
    assert leases.renew_worker(older) == "", "nobody had it"
    assert leases.seize_worker(newer) == "c:1"
    assert leases.renew_worker(older) == "c:2"
    leases.release_worker(older, keep_record=False)
    leases.release_worker(older, keep_record=True)
    assert leases.workers() == [newer]
    leases.release_worker(newer, keep_record=False)
    assert leases.workers() == []
    assert redis_server.client.exists(keys.lease("c")) == 0
