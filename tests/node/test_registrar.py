"""node.registrar against the stand-in node: an entry from start to end, with all faults of a node."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from node.client import NodeClient
from node.lock import NodeLock
from node.registrar import NoRegistrar, Registrar, Timing
from node.registration import Registration
from node.web_watch import WebWatch
from protocol.connections import RedisClient
from protocol.names import Keys
from tests.node.conftest import RedisServer
from tests.stand_in_node import StandInNode

OURS = Registration("P", "Chat", "http://127.0.0.1:1088/v1/chat/completions", 0, "c-1")
QUICK = Timing(
    first_probe_every_s=0.02,
    probe_every_s=0.05,
    read_list_every_s=0.3,
    backoff_first_s=0.05,
    backoff_max_s=0.2,
    drain_s=2.0,
)


class Worker:
    """A registrar with a web process that can be switched off, and a record of what it reported."""

    def __init__(
        self,
        node: StandInNode,
        turn: Callable[[], object] | None = None,
        timeout_s: float = 3.0,
        **options: object,
    ) -> None:
        self.web = True
        self.fail_next = False
        self.probes = 0
        self.shown: list[tuple[bool, str]] = []
        self.changed = threading.Condition()
        client = NodeClient(node.url, timeout_s=timeout_s, patient_timeout_s=30)
        given = {"timing": QUICK, **options}
        self.registrar = Registrar(
            OURS,
            client,
            self.probe,
            turn or (lambda: contextlib.nullcontext(True)),  # type: ignore[arg-type]
            self.on_change,
            **given,  # type: ignore[arg-type]
        )

    def probe(self) -> str:
        with self.changed:
            self.probes += 1
            self.changed.notify_all()
            failed, self.fail_next = self.fail_next, False
        return "" if self.web and not failed else "nobody is there"

    def on_change(self) -> None:
        with self.changed:
            self.shown.append((self.registrar.registered, self.registrar.last_error))
            self.changed.notify_all()

    def wait_for(self, predicate: Callable[["Worker"], object], timeout_s: float = 10.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: predicate(self), timeout_s), (
                f"not so; it reported {self.shown}"
            )

    def serve(self) -> "Worker":
        self.registrar.start()
        self.registrar.set_serving(True)
        return self


@pytest.fixture
def worker(node: StandInNode) -> Iterator[Worker]:
    worker = Worker(node)
    yield worker
    worker.registrar.abandon()


def is_registered(worker: Worker) -> bool:
    return worker.registrar.registered


def test_it_registers_once_when_it_can_serve_and_unregisters_when_it_cannot(
    node: StandInNode, worker: Worker
) -> None:
    worker.serve()
    worker.wait_for(is_registered)
    assert NodeClient(node.url).models() == [OURS]
    assert len(node.seen("model/register")) == 1

    worker.registrar.set_serving(False)
    worker.wait_for(lambda w: not w.registrar.registered)

    assert node.cids() == []
    assert worker.registrar.last_error == ""
    assert not node.seen("project/register", "project/unregister")


def test_an_entry_of_an_earlier_incarnation_is_removed_while_the_model_loads(
    node: StandInNode, worker: Worker
) -> None:
    NodeClient(node.url).register_model(OURS)

    worker.registrar.start()
    node.wait_for(lambda n: not n.cids())

    worker.registrar.set_serving(True)
    node.wait_for(lambda n: n.cids() == ["c-1"])


def test_without_a_node_nothing_is_registered_and_nothing_is_missing() -> None:
    registrar = NoRegistrar()
    registrar.start()
    registrar.set_serving(True)
    registrar.lease_was_lost()

    assert registrar.drain()
    registrar.abandon()
    assert (registrar.registered, registrar.maybe_registered, registrar.last_error) == (False, False, "")


def test_a_node_that_is_down_at_the_start_is_called_until_it_answers(
    node: StandInNode, worker: Worker
) -> None:
    node.stop()
    worker.serve()
    worker.wait_for(lambda w: "Connection refused" in w.registrar.last_error)
    assert not worker.registrar.registered

    node.start()
    worker.wait_for(is_registered)

    assert worker.registrar.last_error == ""


def test_a_node_that_comes_back_without_its_list_gets_the_entry_again(
    node: StandInNode, worker: Worker
) -> None:
    worker.serve()
    worker.wait_for(is_registered)
    node.stop()
    worker.wait_for(lambda w: "unreachable" in w.registrar.last_error)
    # as far as is known: the list could not be read
    assert worker.registrar.registered

    node.start(forget=True)
    node.wait_for(lambda n: n.cids() == ["c-1"])


def test_an_entry_that_somebody_else_removed_or_changed_is_restored(
    node: StandInNode, worker: Worker
) -> None:
    worker.serve()
    worker.wait_for(is_registered)
    NodeClient(node.url).unregister_model("P", "Chat", "c-1")
    node.wait_for(lambda n: n.cids() == ["c-1"])

    NodeClient(node.url).register_model(Registration("P", "Chat", "http://127.0.0.1:9/v1", 0, "c-1"))
    node.wait_for(lambda n: n.entries()[0]["api"] == OURS.api)


def test_the_list_is_read_rarely_and_nothing_is_registered_twice(node: StandInNode, worker: Worker) -> None:
    began = time.monotonic()
    worker.serve()
    node.wait_for(lambda n: len(n.seen("project/peer")) == 3)

    # counted from before the registration, with which the first period begins
    assert node.seen("project/peer")[2].at - began >= 3 * QUICK.read_list_every_s
    assert len(node.seen("model/register")) == 1


def test_after_a_lost_lease_the_list_is_read_at_once(node: StandInNode) -> None:
    worker = Worker(node, timing=Timing(first_probe_every_s=0.02, read_list_every_s=3600)).serve()
    worker.wait_for(is_registered)
    NodeClient(node.url).unregister_model("P", "Chat", "c-1")

    worker.registrar.lease_was_lost()
    node.wait_for(lambda n: n.cids() == ["c-1"])

    worker.registrar.abandon()


@pytest.fixture
def hasty(node: StandInNode) -> Iterator[Worker]:
    """A worker that waits 0.3 s for the node's first answer."""
    worker = Worker(node, timeout_s=0.3)
    yield worker
    worker.registrar.abandon()


