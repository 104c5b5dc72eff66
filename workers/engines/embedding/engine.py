"""The embedding engine: one thread runs forward passes over the inputs of all requests that wait.

`submit` (any thread) tokenizes. A job stays in `_open` until its terminal event; the thread that removes it
sends that event, so there is exactly one.
"""

import logging
import threading
import time

import torch

from catalogue import EmbeddingModelEntry
from protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    EngineStopped,
    InvalidRequest,
    ServiceError,
    ShuttingDown,
    UnsupportedParameter,
)
from protocol.events import Event, Failed, Finished, Usage, Vectors
from protocol.jobs import EmbeddingJob, Job
from workers.engines.base import CancelReason, Emit, EngineStatus
from workers.engines.device import default_threads
from workers.engines.embedding.batches import BatchQueue, Item, Request
from workers.engines.embedding.inputs import InputEncoder
from workers.engines.embedding.loader import LoadedEncoder, load_encoder
from workers.engines.embedding.warm_up import warm_up
from workers.engines.failures import failure_of, free_memory
from workers.engines.progress import call_after_layers

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of a pass without `max_batch_tokens`."""

_CANCELLED: dict[CancelReason, type[ServiceError]] = {"cancelled": Cancelled, "deadline": DeadlineExceeded}

log = logging.getLogger(__name__)


class EmbeddingEngine:
    """Serves a sentence embedding model. Implements workers.engines.base.Engine."""

    def __init__(self, entry: EmbeddingModelEntry) -> None:
        self._entry = entry
        self._emit: Emit = lambda events: None
        self._loaded: LoadedEncoder | None = None
        self._inputs: InputEncoder | None = None
        self._queue = BatchQueue(1)
        self._size = 0
        """Numbers of the model's own vectors."""
        self._lock = threading.RLock()
        """Also held while emitting, so that no event follows a terminal one."""
        self._work = threading.Condition(self._lock)
        self._open: dict[str, EmbeddingJob] = {}
        """Jobs whose terminal event has not been sent, by id."""
        self._waiting: set[str] = set()
        """Ids of open jobs whose inputs are queued, none of them taken yet."""
        self._running: set[str] = set()
        """Ids of open jobs that are or were part of a pass."""
        self._stopped: Failed | None = None
        """Why no more jobs are accepted."""
        self._steps = 0
        """Layers of passes, and jobs that were tokenized."""
        self._threads = entry.engine.torch_threads or default_threads()
        self._thread = threading.Thread(target=self._run, name=f"embedding-engine {entry.name}", daemon=True)

    def load(self, emit: Emit) -> None:
        """Load the weights, warm up and start. Raises EngineLoadError."""
        started = time.monotonic()
        self._emit = emit
        torch.set_num_threads(self._threads)
        loaded = self._loaded = load_encoder(self._entry)
        self._inputs = InputEncoder(
            loaded.tokenizer, loaded.vocabulary_size, loaded.max_tokens, lower_case=loaded.lower_case
        )
        batch_tokens = self._entry.engine.max_batch_tokens or BATCH_TOKENS[loaded.device.type]
        self._size, pass_cost = warm_up(self._entry, loaded, batch_tokens)
        self._queue = BatchQueue(batch_tokens, pass_cost)
        # a pass over one long input takes minutes on a CPU
        call_after_layers(loaded.model.modules(), self._count_step)
        self._thread.start()
        log.info(
            "%s loaded in %.1f s: %s, %d dimensions, a pass costs as much as %.0f tokens",
            self._entry.name,
            time.monotonic() - started,
            loaded.describe(),
            self._size,
            pass_cost,
        )

    def submit(self, job: Job) -> None:
        """Tokenize a job and queue its inputs. A second job with the id of an open one is ignored."""
        assert isinstance(job, EmbeddingJob) and self._inputs is not None
        with self._lock:
            if job.id in self._open:
                log.warning("request %s was submitted twice", job.id)
                return
            self._open[job.id] = job
            if self._stopped:
                self._end(job, self._stopped)
                return
        try:
            dimensions = self._dimensions(job)
            inputs = self._inputs.encode(job, lambda: not self._is_open(job))
        except Exception as error:
            self._end(job, failure_of(error))
            return
        with self._work:
            self._count_step()
            if self._is_open(job):
                self._waiting.add(job.id)
                self._queue.add(Request(job, inputs, dimensions))
                self._work.notify_all()

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        """End a job now. A running pass drops its vectors."""
        with self._lock:
            if job := self._open.get(request_id):
                self._end(job, Failed.of(_CANCELLED[reason]()))

    def status(self) -> EngineStatus:
        """Return a snapshot without locking. A job counts as running from its first pass to its end.

        One that is tokenized counts as neither: this is not the engine thread's work, and many large jobs
        take long.
        """
        limit = self._loaded.max_tokens if self._loaded else 0
        return EngineStatus(
            self._thread.is_alive(), len(self._running), len(self._waiting), self._steps, limit
        )

    def close(self) -> None:
        """End all jobs with "shutting_down", stop the thread and free the device."""
        self._stop(Failed.of(ShuttingDown()))
        if self._thread.is_alive():
            # with a limit: a device that hangs must not keep the process from ending
            self._thread.join(timeout=10)
        self._loaded = None
        free_memory()

    def _dimensions(self, job: EmbeddingJob) -> int:
        """Return the numbers of each vector of a job. Raises InvalidRequest and UnsupportedParameter."""
        assert self._loaded is not None
        wanted, sizes = job.dimensions, self._loaded.matryoshka
        if wanted is None or wanted == self._size:
            return self._size
        if sizes is not None and not sizes:
            raise UnsupportedParameter(
                f"the vectors of {job.model!r} can't be shortened, since it is no Matryoshka model; leave"
                f" `dimensions` out, or send {self._size}",
                param="dimensions",
            )
        if wanted > self._size or (sizes is not None and wanted not in sizes):
            choices = f"at most {self._size}" if sizes is None else f"one of {sorted({*sizes, self._size})}"
            raise InvalidRequest(
                f"dimensions must be {choices} for this model (it is {wanted})", param="dimensions"
            )
        return wanted

    # The engine thread

    def _run(self) -> None:
        # torch keeps this number for each calling thread
        torch.set_num_threads(self._threads)
        try:
            while batch := self._next_batch():
                self._compute(batch)
        except BaseException:
            log.exception("the engine thread of %s died", self._entry.name)
            self._stop(Failed.of(EngineStopped()))

    def _next_batch(self) -> list[Item]:
        """Wait for inputs and take those of a pass. Returns an empty list when stopped."""
        with self._work:
            while not self._stopped:
                if batch := self._queue.next_batch():
                    taken = {item.request.job.id for item in batch}
                    self._waiting -= taken
                    self._running |= taken
                    return batch
                self._work.wait()
            return []

    def _compute(self, batch: list[Item]) -> None:
        """Run a pass and send its vectors. After a failure each half has a pass of its own.

        A pass fails when it needs too much memory, or when one input makes it fail for the others.
        """
        try:
            rows = self._vectors(batch)
        except Exception as error:
            # no reference to `error` may outlive this block: its frames hold the tensors of the pass
            failure = failure_of(error)
        else:
            self._deliver(batch, rows)
            return
        free_memory()
        if len(batch) == 1:
            self._end(batch[0].request.job, failure)
            return
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            if still_open := [item for item in part if self._is_open(item.request.job)]:
                self._compute(still_open)

    def _vectors(self, batch: list[Item]) -> list[bytes]:
        """Return each input's vector as float32. Raises RuntimeError for one that isn't finite."""
        assert self._loaded is not None
        vectors = self._loaded.vectors([item.tokens for item in batch])
        rows: dict[int, bytes] = {}
        sizes = {item.request.dimensions for item in batch}
        for size in sizes:
            finished = self._loaded.head.finish(vectors, size).cpu()
            if not bool(torch.isfinite(finished).all()):
                raise RuntimeError("a vector is not finite")
            data = finished.contiguous().numpy().astype("<f4").tobytes()
            for place, item in enumerate(batch):
                if item.request.dimensions == size:
                    rows[place] = data[place * size * 4 : (place + 1) * size * 4]
        self._count_step()
        return [rows[place] for place in range(len(batch))]

    def _deliver(self, batch: list[Item], rows: list[bytes]) -> None:
        by_request: dict[Request, list[tuple[int, bytes]]] = {}
        for item, row in zip(batch, rows, strict=True):
            by_request.setdefault(item.request, []).append((item.index, row))
        with self._lock:
            events: list[tuple[str, Event]] = []
            for request, found in by_request.items():
                if not self._is_open(request.job):
                    continue
                indices = [index for index, _ in found]
                events.append((request.job.id, Vectors(indices, b"".join(row for _, row in found))))
                request.remaining -= len(found)
            try:
                self._emit(events)
            except Exception:
                # their vectors are lost; the engine goes on with the other requests
                log.exception("emit failed for %d events", len(events))
                for request in by_request:
                    self._end(request.job, Failed.of(EngineError()))
                return
            for request in by_request:
                if request.remaining == 0:
                    self._end(request.job, Finished(Usage(request.prompt_tokens, 0)))

    # All threads

    def _count_step(self) -> None:
        self._steps += 1

    def _is_open(self, job: EmbeddingJob) -> bool:
        return self._open.get(job.id) is job

    def _end(self, job: EmbeddingJob, event: Failed | Finished) -> None:
        """Send the terminal event of a job, unless it has ended already."""
        with self._lock:
            if self._is_open(job):
                del self._open[job.id]
                self._waiting.discard(job.id)
                self._running.discard(job.id)
                self._queue.discard(job)
                self._emit([(job.id, event)])

    def _stop(self, reason: Failed) -> None:
        """Accept no more jobs, and end the open ones."""
        with self._work:
            self._stopped = self._stopped or reason
            for job in list(self._open.values()):
                try:
                    self._end(job, reason)
                except Exception:
                    # the worker ends what its engine can't
                    log.exception("the end of request %s was not sent", job.id)
            self._work.notify_all()
