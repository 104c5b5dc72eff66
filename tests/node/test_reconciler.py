"""node.reconciler with a real Redis and the stand-in node: which entries it removes, and which not."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from config import Settings
from node.cli import compare
from node.client import NodeClient
from node.deployment import Deployment, Mark
from node.election import Election, Result
from node.lock import NodeLock
from node.reconciler import ELECTION_TTL_S, Reconciler, Timing
from node.registration import default_cid
from protocol.connections import RedisClient
from protocol.leases import Leases, WorkerRecord
from protocol.names import Keys
from tests.node.conftest import RedisServer
from tests.stand_in_node import StandInNode

Make = Callable[..., WorkerRecord]

QUICK = Timing(every_s=0.02, lost_after_s=0.2, unknown_after_s=0.4)
OURS, SIBLING, DEAD = (default_cid("host-1", "P", slot) for slot in ("0", "1", "2"))


class Bench:
    """Reconcilers on one Redis and one node, with a clock that tests move on: minutes pass at once."""

    def __init__(self, client: RedisClient, keys: Keys, node: StandInNode, deployment: Deployment) -> None:
        self.client, self.keys, self.node, self.deployment = client, keys, node, deployment
        self.leases = Leases(client, keys)
        self.now = 1000.0

    def reconciler(self, deployment: Deployment | None = None, **options: Any) -> Reconciler:
        """Of this deployment, or of another one on the same Redis."""
        deployment = deployment or self.deployment
        settings, keys = deployment.settings, Keys.of(deployment.namespace)
        key = keys.reconciler(settings.node_url, settings.service_id)
        return Reconciler(
            Election(self.client, key, ELECTION_TTL_S),
            Leases(self.client, keys),
            NodeClient(settings.node_url, timeout_s=2.0),
            NodeLock(self.client, keys, settings.node_url, settings.service_id),
            deployment=deployment,
            **{"clock": lambda: self.now, **options},
        )

    def live(self, *records: WorkerRecord) -> None:
        """Give these workers a lease and an entry at the node."""
        for record in records:
            self.leases.renew_worker(record)
        for entry in self.deployment.registrations(records):
            NodeClient(self.node.url).register_model(entry)

    def expire(self, *records: WorkerRecord) -> None:
        """Let their leases expire."""
        for record in records:
            self.client.delete(self.keys.lease(record.cid))

    def watch(self, reconciler: Reconciler, seconds: float) -> None:
        """Let time pass, with a round every three seconds."""
        end = self.now + seconds
        while self.now < end:
            reconciler.round()
            self.now += Timing().every_s

    def watch_until(self, reconciler: Reconciler, holds: Callable[[], object], within_s: float) -> float:
        """Let time pass until `holds()`; returns the seconds."""
        started = self.now
        while not holds():
            assert self.now - started <= within_s, (
                f"not within {within_s} s; the node lists {self.node.entries()}"
            )
            self.watch(reconciler, Timing().every_s)
        return self.now - started


@pytest.fixture
def bench(client: RedisClient, keys: Keys, node: StandInNode, deployment: Deployment) -> Bench:
    return Bench(client, keys, node, deployment)


def test_a_lost_worker_is_unregistered_once_its_siblings_and_foreign_entries_stay(
    bench: Bench, node: StandInNode, record: Make
) -> None:
    dead, sibling = record("c-dead"), record("c-sibling")
    bench.live(dead, sibling)
    node.add("P", "Chat", "http://127.0.0.1:1088/v1", cid="d15c4007271b")
    node.add("Other", "Chat", "http://127.0.0.1:1088/v1", cid="c-dead")
    reconciler = bench.reconciler()
    bench.watch(reconciler, 30)
    assert len(node.cids()) == 4

    bench.expire(dead)
    # with the 10 s that the lease takes to expire: within 15 s of the kill
    bench.watch_until(reconciler, lambda: "c-dead" not in node.cids("P"), within_s=3)
    bench.watch(reconciler, 300)

    assert node.cids() == ["c-sibling", "d15c4007271b", "c-dead"]
    assert [call.body for call in node.seen("model/unregister")] == [
        {"project": "P", "model": "Chat", "cid": "c-dead"}
    ]
    assert len(node.seen("model/register")) == 2
    assert not node.seen("project/register", "project/unregister")


def test_a_lost_worker_is_shown_for_a_minute_then_forgotten(bench: Bench, record: Make) -> None:
    dead, nowhere = record("c-dead"), record("c-nowhere", node="")
    bench.live(dead, nowhere)
    bench.expire(dead, nowhere)
    reconciler = bench.reconciler()

    bench.watch(reconciler, 60)
    assert [found.state for found in bench.leases.workers()] == ["lost", "lost"]

    bench.watch_until(reconciler, lambda: not bench.leases.workers(), within_s=30)
    # a worker without a node was never on one
    assert len(bench.node.seen("model/unregister")) == 1


def test_workers_of_other_machines_and_nodes_are_left_alone(bench: Bench, record: Make) -> None:
    others = [record("c-1", service_id="host-2"), record("c-2", node="http://127.0.0.1:7000")]
    for other in others:
        bench.leases.renew_worker(other)
    bench.expire(*others)

    bench.watch(bench.reconciler(), 300)

    assert not bench.node.seen("model/unregister")
    assert len(bench.leases.workers()) == 2


def test_a_worker_that_comes_back_and_is_lost_again_is_unregistered_again(bench: Bench, record: Make) -> None:
    worker = record("c-1")
    bench.live(worker)
    reconciler = bench.reconciler()
    bench.watch(reconciler, 12)
    for _ in range(2):
        bench.expire(worker)
        bench.watch_until(reconciler, lambda: not bench.node.cids(), within_s=3)
        bench.live(worker)
        bench.watch(reconciler, 12)
        assert bench.node.cids() == ["c-1"]


def test_a_restarted_worker_is_not_unregistered_for_its_last_incarnation(
    bench: Bench, node: StandInNode, record: Make
) -> None:
    """It came back between the look at the leases and our turn at the node."""
    bench.live(record("c-1"))
    bench.expire(record("c-1"))
    found = bench.leases.workers()
    bench.leases.seize_worker(record("c-1", incarnation_id="c-1:2"))

    bench.reconciler()._unregister_lost(found, bench.now)

    assert found[0].state == "lost"
    assert node.cids() == ["c-1"]


def test_a_node_that_is_down_is_called_when_it_is_back(bench: Bench, node: StandInNode, record: Make) -> None:
    bench.live(record("c-1"))
    bench.expire(record("c-1"))
    node.stop()
    reconciler = bench.reconciler()
    bench.watch(reconciler, 600)
    assert bench.leases.workers()[0].state == "lost"

    node.start()
    bench.watch_until(reconciler, lambda: not node.cids(), within_s=33)


@pytest.mark.parametrize("with_record", [True, False])
def test_a_refusing_node_is_asked_again_less_and_less(
    bench: Bench, node: StandInNode, record: Make, with_record: bool
) -> None:
    if with_record:
        bench.live(record("c-1"))
        bench.expire(record("c-1"))
    else:
        stale(node)
    node.behave("refusing", code=5000)
    reconciler = bench.reconciler()
    bench.watch(reconciler, 310)
    assert 10 <= len(node.seen("model/unregister")) <= 25

    node.behave("ok")
    bench.watch_until(reconciler, lambda: not node.cids(), within_s=33)


def test_it_waits_while_another_has_the_turn(
    bench: Bench, node: StandInNode, client: RedisClient, record: Make
) -> None:
    bench.live(record("c-1"))
    bench.expire(record("c-1"))
    reconciler = bench.reconciler()
    bench.watch(reconciler, 9)
    with NodeLock(client, bench.keys, node.url, "host-1").turn():
        bench.watch(reconciler, 6)
        assert node.cids() == ["c-1"]

    bench.watch_until(reconciler, lambda: not node.cids(), within_s=6)


# ----- entries without a worker


def stale(node: StandInNode) -> None:
    node.add("P", "Chat", "http://127.0.0.1:1088/v1", cid=DEAD)


def test_a_stale_cid_of_ours_is_unregistered_and_no_other(
    bench: Bench, node: StandInNode, record: Make
) -> None:
    bench.live(record(OURS))
    stale(node)
    foreign = [
        ("P", default_cid("host-1", "another namespace", "0")),
        ("P", default_cid("host-2", "P", "0")),
        ("P", "host-1-by-hand"),
        ("Other", default_cid("host-1", "P", "9")),
    ]
    for project, cid in foreign:
        node.add(project, "Chat", "http://127.0.0.1:1099/v1/chat/completions", cid=cid)
    reconciler = bench.reconciler()

    bench.watch_until(reconciler, lambda: DEAD not in node.cids(), within_s=33)
    bench.watch(reconciler, 300)

    assert node.cids() == [OURS, *(cid for _, cid in foreign)]


@pytest.mark.parametrize(
    ("model", "path", "cid"),
    [
        ("Chat", "/v1/chat/completions", default_cid("a former host name", "P", "0")),
        ("Chat", "/v1/chat/completions", "of-a-former-WORKER_CID"),
        ("Chat", "/v1/chat/completions", default_cid("host-1", "a former namespace", "0")),
        ("No longer in the catalogue", "/v1/images/edits", OURS),
    ],
)
def test_what_points_at_our_url_and_has_no_worker_is_unregistered(
    bench: Bench, node: StandInNode, record: Make, model: str, path: str, cid: str
) -> None:
    bench.live(record(OURS))
    node.add("P", model, f"http://127.0.0.1:1088{path}", cid=cid)
    elsewhere = f"http://127.0.0.1:1088/behind/a/proxy{path}"
    node.add("P", model, elsewhere, cid="d15c4007271b")

    bench.watch_until(
        bench.reconciler(), lambda: (model, cid) not in listed(node), within_s=Timing().unknown_after_s + 6
    )
    bench.watch(bench.reconciler(), 300)

    assert listed(node) == [("Chat", OURS), (model, "d15c4007271b")]


def listed(node: StandInNode) -> list[tuple[str, str]]:
    """Model and cid of each entry."""
    return [(entry["model"], entry["cid"]) for entry in node.entries()]


def test_what_it_removes_is_what_the_commands_call_stale(
    bench: Bench, node: StandInNode, deployment: Deployment, record: Make
) -> None:
    lost, former = record("c-lost"), record("c-former", service_id="a former host name")
    bench.live(lost, record("c-1"))
    for worker in (former, record("c-moved", node="http://127.0.0.1:7000")):
        bench.leases.renew_worker(worker)
    for cid in ("c-former", "c-moved", "c-unknown", DEAD):
        node.add("P", "Chat", "http://127.0.0.1:1088/v1/chat/completions", cid=cid)
    for cid in ("c-1", "c-lost"):
        node.add("Other", "Chat", "http://127.0.0.1:1088/v1/chat/completions", cid=cid)
    node.add("P", "Chat", "http://127.0.0.1:1099/v1/chat/completions", cid="d15c4007271b")
    reconciler = bench.reconciler()
    bench.watch(reconciler, 60)
    bench.expire(lost, former)
    # the one whose NODE_URL is another lives
    bench.leases.renew_worker(record("c-moved", node="http://127.0.0.1:7000"))
    bench.watch(reconciler, 3)

    rows = compare(NodeClient(node.url).models(), bench.leases.workers(), deployment)
    stale = {row.entry for row in rows if row.mark is Mark.STALE}
    kept = [row.entry for row in rows if row.mark is not Mark.STALE]
    bench.watch(reconciler, 180)

    assert {entry.cid for entry in stale} >= {"c-former"}
    assert NodeClient(node.url).models() == kept


def test_each_of_two_machines_with_one_redis_sees_to_its_own_node(
    bench: Bench, node: StandInNode, settings: Settings, record: Make
) -> None:
    """Same host name and, on its own machine, the same NODE_URL; only here its port differs."""
    here, there = record("c-here"), record("c-there", service_id="host-2")
    bench.live(here)
    bench.leases.renew_worker(there)
    node.add("P", "Chat", "http://127.0.0.1:1088/v1/chat/completions", cid="c-there")
    mine = bench.reconciler()
    other = bench.reconciler(Deployment(settings.model_copy(update={"service_id": "host-2"}), "P", "P"))
    bench.expire(there)

    bench.watch(mine, 20)
    assert not node.seen("model/unregister")
    bench.watch_until(other, lambda: "c-there" not in node.cids(), within_s=15)

    assert node.cids() == ["c-here"]


def test_a_loading_worker_stands_for_its_cid(bench: Bench, node: StandInNode, record: Make) -> None:
    stale(node)
    bench.leases.renew_worker(record(DEAD, state="loading", registered=False))

    bench.watch(bench.reconciler(), 300)

    assert node.cids() == [DEAD]


def test_a_worker_of_another_version_stands_for_its_cid_until_its_lease_expires(
    bench: Bench, node: StandInNode, record: Make
) -> None:
    """Its record can't be read, but its lease is there: it registers itself, as in a rolling upgrade."""
    worker = record(OURS)
    bench.live(worker)
    bench.client.set(bench.keys.worker(OURS), b'{"cid": ["a list, in a later version"]}')
    reconciler = bench.reconciler()

    bench.watch(reconciler, 300)
    assert node.cids() == [OURS]

    bench.expire(worker)
    bench.watch_until(reconciler, lambda: not node.cids(), within_s=Timing().unknown_after_s + 6)


