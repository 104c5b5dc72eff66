"""Runs one Celery task: claim the request, submit it to the engine, wait for its last event."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from redis.exceptions import NoPermissionError, RedisError

from protocol.errors import Cancelled, EngineError, ServiceError
from protocol.event_sender import EventSender
from protocol.events import Event, Failed, Finished, Started
from protocol.jobs import ChatJob, work_of
from protocol.leases import WorkerRecord
from protocol.queue import Claimed, JobQueue, UnreadableJob
from protocol.resumable_streams import web_of
from workers.engines.base import CancelReason, Engine
from workers.gpu_time import GpuTime
from workers.job_log import UNDELIVERED, JobLog
from workers.throughput import Throughput

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_PAUSE_S = 0.5
UNREADABLE = "this worker can't read the request; send it again"
REPLAY_GRACE_S = 60
"""How long a request's replay list outlives its deadline."""


class _Run:
    """A claimed request while it runs in this process."""

    def __init__(self, web_id: str, log: JobLog, *, resumable: bool = False) -> None:
        self.web_id = web_id
        self.resumable = resumable
        self.reader: str | None = None
        """Who reads the stream if it can be resumed (protocol.resumable_streams), None before it has
        begun."""
        self.log = log
        self.ended = threading.Event()
        self.finished = False
        """True once a Finished event was written."""


