"""app.dispatch.monitor and app.dispatch.heartbeat against a real Redis: requests for which no events arrive.

The tests call `tick` instead of waiting for the thread, and set times of a request back instead of waiting.
"""

import threading
from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from app.dispatch.activity import Activity
from app.dispatch.heartbeat import WebHeartbeat
from app.dispatch.monitor import GAP_LIMIT_S, ORPHAN_S, SILENCE_S, UNSERVED_S, RequestMonitor
from app.dispatch.worker_view import WorkerView
from config import Settings
from protocol import events
from protocol.celery_app import create_celery
from protocol.event_router import EventRouter, Inbox
from protocol.event_sender import EventSender
from protocol.events import Delta, Envelope, Event, Failed, Finished, Started, Text, Usage
from protocol.jobs import ChatJob, SamplingParams
from protocol.leases import Leases
from protocol.names import Keys
from protocol.open_requests import OpenRequests
from protocol.queue import JobQueue
from tests.deployment import RedisServer, wait_until
from tests.records import worker_record

MODEL = "m"
WEB = "web"
WORKER = "gpu0:first"
"""Incarnation id of a worker whose cid is gpu0."""
ANSWER: list[Event] = [
    Started(WORKER),
    Delta("one"),
    Delta("two", finish_reason="stop"),
    Finished(Usage(1, 2)),
]


class Web:
    """The parts of a web process that the heartbeat uses. The router is not started: nothing is published."""

    def __init__(self, server: RedisServer, keys: Keys) -> None:
        self.redis: Any = server.client
        self.keys = keys
        celery = create_celery(Settings(redis_url=server.url), keys)
        self.queue = JobQueue(self.redis, keys, celery, claim_ttl_s=100)
        self.leases = Leases(self.redis, keys)
        self.router = EventRouter(self.redis, keys, WEB)
        self.worker_view = WorkerView(self.leases)
        self.activity = Activity(self.redis, keys, [MODEL])
        self.heartbeat = self.new_heartbeat()

    def new_heartbeat(self, kind: type[WebHeartbeat] = WebHeartbeat) -> WebHeartbeat:
        monitor = RequestMonitor(self.redis, self.keys, self.worker_view, self.router, self.queue)
        return kind(
            WEB,
            self.leases,
            self.worker_view,
            self.queue,
            self.activity,
            monitor,
            gap_seen=self.router.gap_seen,
            publish_metrics=lambda: None,
        )

    def request(self, name: str = "r") -> Inbox:
        """An admitted and queued request that has been silent for long enough to be checked."""
        inbox = self.router.open(name, MODEL)
        job = ChatJob(id=name, model=MODEL, messages=[], sampling=SamplingParams())
        inbox.admitted = self.queue.admit(job, web_id=WEB, deadline_s=60, max_waiting=9)
        inbox.last_event_at -= SILENCE_S
        return inbox

    def running(self, name: str = "r") -> Inbox:
        """A silent request that WORKER has claimed and started."""
        inbox = self.request(name)
        self.lease(WORKER)
        self.pop()
        assert self.queue.claim(name, MODEL, WORKER) is not None
        inbox.feed(Envelope(name, 0, Started(WORKER)))
        assert inbox.next_events(0) == [Started(WORKER)]
        inbox.last_event_at -= SILENCE_S
        return inbox

    def lease(self, incarnation_id: str, state: str = "ready") -> None:
        """Renew the lease of a worker with this incarnation id."""
        record = worker_record(
            incarnation_id.partition(":")[0], incarnation_id=incarnation_id, model=MODEL, state=state
        )
        self.leases.seize_worker(record)

    def write(self, name: str, *envelopes: Envelope) -> None:
        """Append to a replay list, as a worker does."""
        self.redis.rpush(self.keys.replay(name), *map(events.encode, envelopes))

    def queued(self) -> int:
        """How many messages the model's queue has."""
        return int(self.redis.llen(self.keys.queue_list(MODEL)))

    def pop(self) -> None:
        """Take a message from the queue, as a worker does that then claims it, or stops before that."""
        assert self.redis.rpop(self.keys.queue_list(MODEL))


