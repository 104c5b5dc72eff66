"""The two halves of the event stream on a real Redis: order, duplicates, gaps, repeated writes."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import redis

from protocol import events
from protocol.errors import WorkerLost
from protocol.event_router import EventRouter, Inbox
from protocol.event_sender import MESSAGE_LIMIT, EventSender
from protocol.events import Delta, Envelope, Event, Failed, Finished, Started, Text, Usage
from protocol.names import Keys
from tests.deployment import wait_until

WEB = "web-1"


Ends = queue.SimpleQueue[Event | None]
"""What the sender said of one request's end."""


@pytest.fixture
def ends() -> Ends:
    return queue.SimpleQueue()


def ignore_end(event: Event | None) -> None:
    """For requests whose end a test doesn't look at."""


@pytest.fixture
def sender(redis_client: Any, keys: Keys) -> Iterator[EventSender]:
    sender = EventSender(redis_client, keys, prepare=lambda event: event)
    sender.start()
    yield sender
    sender.stop(5)


@pytest.fixture
def router(redis_client: Any, keys: Keys) -> Iterator[EventRouter]:
    router = EventRouter(redis_client, keys, WEB)
    router.start()
    assert router.subscribed.wait(30)
    yield router
    router.stop()


def read(inbox: Inbox, count: int) -> list[Event]:
    """Return the next `count` events."""
    found: list[Event] = []
    give_up_at = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < give_up_at, f"{len(found)} of {count} events came"
        found += inbox.next_events(1)
    return found


def test_events_arrive_in_order_and_are_in_the_replay_list(
    sender: EventSender, router: EventRouter, redis_client: Any, keys: Keys, ends: Ends
) -> None:
    inbox = router.open("r", "m")
    sender.open("r", WEB, 100, ends.put)
    told: list[Event] = [
        Started("cid:incarnation_id"),
        *(Delta(f"{n} ") for n in range(50)),
        Finished(Usage(1, 50)),
    ]
    for event in told:
        sender.emit([("r", event)])
    assert read(inbox, len(told)) == told
    assert inbox.incarnation_id == "cid:incarnation_id"
    assert inbox.ended
    replay = events.decode_readable(redis_client.lrange(keys.replay("r"), 0, -1))
    assert replay == [Envelope("r", seq, event) for seq, event in enumerate(told)]
    assert 0 < redis_client.ttl(keys.replay("r")) <= 100
    assert ends.get(timeout=30) == told[-1]


def test_requests_of_two_web_processes_are_kept_apart(
    sender: EventSender, router: EventRouter, redis_client: Any, keys: Keys
) -> None:
    other = EventRouter(redis_client, keys, "web-2")
    other.start()
    assert other.subscribed.wait(30)
    mine, theirs = router.open("a", "m"), other.open("b", "m")
    sender.open("a", WEB, 100, ignore_end)
    sender.open("b", "web-2", 100, ignore_end)
    sender.emit([("a", Delta("A")), ("b", Delta("B")), ("unknown", Delta("dropped"))])
    assert read(mine, 1) == [Delta("A")]
    assert read(theirs, 1) == [Delta("B")]
    other.stop()


def test_duplicates_are_dropped_and_a_gap_waits_for_the_replay() -> None:
    inbox = Inbox("r", "m")
    for seq, text in ((0, "a"), (0, "a"), (2, "c"), (1, "b"), (1, "b")):
        inbox.feed(Envelope("r", seq, Delta(text)))
    assert read(inbox, 2) == [Delta("a"), Delta("b")]
    assert not inbox.next_events(0.01)
    inbox.feed(Envelope("r", 3, Delta("d")))
    assert inbox.gap_since is not None
    inbox.feed(Envelope("r", 2, Delta("c")))
    inbox.feed(Envelope("r", 3, Delta("d")))
    assert read(inbox, 2) == [Delta("c"), Delta("d")]
    assert inbox.gap_since is None