def test_a_slow_node_is_registered_with_in_the_end(node: StandInNode, hasty: Worker) -> None:
    worker = hasty
    node.behave("slow", delay_s=3600)
    worker.serve()

    worker.wait_for(lambda w: "did not answer within" in w.registrar.last_error)
    node.behave("slow", delay_s=0.6)
    worker.wait_for(is_registered, timeout_s=60)
    assert worker.registrar.last_error == ""


@pytest.mark.parametrize("code", [1001, 5000])
def test_a_refusal_is_shown_and_tried_again(node: StandInNode, worker: Worker, code: int) -> None:
    node.behave("refusing", code=code)
    worker.serve()
    worker.wait_for(lambda w: f"code {code}" in w.registrar.last_error)
    node.wait_for(lambda n: len(n.seen("model/register")) >= 3)

    node.behave("ok")
    worker.wait_for(is_registered)


def test_retries_back_off(node: StandInNode, worker: Worker) -> None:
    node.behave("refusing")
    worker.serve()
    node.wait_for(lambda n: len(n.seen("model/register")) >= 6)

    tries = [call.at for call in node.seen("model/register")]
    assert tries[5] - tries[4] >= 0.5 * QUICK.backoff_max_s > QUICK.backoff_first_s


def test_a_node_that_is_too_old_is_named_in_last_error(node: StandInNode, worker: Worker) -> None:
    node.behave("old")
    worker.serve()
    worker.wait_for(lambda w: "v0.2.1 or newer is needed" in w.registrar.last_error)
    assert not node.seen("project/register")

    # it was upgraded
    node.behave("ok")
    worker.wait_for(is_registered)


def test_where_the_list_cannot_be_read_the_entry_is_registered_again(
    node: StandInNode, worker: Worker
) -> None:
    node.behave("unlisted")
    worker.serve()
    worker.wait_for(is_registered)
    node.wait_for(lambda n: len(n.seen("model/register")) >= 2)
    assert worker.registrar.last_error == ""

    NodeClient(node.url).unregister_model("P", "Chat", "c-1")
    node.wait_for(lambda n: n.cids() == ["c-1"])


# ----- the web process


def test_one_good_probe_suffices_at_the_start_then_three_bad_and_two_good_count() -> None:
    watch = WebWatch()
    assert [seen(watch, good) for good in (False, True)] == [False, True]
    assert [seen(watch, good) for good in (False, False, True, False, False, False)] == [True] * 5 + [False]
    assert [seen(watch, good) for good in (True, False, True, True)] == [False] * 3 + [True]


def seen(watch: WebWatch, good: bool) -> bool:
    watch.add("" if good else "away")
    assert watch.error == ("" if watch.up else "away")
    return watch.up


def test_it_waits_for_the_web_process_and_follows_it_down_and_up(node: StandInNode, worker: Worker) -> None:
    worker.web = False
    worker.serve()
    worker.wait_for(lambda w: w.probes >= 3)
    assert not node.seen("model/register")
    assert worker.shown[-1] == (False, "nobody is there")

    worker.web = True
    node.wait_for(lambda n: n.cids() == ["c-1"])
    worker.wait_for(lambda w: w.shown[-1] == (True, ""))
    worker.web = False
    node.wait_for(lambda n: not n.cids())
    worker.wait_for(lambda w: w.shown[-1] == (False, "nobody is there"))
    worker.web = True
    node.wait_for(lambda n: n.cids() == ["c-1"])