class Runner:
    """Takes request ids from the queue and sees each through. One for each worker process.

    `run` is called in many threads at once, one for each task; the engine works on all of their requests
    together.
    """

    def __init__(
        self,
        identity: WorkerRecord,
        queue: JobQueue,
        engine: Engine,
        sender: EventSender,
        throughput: Throughput,
        gpu_time: GpuTime,
        *,
        on_ended: Callable[[JobLog], None],
    ) -> None:
        """`on_ended` is called in the thread of the task, with each job that has ended."""
        self._model = identity.model
        self._incarnation_id = identity.incarnation_id
        self._queue = queue
        self._engine = engine
        self._sender = sender
        self._throughput = throughput
        self._gpu_time = gpu_time
        self._on_ended = on_ended
        self._lock = threading.Lock()
        self.received = 0
        """Messages that Celery has handed over since the start."""
        self._tasks: set[str] = set()
        self._runs: dict[str, _Run] = {}

    def run(self, request_id: str) -> None:
        """The Celery task. Returns when the request has ended, or at once if it is claimed elsewhere.

        A second message for a request of this process is dropped here: its claim would succeed again.
        """
        with self._lock:
            self.received += 1
            if request_id in self._tasks:
                return
            self._tasks.add(request_id)
        try:
            claimed = self._claim(request_id)
            if claimed is not None and claimed.job.model == self._model:
                self._generate(claimed)
            elif claimed is not None:
                log.error("request %s is for model %s and came from our queue", request_id, claimed.job.model)
                self._refuse(request_id, claimed.web_id, claimed.remaining_s, EngineError(UNREADABLE))
        except UnreadableJob as error:
            log.error("request %s was made by another version of this service: %s", request_id, error)
            self._refuse(request_id, error.web_id, error.remaining_s, EngineError(UNREADABLE))
        except Exception:
            # its client is not known; once the job is deleted, its web process takes the request for lost
            log.exception("request %s could not be read", request_id)
            self._end(request_id)
        finally:
            with self._lock:
                self._tasks.discard(request_id)

    def running(self) -> list[str]:
        """Ids of the requests that this worker has claimed and not ended."""
        with self._lock:
            return list(self._runs)

    def busy(self) -> bool:
        """Whether a message was received whose request runs, or is about to be claimed."""
        with self._lock:
            return bool(self._tasks)

    def cancel(self, request_id: str, reason: CancelReason = "cancelled") -> None:
        """Stop a request of this process; unknown ids are ignored."""
        self._engine.cancel(request_id, reason)

    def revoke(self, request_id: str) -> None:
        """Cancel a request of this process, or one that waits in its queue; its client gets an error.

        Every worker of every model gets this command, so it leaves alone what is not its own.
        """
        if request_id in self.running():
            self.cancel(request_id)
        elif self._queue.is_waiting(request_id, self._model) and (claimed := self._claim(request_id)):
            self._refuse(request_id, claimed.web_id, claimed.remaining_s, Cancelled())

    def fail_all(self, failure: Failed) -> None:
        """End every request without the engine, which can't do it any more."""
        self._sender.emit([(request_id, failure) for request_id in self.running()])

    def web_ids(self) -> set[str]:
        """Web processes that wait for requests of this worker."""
        with self._lock:
            return {run.web_id for run in self._runs.values() if run.web_id}

    def readers(self) -> dict[str, str | None]:
        """The readers of the streams that can be resumed, by request id: as `set_reader` was told, or
        None."""
        with self._lock:
            return {request_id: run.reader for request_id, run in self._runs.items() if run.resumable}

    def set_reader(self, request_id: str, reader: str) -> None:
        """Note who reads a stream that has begun, "" for nobody: a request that goes on without a client."""
        with self._lock:
            if run := self._runs.get(request_id):
                run.reader, run.web_id = reader, web_of(reader)

    def set_lost_webs(self, web_ids: set[str]) -> None:
        """Cancel what runs for these web processes; what they have queued follows soon after its claim.

        Streams that can be resumed have a grace period (workers.stream_readers).
        """
        with self._lock:
            unwanted = [
                request_id
                for request_id, run in self._runs.items()
                if run.web_id in web_ids and run.reader is None
            ]
        for request_id in unwanted:
            self.cancel(request_id)

    def _claim(self, request_id: str) -> Claimed | None:
        """Claim the request.

        The attempt whose answer was lost may have taken the claim, and then no other worker would serve the
        request.
        """
        return _until_answered(
            f"the claim of request {request_id}",
            lambda: self._queue.claim(request_id, self._model, self._incarnation_id),
        )

    def _generate(self, claimed: Claimed) -> None:
        request_id = claimed.job.id
        job = claimed.job
        run = _Run(
            claimed.web_id,
            JobLog(request_id, self._model, job, claimed.queued_s),
            resumable=isinstance(job, ChatJob) and job.resumable,
        )
        with self._lock:
            self._runs[request_id] = run
        self._throughput.started()
        self._gpu_time.start(request_id)
        try:
            self._open(request_id, claimed.web_id, claimed.remaining_s, run)
            self._engine.submit(claimed.job)
            if not run.ended.wait(claimed.remaining_s):
                self.cancel(request_id, "deadline")
                # without a limit: the heartbeat notices an engine that hangs
                run.ended.wait()
        except Exception:
            # the engine itself reports what is wrong with a job: this is a fault of ours, and the client
            # waits
            log.exception("request %s could not be submitted", request_id)
            self._sender.emit([(request_id, Failed.of(EngineError()))])
            run.ended.wait()
        finally:
            with self._lock:
                del self._runs[request_id]
            self._throughput.ended(work_of(claimed.job) if run.finished else 0)
            run.log.gpu_s = self._gpu_time.end(request_id)
            if run.log.outcome == UNDELIVERED and self._was_cancelled(request_id):
                run.log.outcome = Cancelled.code
            run.log.write()
            self._on_ended(run.log)
            self._end(request_id)

    def _open(self, request_id: str, web_id: str, remaining_s: float, run: _Run) -> None:
        """Begin the request's event stream; `run` gets its end."""

        def on_end(event: Event | None) -> None:
            run.finished = isinstance(event, Finished)
            if event is None:
                run.log.outcome = UNDELIVERED
                self.cancel(request_id)
            run.ended.set()

        ttl_s = int(remaining_s) + REPLAY_GRACE_S
        self._sender.open(request_id, web_id, ttl_s, on_end, run.log.observe)
        self._sender.emit([(request_id, Started(self._incarnation_id))])

    def _was_cancelled(self, request_id: str) -> bool:
        """Whether the web process has cancelled it, which also takes the list away that its events go to."""
        try:
            return bool(self._queue.cancelled([request_id]))
        except RedisError:
            return False

    def _refuse(self, request_id: str, web_id: str, remaining_s: float, error: ServiceError) -> None:
        """End a claimed job that is not handed to the engine."""
        run = _Run(web_id, JobLog(request_id, self._model, None, None))
        self._open(request_id, web_id, remaining_s, run)
        self._sender.emit([(request_id, Failed.of(error))])
        run.ended.wait()
        run.log.write()
        self._on_ended(run.log)
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        """Delete the job: while it exists, the client of a request whose last event was lost goes on
        waiting."""
        try:
            _until_answered(
                f"the end of request {request_id}", lambda: self._queue.end(request_id, self._model)
            )
        except RedisError as error:
            log.warning("the job of request %s was not deleted; it expires: %s", request_id, error)


def _until_answered(what: str, command: Callable[[], T]) -> T:
    """Repeat a command that may be repeated until Redis takes it, however long it is away.

    Raises NoPermissionError: what the ACL forbids will not be allowed the next time.
    """
    waiting = False
    while True:
        try:
            return command()
        except NoPermissionError:
            raise
        except RedisError as error:
            if not waiting:
                log.warning("%s waits for Redis: %s", what, error)
            waiting = True
            time.sleep(RETRY_PAUSE_S)