def test_nothing_passes_after_the_end() -> None:
    inbox = Inbox("r", "m")
    inbox.fail(Failed.of(WorkerLost()))
    inbox.feed(Envelope("r", 0, Delta("late")))
    assert read(inbox, 1) == [Failed.of(WorkerLost())]
    assert not inbox.next_events(0.01)


def test_a_replay_list_that_vanished_gives_the_request_up(
    sender: EventSender, router: EventRouter, redis_client: Any, keys: Keys, ends: Ends
) -> None:
    inbox = router.open("r", "m")
    sender.open("r", WEB, 100, ends.put)
    sender.emit([("r", Delta("a"))])
    read(inbox, 1)
    redis_client.delete(keys.replay("r"))
    sender.emit([("r", Delta("b"))])
    assert ends.get(timeout=30) is None
    assert not redis_client.exists(keys.replay("r")), "a list made anew would have no beginning and no TTL"


class Flaky:
    """A client whose scripts lose their answers after they were executed, a number of times."""

    def __init__(self, client: Any, failures: int) -> None:
        self._client = client
        self.failures = failures

    def register_script(self, source: str) -> Callable[..., Any]:
        script = self._client.register_script(source)

        def failing(**arguments: Any) -> Any:
            answer = script(**arguments)
            if self.failures:
                self.failures -= 1
                raise redis.TimeoutError("the answer was lost")
            return answer

        return failing


def test_a_write_whose_answer_was_lost_is_repeated_and_read_once(
    router: EventRouter, redis_client: Any, keys: Keys, ends: Ends
) -> None:
    sender = EventSender(cast(Any, Flaky(redis_client, 3)), keys, prepare=lambda event: event)
    sender.start()
    inbox = router.open("r", "m")
    sender.open("r", WEB, 100, ends.put)
    sender.emit([("r", Delta("a"))])
    sender.emit([("r", Delta("b")), ("r", Finished())])
    assert read(inbox, 3) == [Delta("a"), Delta("b"), Finished()]
    assert ends.get(timeout=30) == Finished()
    assert not inbox.next_events(0.01)
    assert redis_client.llen(keys.replay("r")) > 3, "no write was repeated: the test tests nothing"
    sender.stop(5)


def test_emit_never_waits_for_redis(keys: Keys, ends: Ends) -> None:
    blocked, release = threading.Event(), threading.Event()

    class Stalled:
        def register_script(self, source: str) -> Callable[..., Any]:
            def stalled(**arguments: Any) -> Any:
                blocked.set()
                release.wait(60)
                raise redis.ConnectionError("gone")

            return stalled

    sender = EventSender(cast(Any, Stalled()), keys, prepare=lambda event: event)
    sender.start()
    sender.open("r", WEB, 100, ends.put)
    sender.emit([("r", Delta("a"))])
    assert blocked.wait(30)
    done = threading.Event()

    def emit() -> None:
        sender.emit([("r", Delta("b"))])
        done.set()

    threading.Thread(target=emit, daemon=True).start()
    assert done.wait(30)
    release.set()
    sender.stop(5)


def test_what_has_ended_can_not_fail_any_more() -> None:
    inbox = Inbox("r", "model")
    inbox.feed(Envelope("r", 0, Finished(None)))
    inbox.fail(Failed.of(WorkerLost()))
    assert inbox.next_events(0) == [Finished(None)]


