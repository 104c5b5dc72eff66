"""The web's half of the event stream: one subscription for the process, an inbox for each open request.

Pub/sub can lose a message unnoticed (redis-py resubscribes silently, and the lost one may be the last), so
the sequence number decides: the next one passes and duplicates are dropped. After a gap or a silence
app.dispatch.monitor reads the replay list and feeds the inbox from there.
"""

import logging
import threading
import time
from contextlib import suppress

import redis
from redis.exceptions import RedisError

from protocol import events
from protocol.connections import RedisClient
from protocol.errors import TakenOver
from protocol.events import Envelope, Event
from protocol.names import Keys
from protocol.resumable_streams import web_of

log = logging.getLogger(__name__)

POLL_S = 1.0
"""How long a read of the channel waits, and so how late a stop is noticed."""
PING_AFTER_S = 5.0
"""A channel that is silent for so long is pinged: only a write shows that a peer vanished without a FIN."""
PONG_S = 5.0
"""A connection on which nothing arrives for so long after a ping is half open: it is closed and made
again."""
RECONNECT_PAUSE_S = 0.5


TAKEN_OVER_SEQ = -1
"""The number of the event that tells a reader, which it names, that another one has taken over its stream.
It is no part of the stream itself, and older versions drop it.
"""


def new_signal() -> threading.Lock:
    """Make what wakes the reader of an inbox, or of several: it is released when an event has arrived."""
    signal = threading.Lock()
    signal.acquire()
    return signal


class Inbox:
    """The events of one open request in order, and what is known of the worker that has it.

    The request monitor reads and writes the attributes too. `admitted` is in seconds of Redis' clock,
    `last_event_at`, `gap_since` and `orphan_since` in seconds of the monotonic clock.
    """

    __slots__ = (
        "_arrival",
        "_arrived",
        "admitted",
        "ended",
        "gap_since",
        "incarnation_id",
        "last_event_at",
        "model",
        "next_seq",
        "orphan_since",
        "reader",
        "request_id",
        "resent",
    )

    def __init__(self, request_id: str, model: str, signal: "threading.Lock | None" = None) -> None:
        self.request_id = request_id
        self.model = model
        self.admitted = 0.0
        self.next_seq = 0
        # queue.Queue takes 2 KB more, a deque 700 bytes, and thousands of streams are open at once
        self._arrived: list[Event] = []
        self._arrival = signal or new_signal()
        self.incarnation_id: str | None = None
        self.last_event_at = time.monotonic()
        self.gap_since: float | None = None
        self.orphan_since: float | None = None
        self.resent = False
        self.ended = False
        self.reader = ""
        """The name of the connection that this is for, if another one may take over
        (protocol/resumable_streams.py)."""

    def feed(self, envelope: Envelope) -> None:
        """Take an envelope from the channel or the replay list, in any order and more than once."""
        if self.ended or envelope.seq < self.next_seq:
            if envelope.seq == TAKEN_OVER_SEQ and envelope.event == _taken_over_from(self.reader):
                self.fail(events.Failed.of(TakenOver()))
            return
        if envelope.seq > self.next_seq:
            self.gap_since = self.gap_since or time.monotonic()
            return
        self.next_seq += 1
        self.gap_since = None
        self.last_event_at = time.monotonic()
        if isinstance(envelope.event, events.Started):
            self.incarnation_id = envelope.event.incarnation_id
        self.ended = events.is_terminal(envelope.event)
        self._put(envelope.event)

    def fail(self, failure: events.Failed) -> None:
        """End the request with `failure` unless it has ended; later events of a worker are dropped."""
        if self.ended:
            return
        self.ended = True
        self._put(failure)

    def next_events(self, timeout_s: float) -> list[Event]:
        """Return the events that have arrived, in order; wait up to `timeout_s` for the first.

        For one reader. A terminal event comes last. May be empty before the time is up: the event that
        wakes the reader may have been returned before, or be another inbox's.
        """
        # without time to wait the signal stays: it may be for an inbox that was looked at before
        if not self._arrived and timeout_s:
            self._arrival.acquire(timeout=timeout_s)
        batch = self._arrived[:]
        # another event may have been appended meanwhile
        del self._arrived[: len(batch)]
        return batch

    def _put(self, event: Event) -> None:
        self._arrived.append(event)
        # already released by an earlier event that was not read yet
        with suppress(RuntimeError):
            self._arrival.release()


