"""Dispatch of a request: admit its job, queue it, and open the reader of its events.

Knows no HTTP bodies and no Flask.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from redis.exceptions import RedisError

from app.dispatch.event_reader import Client, EventReader
from app.dispatch.request_metrics import RequestMetrics
from app.dispatch.timings import Timings
from app.dispatch.worker_view import WorkerView
from catalogue import ModelEntry, TaskSpec
from config import Settings
from protocol.connections import MAX_CONNECTIONS
from protocol.errors import (
    DeadlineExceeded,
    NoWorker,
    Overloaded,
    QueueUnavailable,
    ServiceError,
    ShuttingDown,
)
from protocol.event_router import EventRouter, Inbox, new_signal
from protocol.jobs import Job
from protocol.open_requests import OpenRequests
from protocol.queue import JobQueue

ADMISSIONS = MAX_CONNECTIONS // 2
"""Requests that are admitted at the same time. The other connections are for rate limits, images and
cancellations."""
ADMISSION_WAIT_S = 20.0
"""How long a request of a burst waits for its admission to begin, at most half of its deadline."""


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
        """Admit and queue all jobs of one request, as `begin` does. One that is refused cancels the others.

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

        `signal`: what wakes the reader, if it shares one. `started`: when the request began, by the monotonic
        clock; None: now. Raises a ServiceError if the job is refused. A job that may or may not have been
        queued is cancelled.
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