def test_what_an_acl_forbids_is_given_up_at_once(
    keys: Keys, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.event_sender.RESEND_S", 60)

    class Forbidden:
        def register_script(self, source: str) -> Callable[..., Any]:
            def refused(**arguments: Any) -> Any:
                raise redis.exceptions.NoPermissionError("no permissions to run this command")

            return refused

    sender = EventSender(cast(Any, Forbidden()), keys, prepare=lambda event: event)
    sender.start()
    sender.open("r", WEB, 100, ends.put)
    sender.emit([("r", Delta("a"))])
    assert ends.get(timeout=30) is None
    sender.stop(5)


def test_an_event_of_another_version_does_not_keep_back_the_others(caplog: pytest.LogCaptureFixture) -> None:
    known = Envelope("mine", 3, Delta("text"))
    unknown = b'["other",0,["thinking","hm"]]'
    message = b"[" + unknown + b"," + events.encode(known) + b"]"
    for _ in range(3):
        assert events.decode_batch(message) == [known]
    assert events.decode_readable([unknown, events.encode(known), b"not JSON"]) == [known]
    assert caplog.text.count("'thinking'") <= 1


class SilentChannel:
    """A subscription that takes everything and answers nothing, as on a half-open connection."""

    def __init__(self, answers: bool) -> None:
        self.answers = answers
        self.pings = 0
        self.subscriptions = 0
        self._messages: list[dict[str, Any]] = []

    def pubsub(self) -> "SilentChannel":
        return self

    def __enter__(self) -> "SilentChannel":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def subscribe(self, channel: str) -> None:
        self.subscriptions += 1
        self._messages.append({"type": "subscribe"})

    def ping(self) -> None:
        self.pings += 1
        if self.answers:
            self._messages.append({"type": "pong", "data": b""})

    def get_message(self, timeout: float) -> dict[str, Any] | None:
        time.sleep(0.001)
        return self._messages.pop(0) if self._messages else None


@pytest.mark.parametrize("answers", [False, True])
def test_a_channel_that_does_not_answer_a_ping_is_made_anew(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    for name in ("PING_AFTER_S", "PONG_S", "RECONNECT_PAUSE_S"):
        monkeypatch.setattr(f"protocol.event_router.{name}", 0.02)
    channel = SilentChannel(answers)
    router = EventRouter(cast(Any, channel), keys, WEB)
    router.start()
    wait_until(lambda: channel.pings >= 5, timeout_s=30, what="the silent channel is pinged")
    router.stop()
    assert (channel.subscriptions > 1) is not answers


def test_very_large_events_are_in_the_replay_list_alone(
    sender: EventSender, router: EventRouter, redis_client: Any, keys: Keys, ends: Ends
) -> None:
    """Redis closes a subscription on which 32 MiB wait."""
    large, small = router.open("large", "m"), router.open("small", "m")
    for name in ("large", "small"):
        sender.open(name, WEB, 100, ends.put)
    text = Text("a" * (MESSAGE_LIMIT // 2))
    told: list[Event] = [Started("w"), text, text, Finished()]
    sender.emit([*(("large", event) for event in told), ("small", Delta("b"))])
    assert read(small, 1) == [Delta("b")]
    assert read(large, 2) == told[:2]
    assert large.gap_since is not None, "the end shows that an event is missing"
    entries = redis_client.lrange(keys.replay("large"), 0, -1)
    replay = [envelope.event for envelope in events.decode_readable(entries)]
    assert replay == told


class Gone:
    """A Redis that no write reaches."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def register_script(self, source: str) -> Callable[..., Any]:
        def refused(**arguments: Any) -> Any:
            self.asked.set()
            raise redis.ConnectionError("gone")

        return refused


def test_events_that_no_write_delivers_are_given_up(
    keys: Keys, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.event_sender.RESEND_S", 0.05)
    sender = EventSender(cast(Any, Gone()), keys, prepare=lambda event: event)
    sender.start()
    sender.open("r", WEB, 100, ends.put)
    sender.emit([("r", Delta("a"))])
    assert ends.get(timeout=30) is None
    sender.stop(5)


def test_more_events_than_fit_are_given_up_before_the_time(
    keys: Keys, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.event_sender.RESEND_S", 600)
    monkeypatch.setattr("protocol.event_sender.PENDING_LIMIT", 10)
    gone = Gone()
    sender = EventSender(cast(Any, gone), keys, prepare=lambda event: event)
    sender.start()
    sender.open("r", WEB, 100, ends.put)
    sender.emit([("r", Delta("a"))])
    assert gone.asked.wait(30)
    for _ in range(20):
        sender.emit([("r", Delta("a"))])
    assert ends.get(timeout=30) is None
    sender.stop(5)
