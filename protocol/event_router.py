"""The web's half of the event stream: one subscription for the whole process, handed out to the requests that wait.

Pub/sub may lose a message without telling (redis-py resubscribes silently, and the lost one may be the last), so what
counts is the sequence number: the next one passes, doubles are dropped, and a gap or silence is filled from the replay
list by whoever calls `feed` with what it read there (app.dispatch.monitor).
"""

import logging
import threading
import time
from contextlib import suppress

from redis.exceptions import RedisError

from protocol import events
from protocol.connections import RedisClient
from protocol.events import Envelope, Event
from protocol.names import Keys

log = logging.getLogger(__name__)

POLL_S = 1.0
PING_AFTER_S = 5.0
RECONNECT_PAUSE_S = 0.5


class Inbox:
    """One waiting request: its events in order, and what is known of the worker that has it.

    Attributes are read and written by the patrol too; `admitted` is Redis time, the others are monotonic seconds.
    """

    __slots__ = (
        "_arrival",
        "_arrived",
        "admitted",
        "ended",
        "expires_s",
        "gap_since",
        "incarnation_id",
        "last_event_at",
        "model",
        "next_seq",
        "orphan_since",
        "request_id",
        "resent",
    )

    def __init__(self, request_id: str, model: str) -> None:
        self.request_id = request_id
        self.model = model
        self.admitted = 0.0
        self.expires_s = 0.0
        self.next_seq = 0
        # a queue of the standard library takes 2 KB more, a deque 700 bytes, and thousands of streams are open at once
        self._arrived: list[Event] = []
        self._arrival = threading.Lock()
        self._arrival.acquire()
        self.incarnation_id: str | None = None
        self.last_event_at = time.monotonic()
        self.gap_since: float | None = None
        self.orphan_since: float | None = None
        self.resent = False
        self.ended = False

    def feed(self, envelope: Envelope) -> None:
        """Take an envelope from the channel or the replay list, whatever the order they come in."""
        if self.ended or envelope.seq < self.next_seq:
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
        """End the request from this side, unless it has ended; whatever a worker still says of it is dropped."""
        if self.ended:
            return
        self.ended = True
        self._put(failure)

    def take(self, timeout_s: float) -> list[Event]:
        """Everything that has come, in order, a terminal event last; waits up to `timeout_s` for the first. One reader.

        May be empty before that time: what wakes it may have been taken already.
        """
        if not self._arrived:
            self._arrival.acquire(timeout=timeout_s)
        gained = self._arrived[:]
        # not all: another may have been appended meanwhile
        del self._arrived[: len(gained)]
        return gained

    def _put(self, event: Event) -> None:
        self._arrived.append(event)
        # released by an event before this one, which nobody has taken yet
        with suppress(RuntimeError):
            self._arrival.release()


class EventRouter(threading.Thread):
    """Reads this process's channel for as long as it lives and feeds the inboxes."""

    def __init__(self, client: RedisClient, keys: Keys, web_id: str) -> None:
        super().__init__(name="event-router", daemon=True)
        self._redis = client
        self._channel = keys.channel(web_id)
        self._inboxes: dict[str, Inbox] = {}
        self._stopping = False
        self.subscribed = threading.Event()

    def open(self, request_id: str, model: str) -> Inbox:
        """Begin to listen for a request; must come before it is queued."""
        inbox = self._inboxes[request_id] = Inbox(request_id, model)
        return inbox

    def close(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)

    def inboxes(self) -> list[Inbox]:
        """The requests that wait now."""
        return list(self._inboxes.values())

    def stop(self) -> None:
        """End the thread, at the latest after a poll."""
        self._stopping = True
        self.join(2 * POLL_S)

    def run(self) -> None:
        while not self._stopping:
            try:
                self._listen()
            except RedisError as error:
                log.warning("event channel lost: %s", error)
            except Exception:
                # without this thread the process is deaf: whatever a client library does, listen again
                log.exception("event channel broken")
            self.subscribed.clear()
            if not self._stopping:
                time.sleep(RECONNECT_PAUSE_S)

    def _listen(self) -> None:
        with self._redis.pubsub() as pubsub:
            pubsub.subscribe(self._channel)
            heard_at = time.monotonic()
            while not self._stopping:
                message = pubsub.get_message(timeout=POLL_S)
                if message is not None:
                    heard_at = time.monotonic()
                elif time.monotonic() - heard_at >= PING_AFTER_S:
                    # a peer that vanished without a FIN shows only when it is spoken to
                    pubsub.ping()
                    heard_at = time.monotonic()
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    self.subscribed.set()
                elif message["type"] == "message":
                    self._dispatch(message["data"])

    def _dispatch(self, data: bytes) -> None:
        for envelope in events.decode_batch(data):
            if inbox := self._inboxes.get(envelope.request_id):
                inbox.feed(envelope)