@pytest.fixture
def web(redis_server: RedisServer, keys: Keys) -> Web:
    return Web(redis_server, keys)


def envelopes(name: str, *seqs: int) -> list[Envelope]:
    return [Envelope(name, seq, ANSWER[seq]) for seq in seqs]


def failure(inbox: Inbox) -> Failed:
    """The failure that ends a request."""
    [event] = inbox.next_events(0)
    assert isinstance(event, Failed) and inbox.ended
    return event


def test_a_gap_is_filled_from_the_replay_list_which_may_have_duplicates(web: Web) -> None:
    inbox = web.running()
    for envelope in envelopes("r", 2, 3):
        inbox.feed(envelope)
    assert inbox.gap_since is not None and inbox.next_events(0) == []
    web.write("r", *envelopes("r", 0, 1, 0, 1, 2, 3))
    web.heartbeat.tick()
    assert inbox.next_events(0) == ANSWER[1:]
    assert inbox.ended and inbox.gap_since is None


def test_a_silent_request_gets_the_events_whose_messages_were_lost(web: Web) -> None:
    inbox, other = web.running(), web.running("other")
    web.write("r", *envelopes("r", 0, 1))
    web.heartbeat.tick()
    assert inbox.next_events(0) == [Delta("one")] and not inbox.ended
    assert other.next_events(0) == [] and not other.ended


def test_a_gap_that_stays_open_fails_the_request(web: Web) -> None:
    inbox = web.running()
    inbox.feed(Envelope("r", 2, ANSWER[2]))
    web.heartbeat.tick()
    assert not inbox.ended, "the missing event may still come"
    assert inbox.gap_since is not None
    inbox.gap_since -= GAP_LIMIT_S
    web.heartbeat.tick()
    assert failure(inbox) == Failed(
        "queue_unavailable", "a part of the response was lost; send the request again"
    )


def test_a_pause_of_the_web_process_fails_no_request(web: Web) -> None:
    """A gap or a silence that was short before the pause has become long, and the worker's lease has
    expired."""
    silent, with_gap = web.running("silent"), web.running("with gap")
    web.heartbeat.tick()
    with_gap.feed(Envelope("with gap", 2, ANSWER[2]))
    assert with_gap.gap_since is not None
    for inbox in (silent, with_gap):
        inbox.last_event_at -= 60
    with_gap.gap_since -= 60
    web.redis.delete(web.keys.lease("gpu0"))
    web.write("with gap", *envelopes("with gap", 0, 1, 2))
    web.heartbeat.tick()
    assert with_gap.next_events(0) == ANSWER[1:3] and not with_gap.ended
    assert silent.next_events(0) == [] and not silent.ended


def test_a_request_whose_claim_is_lost_fails(web: Web) -> None:
    inbox = web.running()
    web.redis.delete(web.keys.claim("r"))
    web.heartbeat.tick()
    found = failure(inbox)
    assert found.code == "queue_unavailable" and "while this request was running" in found.message


@pytest.mark.parametrize("started", [True, False], ids=["started", "claimed only"])
def test_a_request_whose_worker_is_lost_fails(web: Web, started: bool) -> None:
    inbox = web.running()
    if not started:
        inbox.incarnation_id = None
    web.heartbeat.tick()
    assert not inbox.ended
    web.lease("gpu0:second")
    web.heartbeat.tick()
    assert failure(inbox).code == "worker_lost"


def test_a_request_whose_job_is_lost_fails(web: Web) -> None:
    inbox = web.request()
    web.redis.delete(web.keys.job("r"))
    web.heartbeat.tick()
    found = failure(inbox)
    assert found.code == "queue_unavailable" and "while this request was waiting" in found.message


def test_a_waiting_request_that_an_operator_cancels_fails_without_being_lost(web: Web) -> None:
    inbox, other = web.request(), web.request("other")
    assert OpenRequests(web.redis, web.keys, mark_ttl_s=100).cancel("r", [MODEL])
    web.lease(WORKER)
    web.heartbeat.tick()
    assert failure(inbox).code == "cancelled"
    assert not other.ended