class EventRouter(threading.Thread):
    """Reads this process's channel and feeds the inboxes, until it is stopped.

    `subscribed` is set while Redis has confirmed the subscription, `gap_seen` when an event is found missing:
    it was lost or too large to be published, and the replay list has it. Who reads it there clears
    `gap_seen`.
    """

    def __init__(self, client: RedisClient, keys: Keys, web_id: str) -> None:
        super().__init__(name="event-router", daemon=True)
        self._redis = client
        self._keys = keys
        self._channel = keys.channel(web_id)
        self._inboxes: dict[str, Inbox] = {}
        self._stopping = False
        self.subscribed = threading.Event()
        self.gap_seen = threading.Event()

    def open(self, request_id: str, model: str, signal: "threading.Lock | None" = None) -> Inbox:
        """Make the inbox of a request. Must come before it is queued, or its first events are dropped."""
        inbox = self._inboxes[request_id] = Inbox(request_id, model, signal)
        return inbox

    def close(self, inbox: Inbox) -> None:
        """Drop the events of an inbox from now on."""
        if self._inboxes.get(inbox.request_id) is inbox:
            del self._inboxes[inbox.request_id]

    def tell_taken_over(self, request_id: str, reader: str) -> None:
        """Tell the connection that has read a stream so far ("" for none) that another one has taken over.

        One of another web process may miss it, if the message is lost. Raises redis.RedisError.
        """
        inbox = self._inboxes.get(request_id)
        if inbox is not None and inbox.reader == reader:
            inbox.fail(events.Failed.of(TakenOver()))
        elif reader:
            told = Envelope(request_id, TAKEN_OVER_SEQ, _taken_over_from(reader))
            self._redis.publish(self._keys.channel(web_of(reader)), events.encode([told]))

    def inboxes(self) -> list[Inbox]:
        """Return the inboxes of all open requests."""
        return list(self._inboxes.values())

    def stop(self) -> None:
        """End the thread: it sees this after POLL_S at the latest."""
        self._stopping = True
        self.join(2 * POLL_S)

    def run(self) -> None:
        while not self._stopping:
            try:
                self._listen()
            except RedisError as error:
                log.warning("event channel lost: %s", error)
            except Exception:
                # without this thread no event reaches this process, so it must survive any error
                log.exception("reading the event channel failed")
            self.subscribed.clear()
            if not self._stopping:
                time.sleep(RECONNECT_PAUSE_S)

    def _listen(self) -> None:
        with self._redis.pubsub() as pubsub:
            pubsub.subscribe(self._channel)
            heard_at, pinged_at = time.monotonic(), None
            while not self._stopping:
                message = pubsub.get_message(timeout=POLL_S)
                now = time.monotonic()
                if message is None:
                    if pinged_at is not None and now - pinged_at >= PONG_S:
                        raise redis.TimeoutError("a ping was not answered")
                    if pinged_at is None and now - heard_at >= PING_AFTER_S:
                        pubsub.ping()
                        pinged_at = now
                    continue
                heard_at, pinged_at = now, None
                if message["type"] == "subscribe":
                    self.subscribed.set()
                elif message["type"] == "message":
                    self._dispatch(message["data"])

    def _dispatch(self, data: bytes) -> None:
        for envelope in events.decode_batch(data):
            if inbox := self._inboxes.get(envelope.request_id):
                complete = inbox.gap_since is None
                inbox.feed(envelope)
                if complete and inbox.gap_since is not None:
                    self.gap_seen.set()


def _taken_over_from(reader: str) -> events.Failed:
    """The event that tells a reader of another web process that its stream was taken over."""
    return events.Failed(TakenOver.code, TakenOver.default_message, reader)
