"""The way of one request through this process: admit → queue → events. Knows nothing of HTTP bodies or of Flask."""

import time
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from redis.exceptions import RedisError

from app.directory import Directory
from config import Catalogue, ModelEntry, Settings, Task
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


class Generation:
    """Sends jobs to workers and follows their events. One for each web process."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        *,
        web_id: str,
        queue: JobQueue,
        router: EventRouter,
        directory: Directory,
        draining_for_s: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._web_id = web_id
        self._queue = queue
        self._router = router
        self._directory = directory
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

    def run(self, job: Job, task: Task, caller: Caller) -> Generator[list[Event], None, None]:
        """Generate. Yields what came since the last time, in order; an empty list after each second of silence.

        Ends after Finished. Raises a ServiceError for everything else: refused, failed, too late, caller gone. However
        it ends, also by being closed, a job that nobody waits for any more is cancelled.
        """
        deadline_s = self._settings.deadline_s(task)
        ends_at = time.monotonic() + deadline_s
        request_id, model = job.id, job.model
        self._refuse_early(model)
        inbox = self._router.open(request_id, model)
        inbox.expires_s = deadline_s + DEADLINE_GRACE_S
        try:
            inbox.admitted = self._queue.admit(
                job, web_id=self._web_id, deadline_s=deadline_s, max_waiting=self._settings.max_waiting
            )
            # Redis has it: thousands of open streams shall not keep their prompts here, too
            del job
            self._queue.send(request_id, model, expires_s=inbox.expires_s)
            yield from self._follow(inbox, ends_at, caller)
        finally:
            self._router.close(request_id)
            if inbox.finished:
                self._queue.forget(request_id)
            elif inbox.admitted:
                self._cancel(request_id, model)

    def _refuse_early(self, model: str) -> None:
        if not self._directory.reachable or not self._router.subscribed.is_set():
            raise QueueUnavailable("the queue can't be reached; try again soon", retry_after_s=5)
        if not self._directory.has_ready(model, look_again=True):
            raise NoWorker(
                f"no worker serves model {model!r} at the moment; try again soon", retry_after_s=10
            )
        if self._draining_for_s() > 0:
            raise ShuttingDown("this server is stopping; try again soon", retry_after_s=5)

    def _follow(self, inbox: Inbox, ends_at: float, caller: Caller) -> Iterator[list[Event]]:
        check_at = time.monotonic() + CHECK_S
        while True:
            gained = inbox.take(CHECK_S)
            failure = gained.pop() if gained and isinstance(gained[-1], Failed) else None
            inbox.finished = bool(gained) and isinstance(gained[-1], Finished)
            if gained or failure is None:
                yield gained
            if inbox.finished:
                return
            if isinstance(failure, Failed):
                raise from_code(failure.code, failure.message, failure.param)
            now = time.monotonic()
            if now >= check_at:
                check_at = now + CHECK_S
                self._check(now, ends_at, caller)

    def _check(self, now: float, ends_at: float, caller: Caller) -> None:
        if caller.gone():
            raise Cancelled("the caller has left")
        if now >= ends_at + DEADLINE_GRACE_S:
            raise DeadlineExceeded(
                "the answer was not ready before the deadline; ask for less or try again later"
            )
        if self._draining_for_s() > DRAIN_STREAMS_S:
            raise ShuttingDown("this server is stopping; send the request again")

    def _cancel(self, request_id: str, model: str) -> None:
        try:
            self._queue.cancel(request_id, model)
        except RedisError:
            # the worker stops all the same: at its own deadline, or when this process's lease is gone
            return
