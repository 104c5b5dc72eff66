"""One task in one Celery thread: claim → engine → wait for the end. The engine works on many of them together."""

import logging
import threading
import time

from redis.exceptions import RedisError

from protocol.event_sender import EventSender
from protocol.events import Event, Failed, Finished, Started
from protocol.queue import Claimed, JobError, JobQueue
from workers.engines.base import CancelReason, Engine

log = logging.getLogger(__name__)

CLAIM_RETRY_S = 10.0
CLAIM_PAUSE_S = 0.5
REPLAY_GRACE_S = 60


class _Run:
    """A claimed request in this process."""

    def __init__(self, web_id: str) -> None:
        self.web_id = web_id
        self.over = threading.Event()
        self.completed = False


class Runner:
    """Takes request ids from the queue and sees each through. One for each worker process."""

    def __init__(
        self, *, model: str, incarnation_id: str, queue: JobQueue, engine: Engine, sender: EventSender
    ) -> None:
        self._model = model
        self._incarnation_id = incarnation_id
        self._queue = queue
        self._engine = engine
        self._sender = sender
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}
        self._taken: set[str] = set()
        self.dead_webs: set[str] = set()
        """Web processes that are gone: what waits for them in the queue is dropped at its claim."""

    def run(self, request_id: str) -> None:
        """The Celery task. Returns when the request is over, or at once when it is somebody else's."""
        with self._lock:
            if request_id in self._taken:
                return
            self._taken.add(request_id)
        try:
            claimed = self._claim(request_id)
            if claimed is not None and claimed.web_id in self.dead_webs:
                self._end(request_id, completed=False)
            elif claimed is not None:
                self._generate(claimed)
        finally:
            with self._lock:
                self._taken.discard(request_id)

    def running(self) -> dict[str, str]:
        """Requests in this worker's hands, with the web process that waits for each."""
        with self._lock:
            return {request_id: run.web_id for request_id, run in self._runs.items()}

    def cancel(self, request_id: str, reason: CancelReason = "cancelled") -> None:
        """Stop a request of this process; unknown ids are ignored."""
        self._engine.cancel(request_id, reason)

    def fail_all(self, failure: Failed) -> None:
        """End every request from this side: the engine can't any more."""
        self._sender.emit([(request_id, failure) for request_id in self.running()])

    def on_sent(self, request_id: str, event: Event) -> None:
        """The sender has written a request's last event."""
        with self._lock:
            run = self._runs.get(request_id)
        if run is not None:
            run.completed = isinstance(event, Finished)
            run.over.set()

    def on_lost(self, request_id: str) -> None:
        """The sender can't deliver a request's events: nobody will see the rest."""
        self._engine.cancel(request_id, "cancelled")
        with self._lock:
            run = self._runs.get(request_id)
        if run is not None:
            run.over.set()

    def _claim(self, request_id: str) -> Claimed | None:
        """Asks again while Redis is away: a claim whose answer was lost is ours, and nobody else would serve it."""
        give_up_at = time.monotonic() + CLAIM_RETRY_S
        while True:
            try:
                return self._queue.claim(request_id, self._model, self._incarnation_id)
            except JobError as error:
                log.error("request %s is of another version of this service: %s", request_id, error)
                return None
            except RedisError as error:
                if time.monotonic() > give_up_at:
                    log.error("request %s could not be claimed: %s", request_id, error)
                    return None
                time.sleep(CLAIM_PAUSE_S)

    def _generate(self, claimed: Claimed) -> None:
        job, request_id = claimed.job, claimed.job.id
        run = _Run(claimed.web_id)
        with self._lock:
            self._runs[request_id] = run
        try:
            self._sender.open(request_id, claimed.web_id, int(claimed.remaining_s) + REPLAY_GRACE_S)
            self._sender.emit([(request_id, Started(self._incarnation_id))])
            self._engine.submit(job)
            if not run.over.wait(claimed.remaining_s):
                self._engine.cancel(request_id, "deadline")
                run.over.wait()
        finally:
            with self._lock:
                del self._runs[request_id]
            self._end(request_id, run.completed)

    def _end(self, request_id: str, completed: bool) -> None:
        try:
            self._queue.end(request_id, self._model, completed=completed)
        except RedisError as error:
            log.warning("request %s not tidied up, its keys lapse by themselves: %s", request_id, error)