def test_two_namespaces_on_one_redis_and_one_node(bench: Bench, node: StandInNode, record: Make) -> None:
    """Same machine, SERVICE_ID and project: the other deployment's reconciler knows no record of ours."""
    bench.live(record(OURS), record(SIBLING))
    settings = bench.deployment.settings.model_copy(update={"service_url": "http://127.0.0.1:1099"})

    bench.watch(bench.reconciler(Deployment(settings, "Q", "P")), 300)

    assert node.cids() == [OURS, SIBLING]


def test_the_list_is_read_once_a_minute(bench: Bench, node: StandInNode) -> None:
    bench.watch(bench.reconciler(), 300)

    assert len(node.seen("project/peer")) == 5


# ----- missing leases that prove nothing


def test_nothing_is_unregistered_before_it_has_watched_long_enough(bench: Bench, record: Make) -> None:
    bench.live(record("c-1"))
    bench.expire(record("c-1"))
    stale(bench.node)
    reconciler = bench.reconciler()

    first = bench.watch_until(reconciler, lambda: "c-1" not in bench.node.cids(), within_s=15)
    second = bench.watch_until(reconciler, lambda: not bench.node.cids(), within_s=33)

    assert first >= 10
    assert first + second >= 30


def test_a_redis_that_restarts_empty_unregisters_nobody(
    bench: Bench, node: StandInNode, record: Make, redis_server: RedisServer
) -> None:
    workers = [record(OURS), record(SIBLING)]
    bench.live(*workers)
    reconciler = bench.reconciler()
    bench.watch(reconciler, 120)

    redis_server.kill()
    bench.watch(reconciler, 6)
    redis_server.start()
    # no record exists for a while, then the workers write theirs again
    bench.watch(reconciler, 24)
    for worker in workers:
        bench.leases.renew_worker(worker)
    bench.watch(reconciler, 120)

    assert node.cids() == [OURS, SIBLING]
    assert not node.seen("model/unregister")


