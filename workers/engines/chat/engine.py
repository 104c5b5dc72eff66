"""The chat engine: one thread that decodes all requests together, one `step` after another.

`submit` (any thread) applies the chat template, tokenizes, and puts the request into an inbox. The engine
thread takes it from there: scheduler, model, sampler, events. Each step calls `emit` once.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable

import torch

from catalogue import TextModelEntry
from protocol.errors import EngineError, EngineStopped, ShuttingDown
from protocol.events import Failed
from protocol.jobs import EmbeddingJob, ImageJob, Job, TextJob
from workers.engines.base import CancelReason, Emit, EngineCounts, EngineStatus
from workers.engines.chat.build import EngineParts, build_engine
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.sequence import Request
from workers.engines.chat.step_executor import StepExecutor
from workers.engines.chat.tokenizing import answer
from workers.engines.failures import failure_of

log = logging.getLogger(__name__)


class ChatEngine:
    """Serves a decoder-only language model. Implements workers.engines.base.Engine."""

    def __init__(self, entry: TextModelEntry, gpu_share: float = 1.0) -> None:
        """`gpu_share`: the part of the GPU's memory that this process may use."""
        self.entry = entry
        self._gpu_share = gpu_share
        self.metrics = Metrics()
        self._parts: EngineParts | None = None
        self._executor: StepExecutor | None = None
        self._stepped_at = math.inf
        """When the last step ended, by time.perf_counter; infinite after a pause."""
        self._callback: Emit = lambda events: None
        """Takes the events: the argument of `load`."""
        self._inbox: deque[Request] = deque()
        self._cancels: dict[str, CancelReason] = {}
        self._open: set[str] = set()
        """Ids whose last event is still to come. An id is added at the start of `submit`."""
        self._wake = threading.Event()
        self._closing = False
        self._closed = False
        """No more requests are accepted: the engine was closed, or its thread died."""
        self._lock = threading.Lock()
        """Guards _open, _cancels, _inbox and _closed, so that no request is lost between two threads."""
        self._thread = threading.Thread(target=self._run, name=f"chat-engine {entry.name}", daemon=True)

    def load(self, emit: Emit) -> None:
        started = time.monotonic()
        self._callback = emit
        self._parts = build_engine(self.entry, self._gpu_share, self.metrics, self._forget)
        self._executor = StepExecutor(self._parts, self.metrics)
        self._thread.start()
        log.info(
            "%s loaded in %.1f s: %s", self.entry.name, time.monotonic() - started, self._parts.describe()
        )

    @property
    def parts(self) -> EngineParts:
        if self._parts is None:
            raise RuntimeError("load() must come first")
        return self._parts

    def submit(self, job: Job) -> None:
        assert not isinstance(job, ImageJob | EmbeddingJob)
        with self._lock:
            self._open.add(job.id)
            closed = self._closed
        try:
            if closed:
                raise ShuttingDown
            if not isinstance(job, TextJob):
                events = answer(job, self.parts)
                self._forget(job.id)
                self._callback([(job.id, event) for event in events])
                return
            request = self.parts.prompts.build(job, lambda: job.id in self._cancels)
            with self._lock:
                if not self._closed:
                    self._inbox.append(request)
                    self._wake.set()
                    return
            raise ShuttingDown
        except Exception as error:
            self._forget(job.id)
            self._callback([(job.id, failure_of(error))])

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        with self._lock:
            if request_id in self._open:
                self._cancels[request_id] = reason
        self._wake.set()

    def status(self) -> EngineStatus:
        parts, metrics = self._parts, self.metrics
        if parts is None:
            return EngineStatus(False, 0, 0, metrics.progress)
        counts = EngineCounts(
            prompt_tokens=metrics.prompt_tokens,
            generation_tokens=metrics.output_tokens,
            prefix_queries=metrics.prompt_tokens if self.entry.engine.prefix_cache else 0,
            prefix_hits=metrics.cached_tokens,
            preemptions=metrics.preemptions,
            token_gaps=metrics.token_gaps,
        )
        if not self._thread.is_alive():
            return EngineStatus(False, 0, 0, metrics.progress, counts=counts)
        waiting = len(self._inbox) + len(parts.scheduler.waiting)
        # active_pages and not the cache itself, which the engine thread changes
        usage = metrics.active_pages / parts.cache.num_pages
        running = len(parts.outputs.by_id)
        return EngineStatus(
            True,
            running,
            waiting,
            metrics.progress,
            parts.max_context,
            usage,
            counts,
            parts.prompts.takes_images,
        )

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._parts is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._parts.free()

    # ----- the engine thread

    def _run(self) -> None:
        # torch keeps this number for each calling thread
        torch.set_num_threads(self.parts.torch_threads)
        failure = Failed.of(EngineStopped())
        try:
            while not self._closing:
                if not self.step():
                    self._wake.wait()
                    self._wake.clear()
            failure = Failed.of(ShuttingDown())
        except BaseException:
            log.exception("the engine thread of %s died", self.entry.name)
        finally:
            self._fail_all(failure)

    def step(self) -> bool:
        """Admit, schedule, compute, emit. Returns whether there was anything to compute."""
        started, decoded_rows = time.perf_counter(), self.metrics.decoded_rows
        self._admit()
        assert self._executor is not None
        worked = self._executor.work()
        self._emit()
        now = time.perf_counter()
        self.metrics.step_seconds += now - started
        # a row that decodes got its last token in the step before this one, if there was none in between
        if rows := self.metrics.decoded_rows - decoded_rows:
            self.metrics.token_gaps.add(now - min(self._stepped_at, started), rows)
        self._stepped_at = now if worked else math.inf
        self.metrics.preemptions = self.parts.scheduler.preemptions
        self.metrics.active_pages = self.parts.cache.num_active
        return worked

    def _admit(self) -> None:
        """Put new requests into the scheduler's queue, and end cancelled ones."""
        outputs = self.parts.outputs
        while self._inbox:
            outputs.add(self._inbox.popleft())
        if not self._cancels:
            return
        with self._lock:
            # an id that isn't here yet is still in `submit`
            here = {key: reason for key, reason in self._cancels.items() if key in outputs.by_id}
            for key in here:
                del self._cancels[key]
        for key, reason in here.items():
            outputs.cancel(outputs.by_id[key], reason)

    def _emit(self) -> None:
        events = self.parts.outputs.take_events()
        if not events:
            return
        try:
            self._callback(events)
        except Exception:
            log.exception("emit failed for %d events", len(events))
            self._fail_incomplete(dict.fromkeys(request_id for request_id, _ in events))

    def _fail_incomplete(self, request_ids: Iterable[str]) -> None:
        """End requests whose events were lost, so that no answer misses a part; the others go on.

        Raises what emit raises if the ends can't be sent either. The engine's thread ends then, which the
        worker notices.
        """
        outputs, failure = self.parts.outputs, Failed.of(EngineError())
        for request_id in request_ids:
            if request_id in outputs.by_id:
                outputs.fail(outputs.by_id[request_id], failure)
        outputs.take_events()
        self._callback([(request_id, failure) for request_id in request_ids])

    def _fail_all(self, failure: Failed) -> None:
        """End every request as the thread ends, so that no caller waits indefinitely."""
        outputs = self.parts.outputs
        with self._lock:
            self._closed = True
        while self._inbox:
            outputs.add(self._inbox.popleft())
        for request in list(outputs.by_id.values()):
            outputs.fail(request, failure)
        self._emit()

    def _forget(self, request_id: str) -> None:
        """Ignore cancellations of a request from now on: it has ended."""
        with self._lock:
            self._open.discard(request_id)
            self._cancels.pop(request_id, None)