def test_a_single_failed_probe_changes_nothing(node: StandInNode, worker: Worker) -> None:
    worker.serve()
    worker.wait_for(is_registered)
    before = len(node.seen("model/unregister"))

    probes = worker.probes
    worker.fail_next = True
    worker.wait_for(lambda w: w.probes > probes + 5)
    assert not worker.fail_next

    assert len(node.seen("model/unregister")) == before


def test_while_the_model_loads_a_missing_web_process_is_no_error(worker: Worker) -> None:
    worker.web = False
    worker.registrar.start()
    worker.wait_for(lambda w: w.probes >= 3)
    assert worker.registrar.last_error == ""


# ----- the end


@pytest.mark.parametrize("mode", ["ok", "slow", "refusing", "old", "down"])
def test_drain_takes_two_seconds_at_most_and_nothing_is_registered_afterwards(
    node: StandInNode, worker: Worker, mode: str
) -> None:
    worker.serve()
    worker.wait_for(is_registered)
    if mode == "down":
        node.stop()
    else:
        node.behave(mode, delay_s=3600, code=5000)  # type: ignore[arg-type]

    started = time.monotonic()
    removed = worker.registrar.drain()
    assert time.monotonic() - started < 15

    assert removed == (mode == "ok")
    assert worker.registrar.maybe_registered == (mode != "ok")
    worker.registrar.set_serving(True)
    worker.registrar.lease_was_lost()
    if mode == "down":
        node.start()
    node.behave("ok")
    if mode != "slow":
        # the call is repeated while the process lives
        node.wait_for(lambda n: not n.cids())
        worker.wait_for(lambda w: not w.registrar.maybe_registered)
    assert len(node.seen("model/register")) == 1


def test_drain_during_a_register_that_the_node_answers_slowly(node: StandInNode, hasty: Worker) -> None:
    worker = hasty
    node.behave("slow", delay_s=1.5)
    worker.serve()
    # the second try is under way, with patience
    worker.wait_for(lambda w: "did not answer" in w.registrar.last_error)

    started = time.monotonic()
    worker.registrar.drain()
    assert time.monotonic() - started < 15

    node.behave("ok")
    worker.wait_for(lambda w: not w.registrar.maybe_registered)
    assert node.cids() == []


def test_drain_before_start_and_twice_is_harmless(node: StandInNode, worker: Worker) -> None:
    worker.registrar.drain()
    worker.serve()
    assert worker.registrar.drain()
    assert worker.registrar.drain()
    assert not node.seen("model/register")


def test_an_abandoned_entry_stays_for_its_new_owner(node: StandInNode, worker: Worker) -> None:
    worker.serve()
    worker.wait_for(is_registered)

    worker.registrar.abandon()

    assert worker.registrar.drain()
    assert node.cids() == ["c-1"]


def test_abandoned_during_a_call_it_ignores_the_result(node: StandInNode, worker: Worker) -> None:
    worker.serve()
    worker.wait_for(is_registered)
    before = len(node.seen("model/unregister"))
    node.behave("slow", delay_s=0.5)
    calls = len(node.calls)
    worker.registrar.lease_was_lost()
    node.wait_for(lambda n: len(n.calls) > calls)

    worker.registrar.abandon()
    assert worker.registrar._thread is not None
    worker.registrar._thread.join(60)

    assert not worker.registrar.maybe_registered
    assert worker.registrar.drain()
    assert len(node.seen("model/unregister")) == before


# ----- taking turns


def test_calls_wait_for_their_turn(node: StandInNode, client: RedisClient, keys: Keys) -> None:
    lock = NodeLock(client, keys, node.url, "host-1")
    with lock.turn() as mine:
        assert mine
        with lock.turn(wait_s=0.2) as second:
            assert not second
        worker = Worker(node, lock.turn).serve()
        worker.wait_for(lambda w: w.probes > 2)
        assert not node.calls

    worker.wait_for(is_registered)
    worker.registrar.abandon()


def test_drain_does_not_wait_for_its_turn(node: StandInNode, client: RedisClient, keys: Keys) -> None:
    lock = NodeLock(client, keys, node.url, "host-1")
    worker = Worker(node, lock.turn, timing=replace(QUICK, drain_s=15)).serve()
    worker.wait_for(is_registered)

    with lock.turn():
        assert worker.registrar.drain()

    assert node.cids() == []


def test_without_redis_it_calls_without_the_lock(
    node: StandInNode, redis_server: RedisServer, keys: Keys
) -> None:
    client = redis_server.client()
    redis_server.kill()
    try:
        worker = Worker(node, NodeLock(client, keys, node.url, "host-1").turn).serve()
        worker.wait_for(is_registered)
        assert worker.registrar.drain()
    finally:
        redis_server.start()
        client.close()