def test_a_restart_too_quick_to_be_seen_unregisters_nobody(
    bench: Bench, node: StandInNode, client: RedisClient, record: Make
) -> None:
    """Redis came back from an old snapshot between two rounds: with records, without leases.

    So has the reconciler's own, from which it knows that the others prove nothing.
    """
    workers = [record(OURS), record(SIBLING)]
    bench.live(*workers)
    reconciler = bench.reconciler()
    bench.watch(reconciler, 120)

    bench.expire(*workers)
    client.delete(bench.keys.reconciler(node.url, "host-1"))
    bench.watch(reconciler, 6)
    for worker in workers:
        bench.leases.renew_worker(worker)
    bench.watch(reconciler, 120)

    assert not node.seen("model/unregister")


def test_a_record_that_is_missing_for_a_moment_costs_no_entry(
    bench: Bench, node: StandInNode, record: Make
) -> None:
    worker = record(OURS)
    bench.live(worker)
    reconciler = bench.reconciler()
    bench.watch(reconciler, 117)

    bench.leases.forget_worker(OURS)
    bench.watch(reconciler, 27)
    bench.leases.renew_worker(worker)
    bench.watch(reconciler, 120)

    assert not node.seen("model/unregister")


def test_a_redis_that_stalls_unregisters_nobody(
    bench: Bench, node: StandInNode, record: Make, redis_server: RedisServer
) -> None:
    workers = [record("c-1"), record("c-2")]
    bench.live(*workers)
    reconciler = bench.reconciler()
    bench.watch(reconciler, 120)

    assert redis_server.process is not None
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    try:
        bench.watch(reconciler, 3)
    finally:
        os.kill(redis_server.process.pid, signal.SIGCONT)
    # meanwhile every lease has expired; it takes the workers a moment to renew them
    bench.expire(*workers)
    bench.watch(reconciler, 9)
    for worker in workers:
        bench.leases.renew_worker(worker)
    bench.watch(reconciler, 120)

    assert not node.seen("model/unregister")