def test_a_request_that_its_worker_has_given_up_fails(web: Web) -> None:
    inbox = web.running()
    web.queue.end("r", MODEL)
    web.heartbeat.tick()
    found = failure(inbox)
    assert found.code == "queue_unavailable" and "could not deliver" in found.message


def test_a_request_fails_when_an_event_can_not_be_read_and_no_other_does(web: Web) -> None:
    inbox, other = web.running(), web.running("other")
    started, second = envelopes("r", 0, 2)
    web.write("r", started)
    web.redis.rpush(web.keys.replay("r"), b'["r",1,["new-event",1]]', events.encode(second))
    web.write("other", *envelopes("other", 0, 1))
    web.heartbeat.tick()
    assert other.next_events(0) == [Delta("one")]
    assert inbox.gap_since is not None
    inbox.gap_since -= GAP_LIMIT_S + 1
    web.heartbeat.tick()
    assert "a part of the response was lost" in failure(inbox).message and not other.ended


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def unserved(web: Web, state: str) -> Inbox:
    """A waiting request whose model's only worker has had `state` for longer than UNSERVED_S."""
    clock = Clock()
    web.worker_view = WorkerView(web.leases, clock)
    web.heartbeat = web.new_heartbeat()
    web.lease(WORKER)
    inbox = web.request()
    web.heartbeat.tick()
    web.lease(WORKER, state)
    for _ in range(int(UNSERVED_S)):
        web.heartbeat.tick()
        assert not inbox.ended
        clock.now += 1
    web.heartbeat.tick()
    return inbox


def test_a_waiting_request_fails_when_its_model_has_no_worker_any_more(web: Web) -> None:
    assert failure(unserved(web, "draining")).code == "no_worker"


def test_a_waiting_request_is_kept_while_a_worker_loads(web: Web) -> None:
    assert not unserved(web, "loading").ended


