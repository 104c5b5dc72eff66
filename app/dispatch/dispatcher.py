"""Dispatch of a request: admit its job, queue it, read its events. Knows no HTTP bodies and no Flask."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from redis.exceptions import RedisError

from app.dispatch.request_metrics import RequestMetrics
from app.dispatch.timings import Timings
from app.dispatch.worker_view import WorkerView
from catalogue import ModelEntry, TaskSpec
from config import Settings
from protocol.connections import MAX_CONNECTIONS
from protocol.errors import (
    Cancelled,
    CancelledByOperator,
    DeadlineExceeded,
    Interrupted,
    NoWorker,
    Overloaded,
    QueueUnavailable,
    ServiceError,
    ShuttingDown,
    from_code,
)
from protocol.event_router import EventRouter, Inbox, new_signal
from protocol.events import Event, Failed, Finished
from protocol.jobs import Job
from protocol.open_requests import OpenRequests
from protocol.queue import JobQueue

CHECK_S = 1.0
"""How often a request checks its client, its deadline and this process."""
DEADLINE_GRACE_S = 2.0
"""Time for the worker to end a request at its deadline with a proper last event, before this side ends it."""
DRAIN_STREAMS_S = 18.0
"""Time after SIGTERM for running requests; gunicorn kills the process after `graceful_timeout`, 27 s."""

ADMISSIONS = MAX_CONNECTIONS // 2
"""Requests that are admitted at the same time. The other connections are for rate limits, images and cancellations."""
ADMISSION_WAIT_S = 20.0
"""How long a request of a burst waits for its admission to begin, at most half of its deadline."""


class Client(Protocol):
    """The client that waits for a response (app.http.connection.Connection)."""

    def disconnected(self) -> bool:
        """Whether the client has closed its connection, so that nobody will read the response."""


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

        `cancelled_by_operator` gets the request id and may raise redis.RedisError. `timings`: those that began with
        the request; they are noted here.
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

        A worker also cancels the requests of a web process whose lease has expired. When that was a pause of this
        process, the client is still there, and did not cancel anything.
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


class Dispatcher:
    """Sends jobs to workers and reads their events. One for each web process."""

    def __init__(
        self,
        settings: Settings,
        *,
        web_id: str,
        queue: JobQueue,
        router: EventRouter,
        worker_view: WorkerView,
        requests: OpenRequests,
        metrics: RequestMetrics,
        connected: Callable[[], bool],
        draining_for_s: Callable[[], float],
    ) -> None:
        """`connected` and `draining_for_s` are those of app.process.WebProcess."""
        self.settings = settings
        self._web_id = web_id
        self._queue = queue
        self._router = router
        self._worker_view = worker_view
        self._requests = requests
        self._metrics = metrics
        self._connected = connected
        self._draining_for_s = draining_for_s
        self._admissions = threading.BoundedSemaphore(ADMISSIONS)

    def begin_all(self, jobs: Sequence[Job], task: TaskSpec[ModelEntry], client: Client) -> list[EventReader]:
        """Do as `begin` for all jobs of one request. One that is refused cancels the others.

        The readers share their timings, and wake for each other's events, so that one may wait for all.
        """
        timings = Timings(self._metrics.times_of(jobs[0].model))
        readers: list[EventReader] = []
        signal = new_signal()
        try:
            for job in jobs:
                readers.append(self.begin(job, task, client, timings, signal))
        except BaseException:
            for reader in readers:
                reader.close()
            raise
        return readers

    def begin(
        self,
        job: Job,
        task: TaskSpec[ModelEntry],
        client: Client,
        timings: Timings | None = None,
        signal: "threading.Lock | None" = None,
        started: float | None = None,
    ) -> EventReader:
        """Admit and queue a job. Returns the reader of its events, which must be closed.

        `signal`: what wakes the reader, if it shares one. `started`: when the request did, by the monotonic clock;
        None: now. Raises a ServiceError if the job is refused. A job that may
        or may not have been queued is cancelled.
        """
        try:
            return self._begin(job, task, client, timings, signal, started)
        except ServiceError as error:
            self._metrics.rejected(job.model, error.code)
            raise

    def _begin(
        self,
        job: Job,
        task: TaskSpec[ModelEntry],
        client: Client,
        timings: Timings | None,
        signal: "threading.Lock | None",
        started: float | None,
    ) -> EventReader:
        timings = timings or Timings(self._metrics.times_of(job.model))
        now = time.monotonic()
        ends_at = task.deadline_s(self.settings) + (now if started is None else started)
        if (deadline_s := ends_at - now) <= 0:
            raise DeadlineExceeded
        self.refuse_early(job.model)
        if not self._admissions.acquire(timeout=min(ADMISSION_WAIT_S, deadline_s / 2)):
            raise Overloaded("too many requests arrived at once; try again soon")
        try:
            # a request that had to wait for its turn must not find out by a timeout that Redis is gone
            self.refuse_early(job.model)
            return self._admit(job, client, ends_at, timings, self._router.open(job.id, job.model, signal))
        finally:
            self._admissions.release()

    def _admit(self, job: Job, client: Client, ends_at: float, timings: Timings, inbox: Inbox) -> EventReader:
        reader = EventReader(
            inbox,
            client,
            ends_at=ends_at,
            draining_for_s=self._draining_for_s,
            on_close=self._close,
            cancelled_by_operator=self._requests.cancelled_by_operator,
            timings=timings,
        )
        try:
            inbox.admitted = self._queue.admit(
                job,
                web_id=self._web_id,
                deadline_s=ends_at - time.monotonic(),
                max_waiting=self.settings.max_waiting,
                rate=self._worker_view.rate(job.model),
            )
        except QueueUnavailable:
            # Redis may have admitted the job all the same, or does so when it continues
            self._queue.cancel_later(job.id, job.model)
            reader.close()
            raise
        except BaseException:
            reader.close()
            raise
        return reader

    def refuse_early(self, model: str) -> None:
        """Refuse a job that could not be processed now, before anything is written for it."""
        if not self._connected():
            raise QueueUnavailable
        if not self._worker_view.has_ready(model, look_again=True):
            raise NoWorker(f"no worker serves model {model!r} at the moment; try again soon")
        if self._draining_for_s() > 0:
            raise ShuttingDown

    def _close(self, inbox: Inbox, finished: bool) -> None:
        """Stop listening to a request; cancel it unless it is finished."""
        self._router.close(inbox)
        if finished:
            self._queue.forget(inbox.request_id)
        elif inbox.admitted:
            # without the mark the worker stops at the deadline, or when the lease of this process expires
            with suppress(RedisError):
                self._queue.cancel(inbox.request_id, inbox.model)