def test_a_reconciler_that_was_paused_unregisters_nobody(
    bench: Bench, node: StandInNode, record: Make
) -> None:
    worker = record("c-1")
    bench.live(worker)
    reconciler = bench.reconciler()
    bench.watch(reconciler, 120)

    bench.now += 12
    bench.expire(worker)
    bench.watch(reconciler, 3)
    bench.leases.renew_worker(worker)
    bench.watch(reconciler, 120)

    assert not node.seen("model/unregister")


# ----- the election


def test_only_one_of_two_acts_and_the_other_takes_over(bench: Bench, record: Make) -> None:
    bench.live(record("c-1"))
    first, second = bench.reconciler(), bench.reconciler()
    first.round()
    bench.expire(record("c-1"))
    bench.watch(second, 120)
    assert bench.node.cids() == ["c-1"]

    first._election.resign()
    bench.watch_until(second, lambda: not bench.node.cids(), within_s=15)


def test_an_election_is_won_kept_and_lost(client: RedisClient) -> None:
    one, other = Election(client, "seat", 5), Election(client, "seat", 5)
    assert (one.hold(), one.hold(), other.hold()) == (Result.WON, Result.KEPT, Result.OTHER)
    # only the holder can give it back
    other.resign()
    assert other.hold() is Result.OTHER
    one.resign()
    assert (other.hold(), one.hold()) == (Result.WON, Result.OTHER)
    client.delete("seat")
    assert other.hold() is Result.WON


@pytest.fixture
def running(bench: Bench) -> Iterator[Reconciler]:
    reconciler = bench.reconciler(timing=QUICK, clock=time.monotonic)
    reconciler.start()
    yield reconciler
    reconciler.stop()
    reconciler._thread.join(5)


def test_its_thread_unregisters_and_survives_a_restart_of_redis(
    bench: Bench, node: StandInNode, record: Make, redis_server: RedisServer, running: Reconciler
) -> None:
    redis_server.kill()
    redis_server.start()
    bench.live(record("c-1"))
    bench.expire(record("c-1"))

    node.wait_for(lambda n: n.seen("model/unregister"))

    assert node.cids() == []