def test_a_redis_that_refuses_writes_is_noticed_and_requests_are_checked(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = web.running()
    web.lease("gpu0:second")

    def refuse(web_id: str) -> None:
        raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")

    assert not web.heartbeat.refusal
    monkeypatch.setattr(web.leases, "renew_web", refuse)
    web.heartbeat.tick()
    assert "maxmemory" in web.heartbeat.refusal
    assert failure(inbox).code == "worker_lost"
    monkeypatch.undo()
    web.heartbeat.tick()
    assert not web.heartbeat.refusal


def test_a_terminal_event_in_the_replay_list_wins_over_a_lost_worker(web: Web) -> None:
    inbox = web.running()
    web.write("r", *envelopes("r", 0, 1, 2, 3))
    web.lease("gpu0:second")
    web.heartbeat.tick()
    assert inbox.next_events(0) == ANSWER[1:]


def test_a_request_with_new_events_in_the_replay_list_is_not_failed_before_they_are_read(web: Web) -> None:
    inbox = web.running()
    web.write("r", *envelopes("r", 0, 1))
    web.lease("gpu0:second")
    web.heartbeat.tick()
    assert inbox.next_events(0) == [Delta("one")] and not inbox.ended
    inbox.last_event_at -= SILENCE_S
    web.heartbeat.tick()
    assert failure(inbox).code == "worker_lost"


def test_nothing_happens_to_a_silent_request_whose_worker_lives(web: Web) -> None:
    inbox = web.running()
    for _ in range(3):
        web.heartbeat.tick()
    assert inbox.next_events(0) == [] and not inbox.ended
    assert web.queued() == 0 and inbox.orphan_since is None


def test_a_request_that_hears_events_is_not_checked(web: Web) -> None:
    inbox = web.running()
    inbox.last_event_at += SILENCE_S
    web.redis.delete(web.keys.claim("r"), web.keys.job("r"))
    web.write("r", *envelopes("r", 0, 1))
    web.heartbeat.tick()
    assert inbox.next_events(0) == [] and not inbox.ended


def test_a_request_that_is_not_admitted_yet_is_not_checked(web: Web) -> None:
    inbox = web.router.open("r", MODEL)
    inbox.last_event_at -= SILENCE_S
    web.heartbeat.tick()
    assert inbox.next_events(0) == [] and not inbox.ended


def test_an_id_that_a_worker_took_without_claiming_it_is_sent_again_once(web: Web) -> None:
    inbox = web.request()
    web.pop()
    for _ in range(2):
        web.heartbeat.tick()
        assert web.queued() == 0, "a worker may be about to claim it"
    assert inbox.orphan_since is not None
    inbox.orphan_since -= ORPHAN_S
    web.heartbeat.tick()
    assert web.queued() == 1 and inbox.resent
    web.pop()
    web.heartbeat.tick()
    assert web.queued() == 0 and not inbox.ended


def test_an_id_is_sent_again_when_a_younger_request_was_claimed_before_it(web: Web) -> None:
    older, _younger, _youngest = web.request("older"), web.request("younger"), web.request("youngest")
    web.pop()
    web.pop()
    web.lease(WORKER)
    assert web.queue.claim("younger", MODEL, WORKER) is not None
    web.heartbeat.tick()
    assert older.orphan_since is not None
    older.orphan_since -= ORPHAN_S
    web.heartbeat.tick()
    assert older.resent and web.queued() == 2


def test_an_id_that_waits_in_the_queue_is_not_sent_again(web: Web) -> None:
    inbox = web.request()
    web.pop()
    web.heartbeat.tick()
    assert inbox.orphan_since is not None
    assert web.queue.send_again("r", MODEL)
    web.heartbeat.tick()
    assert inbox.orphan_since is None and not inbox.resent and web.queued() == 1


def test_replay_lists_of_finished_requests_are_deleted_and_the_lease_is_renewed(web: Web) -> None:
    web.write("r", *envelopes("r", 0, 1, 2, 3))
    web.queue.forget("r")
    web.heartbeat.tick()
    assert not web.redis.exists(web.keys.replay("r"))
    assert web.leases.living_webs([WEB]) == {WEB}


def test_the_thread_survives_a_failed_round_and_releases_the_lease_at_its_end(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.dispatch.heartbeat.INTERVAL_S", 0.01)

    class FailsOnce(WebHeartbeat):
        failed = threading.Event()

        def tick(self) -> None:
            if not self.failed.is_set():
                self.failed.set()
                raise RuntimeError("once")
            super().tick()

    heartbeat = web.new_heartbeat(FailsOnce)
    heartbeat.start()
    wait_until(lambda: web.leases.living_webs([WEB]) == {WEB}, timeout_s=30, what="the lease is renewed")
    heartbeat.stop()
    heartbeat.join(30)
    assert not heartbeat.is_alive() and web.leases.living_webs([WEB]) == set()


def test_a_gap_is_filled_at_once(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event of several MiB is in the replay list alone, and the next one shows that it is missing."""
    monkeypatch.setattr("app.dispatch.heartbeat.INTERVAL_S", 1000)
    monkeypatch.setattr("protocol.event_sender.MESSAGE_LIMIT", 1000)
    monkeypatch.setattr("protocol.event_sender.SMALL_EVENT", 100)
    ticked = threading.Event()

    class Ticks(WebHeartbeat):
        def tick(self) -> None:
            super().tick()
            ticked.set()

    heartbeat, sender = (
        web.new_heartbeat(Ticks),
        EventSender(web.redis, web.keys, prepare=lambda event: event),
    )
    inbox = web.running()
    for thread in (web.router, heartbeat, sender):
        thread.start()
    assert ticked.wait(30) and web.router.subscribed.wait(30)
    sender.open("r", WEB, 100, lambda event: None)
    told: list[Event] = [Started(WORKER), Text("a" * 2000), Finished()]
    sender.emit([("r", event) for event in told])
    wait_until(lambda: inbox.ended, timeout_s=30, what="the gap is filled before the next tick")
    assert inbox.next_events(0) == told[1:]
    heartbeat.stop()
    heartbeat.join(30)
    assert not heartbeat.is_alive(), "the end does not wait for the next tick"
    web.router.stop()
    sender.stop(5)
