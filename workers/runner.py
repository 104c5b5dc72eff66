"""Runs one Celery task: claim the request, submit it to the engine, wait for its last event."""

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
"""How long a request's replay list outlives its deadline."""


class _Run:
    """A claimed request while it runs in this process."""

    def __init__(self, web_id: str) -> None:
        self.web_id = web_id
        self.ended = threading.Event()
        self.last_event: Event | None = None
        """The terminal event that was written; None until then, and if events could not be delivered."""


class Runner:
    """Takes request ids from the queue and sees each through. One for each worker process.

    `run` is called in many threads at once, one for each task; the engine works on all of their requests together.
    """

    def __init__(
        self, *, model: str, incarnation_id: str, queue: JobQueue, engine: Engine, sender: EventSender
    ) -> None:
        self._model = model
        self._incarnation_id = incarnation_id
        self._queue = queue
        self._engine = engine
        self._sender = sender
        self._lock = threading.Lock()
        self._tasks: set[str] = set()
        self._runs: dict[str, _Run] = {}
        self._lost_webs: frozenset[str] = frozenset()

    def run(self, request_id: str) -> None:
        """The Celery task. Returns when the request has ended, or at once if it is claimed elsewhere.

        A second message for a request of this process is dropped here: its claim would succeed again.
        """
        with self._lock:
            if request_id in self._tasks:
                return
            self._tasks.add(request_id)
        try:
            claimed = self._claim(request_id)
            if claimed is not None and claimed.web_id in self._lost_webs:
                self._end(request_id, completed=False)
            elif claimed is not None:
                self._generate(claimed)
        finally:
            with self._lock:
                self._tasks.discard(request_id)

    def running(self) -> list[str]:
        """Ids of the requests that this worker has claimed and not ended."""
        with self._lock:
            return list(self._runs)

    def cancel(self, request_id: str, reason: CancelReason = "cancelled") -> None:
        """Stop a request of this process; unknown ids are ignored."""
        self._engine.cancel(request_id, reason)

    def fail_all(self, failure: Failed) -> None:
        """End every request without the engine, which can't do it any more."""
        self._sender.emit([(request_id, failure) for request_id in self.running()])

    def web_ids(self) -> set[str]:
        """Web processes that wait for requests of this worker, and those that were lost: a paused one comes back."""
        with self._lock:
            return {run.web_id for run in self._runs.values()} | self._lost_webs

    def set_lost_webs(self, web_ids: set[str]) -> None:
        """Cancel what runs for these web processes, and drop what they queued as it is claimed."""
        self._lost_webs = frozenset(web_ids)
        with self._lock:
            unwanted = [request_id for request_id, run in self._runs.items() if run.web_id in web_ids]
        for request_id in unwanted:
            self.cancel(request_id)

    def _claim(self, request_id: str) -> Claimed | None:
        """Claim the request, trying again while Redis can't be reached.

        The attempt whose answer was lost may have taken the claim, and then no other worker would serve the request.
        """
        give_up_at = time.monotonic() + CLAIM_RETRY_S
        while True:
            try:
                return self._queue.claim(request_id, self._model, self._incarnation_id)
            except JobError as error:
                log.error("request %s was made by another version of this service: %s", request_id, error)
                return None
            except RedisError as error:
                if time.monotonic() > give_up_at:
                    log.error("request %s could not be claimed: %s", request_id, error)
                    return None
                time.sleep(CLAIM_PAUSE_S)

    def _generate(self, claimed: Claimed) -> None:
        request_id, run = claimed.job.id, _Run(claimed.web_id)

        def on_end(event: Event | None) -> None:
            run.last_event = event
            if event is None:
                self.cancel(request_id)
            run.ended.set()

        with self._lock:
            self._runs[request_id] = run
        try:
            ttl_s = int(claimed.remaining_s) + REPLAY_GRACE_S
            self._sender.open(request_id, claimed.web_id, ttl_s, on_end)
            self._sender.emit([(request_id, Started(self._incarnation_id))])
            self._engine.submit(claimed.job)
            if not run.ended.wait(claimed.remaining_s):
                self.cancel(request_id, "deadline")
                # without a limit: the heartbeat notices an engine that hangs
                run.ended.wait()
        finally:
            with self._lock:
                del self._runs[request_id]
            self._end(request_id, completed=isinstance(run.last_event, Finished))

    def _end(self, request_id: str, *, completed: bool) -> None:
        try:
            self._queue.end(request_id, self._model, completed=completed)
        except RedisError as error:
            log.warning("the keys of request %s were not deleted; they expire: %s", request_id, error)
