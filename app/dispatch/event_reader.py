"""Reads the events of one request, until it is finished, fails, is too late or has no client any more."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

from redis.exceptions import RedisError

from app.dispatch.timings import Timings
from protocol.errors import (
    Cancelled,
    CancelledByOperator,
    DeadlineExceeded,
    Interrupted,
    ServiceError,
    ShuttingDown,
    from_code,
)
from protocol.event_router import Inbox
from protocol.events import Event, Failed, Finished

CHECK_S = 1.0
"""How often a request checks its client, its deadline and this process."""
DEADLINE_GRACE_S = 2.0
"""Time for the worker to end a request at its deadline with a proper last event, before this side ends it."""
DRAIN_STREAMS_S = 18.0
"""Time after SIGTERM for running requests; gunicorn kills the process after `graceful_timeout`, 27 s."""


class Client(Protocol):
    """The client that waits for a response (app.http.connection.Connection)."""

    def disconnected(self) -> bool:
        """Whether the client has closed its connection, so that nobody will read the response."""


class Reader(Protocol):
    """The part of EventReader that a response needs. Others join several, or end at a deadline."""

    finished: bool

    def next_events(self) -> list[Event]: ...


class EventReader:
    """The event stream of one request. It has one reader, which must call `close`.

    It is read by plain calls instead of generators: thousands of streams wait in `next_events` at once, and
    each generator in between would keep a frame and half a kilobyte of C stack for every one of them
    (docs/adr/0007-open-streams.md).
    """

    __slots__ = (
        "_cancelled_by_operator",
        "_check_at",
        "_client",
        "_draining_for_s",
        "_ends_at",
        "_failure",
        "_inbox",
        "_on_close",
        "finished",
        "timings",
    )

    def __init__(
        self,
        inbox: Inbox,
        client: Client,
        *,
        ends_at: float,
        draining_for_s: Callable[[], float],
        on_close: Callable[[Inbox, bool], None],
        cancelled_by_operator: Callable[[str], bool],
        timings: Timings | None = None,
    ) -> None:
        """`ends_at`: deadline, monotonic seconds. `on_close` gets the inbox and `finished`.

        `cancelled_by_operator` gets the request id and may raise redis.RedisError. `timings`: those that
        began with the request; they are noted here.
        """
        self._inbox = inbox
        self._client = client
        self._ends_at = ends_at
        self._draining_for_s = draining_for_s
        self._on_close = on_close
        self._cancelled_by_operator = cancelled_by_operator
        self._check_at = time.monotonic() + CHECK_S
        self._failure: Failed | None = None
        self.timings = timings or Timings()
        self.finished = False
        """True after the batch that ended with a Finished event."""

    def next_events(self, wait_s: float = CHECK_S) -> list[Event]:
        """Return the events since the last call, in order; an empty list after `wait_s` of silence.

        Raises a ServiceError once every event before it was returned: the request failed (the error that its
        Failed event names), DeadlineExceeded, ShuttingDown, or Cancelled when the client has disconnected.
        """
        now = time.monotonic()
        # a terminal event that has already arrived wins over an expired deadline
        if now >= self._check_at and not self._inbox.ended:
            self._check_at = now + CHECK_S
            self._check(now)
        batch = self._inbox.next_events(wait_s) if self._failure is None else []
        self.timings.note(batch)
        last = batch[-1] if batch else None
        if isinstance(last, Failed):
            self._failure = last
            batch.pop()
        if self._failure is not None and not batch:
            raise self._error(self._failure)
        self.finished = isinstance(last, Finished)
        return batch

    @property
    def incomplete(self) -> bool:
        """Whether an event is missing before some that have arrived."""
        return self._inbox.gap_since is not None

    @property
    def request_id(self) -> str:
        """The id of the request."""
        return self._inbox.request_id

    def make_resumable(self, reader: str, on_close: Callable[[Inbox, bool], None]) -> None:
        """Call this `on_close` from now on. `reader`: the name of this one (protocol.resumable_streams)."""
        self._inbox.reader = reader
        self._on_close = on_close

    def close(self) -> None:
        """Stop listening, and cancel the request unless it is finished. May be called more than once."""
        self.timings.end(finished=self.finished)
        self._on_close(self._inbox, self.finished)

    def __iter__(self) -> Iterator[list[Event]]:
        """Iterate over all batches until the request is finished."""
        while not self.finished:
            yield self.next_events()

    def _error(self, failure: Failed) -> ServiceError:
        """The error that a Failed event names.

        A worker also cancels the requests of a web process whose lease has expired. When that was a pause of
        this process, the client is still there, and did not cancel anything.
        """
        if failure.code == Cancelled.code and not self._client.disconnected():
            with suppress(RedisError):
                if self._cancelled_by_operator(self._inbox.request_id):
                    return CancelledByOperator()
            return Interrupted()
        return from_code(failure.code, failure.message, failure.param)

    def _check(self, now: float) -> None:
        if self._client.disconnected():
            raise Cancelled
        if now >= self._ends_at + DEADLINE_GRACE_S:
            raise DeadlineExceeded
        if self._draining_for_s() > DRAIN_STREAMS_S:
            raise ShuttingDown
