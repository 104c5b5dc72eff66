"""The way of one request through this process: admit → queue → events. Knows nothing of HTTP bodies or of Flask."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

from redis.exceptions import RedisError

from app.dispatch.worker_view import WorkerView
from catalogue import Catalogue, ModelEntry, Task
from config import Settings
from protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    QueueUnavailable,
    ShuttingDown,
    from_code,
)
from protocol.event_router import EventRouter, Inbox
from protocol.events import Event, Failed, Finished
from protocol.jobs import Job
from protocol.queue import JobQueue

CHECK_S = 1.0
DEADLINE_GRACE_S = 2.0
"""The worker ends a request at its deadline, properly; only a worker that can't is overruled from here."""
DRAIN_STREAMS_S = 18.0


class Caller(Protocol):
    """Whoever waits for the answer."""

    def gone(self) -> bool:
        """He has left; the work is for nothing."""


class EventReader:
    """What comes of one request, until it is `over`. One reader, who closes it whatever happens.

    Read by plain calls, not through generators: thousands of streams wait in `take` at once, and each generator in
    between would keep a frame and half a kilobyte of C stack for every one of them.
    """

    __slots__ = ("_caller", "_check_at", "_draining_for_s", "_end", "_ends_at", "_failure", "_inbox", "over")

    def __init__(
        self,
        inbox: Inbox,
        caller: Caller,
        *,
        ends_at: float,
        draining_for_s: Callable[[], float],
        end: Callable[[Inbox, bool], None],
    ) -> None:
        self._inbox = inbox
        self._caller = caller
        self._ends_at = ends_at
        self._draining_for_s = draining_for_s
        self._end = end
        self._check_at = time.monotonic() + CHECK_S
        self._failure: Failed | None = None
        self.over = False
        """Complete: the last batch ended with Finished."""

    def take(self) -> list[Event]:
        """What came since the last time, in order; an empty list after a second of silence.

        Raises a ServiceError once everything before it was taken: failed, too late, caller gone.
        """
        now = time.monotonic()
        # an end that has come counts, however late it is read
        if now >= self._check_at and not self._inbox.ended:
            self._check_at = now + CHECK_S
            self._check(now)
        gained = self._inbox.take(CHECK_S) if self._failure is None else []
        last = gained[-1] if gained else None
        if isinstance(last, Failed):
            self._failure = last
            gained.pop()
        if self._failure is not None and not gained:
            raise from_code(self._failure.code, self._failure.message, self._failure.param)
        self.over = isinstance(last, Finished)
        return gained

    def close(self) -> None:
        """Listen no more; cancels what is not over. Again is harmless."""
        self._end(self._inbox, self.over)

    def __iter__(self) -> Iterator[list[Event]]:
        """All that comes, batch by batch."""
        while not self.over:
            yield self.take()

    def _check(self, now: float) -> None:
        if self._caller.gone():
            raise Cancelled("the caller has left")
        if now >= self._ends_at + DEADLINE_GRACE_S:
            raise DeadlineExceeded(
                "the answer was not ready before the deadline; ask for less or try again later"
            )
        if self._draining_for_s() > DRAIN_STREAMS_S:
            raise ShuttingDown("this server is stopping; send the request again")


class Dispatcher:
    """Sends jobs to workers and follows their events. One for each web process."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        *,
        web_id: str,
        queue: JobQueue,
        router: EventRouter,
        worker_view: WorkerView,
        draining_for_s: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._web_id = web_id
        self._queue = queue
        self._router = router
        self._worker_view = worker_view
        self._draining_for_s = draining_for_s

    def entry(self, name: str, task: Task) -> ModelEntry:
        """The catalogue entry for a request. Raises ModelNotFound, or InvalidRequest for a model of another task."""
        entry = self._catalogue.get(name)
        if entry is None:
            known = ", ".join(model.name for model in self._catalogue.models if task in model.tasks) or "none"
            raise ModelNotFound(f"model {name!r} does not exist; for this end point: {known}", param="model")
        if task not in entry.tasks:
            raise InvalidRequest(
                f"model {name!r} does not do {task!r}; it does: {', '.join(entry.tasks)}", param="model"
            )
        return entry

    def begin(self, job: Job, task: Task, caller: Caller) -> EventReader:
        """Admit and queue a job. What becomes of it is read from the EventReader, which must be closed.

        Raises ServiceError where it is refused; a job whose fate in the queue is unknown is cancelled.
        """
        deadline_s = self._settings.deadline_s(task)
        ends_at = time.monotonic() + deadline_s
        self._refuse_early(job.model)
        inbox = self._router.open(job.id, job.model)
        inbox.expires_s = deadline_s + DEADLINE_GRACE_S
        answer = EventReader(
            inbox, caller, ends_at=ends_at, draining_for_s=self._draining_for_s, end=self._end
        )
        try:
            inbox.admitted = self._queue.admit(
                job, web_id=self._web_id, deadline_s=deadline_s, max_waiting=self._settings.max_waiting
            )
            self._queue.send(job.id, job.model, expires_s=inbox.expires_s)
        except BaseException:
            answer.close()
            raise
        return answer

    def _refuse_early(self, model: str) -> None:
        if not self._worker_view.reachable or not self._router.subscribed.is_set():
            raise QueueUnavailable("the queue can't be reached; try again soon", retry_after_s=5)
        if not self._worker_view.has_ready(model, look_again=True):
            raise NoWorker(
                f"no worker serves model {model!r} at the moment; try again soon", retry_after_s=10
            )
        if self._draining_for_s() > 0:
            raise ShuttingDown("this server is stopping; try again soon", retry_after_s=5)

    def _end(self, inbox: Inbox, complete: bool) -> None:
        """Nobody reads this request's events any more; what is not complete is cancelled."""
        self._router.close(inbox.request_id)
        if complete:
            self._queue.forget(inbox.request_id)
        elif inbox.admitted:
            # not cancelled: the worker stops all the same, at its own deadline or when this process's lease is gone
            with suppress(RedisError):
                self._queue.cancel(inbox.request_id, inbox.model)
