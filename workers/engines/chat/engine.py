"""The chat engine: one thread that decodes all requests together, one `step` after another.

submit (any thread): template, tokens, inbox. Engine thread: inbox -> scheduler -> model -> sampler -> events, one `emit`
for each step. Knows neither Celery nor Redis nor HTTP.
"""

import logging
import threading
import time
from collections import deque

import torch

from catalogue import ChatModelEntry
from protocol.errors import EngineError, ServiceError, ShuttingDown, WorkerLost
from protocol.events import Failed
from protocol.jobs import ChatJob, Job
from workers.engines.base import CancelReason, Emit, EngineStatus
from workers.engines.chat.build import Assembly, assemble
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.model.runner import Chunk
from workers.engines.chat.outputs import OpenRequests
from workers.engines.chat.sampling.sampler import Sampled
from workers.engines.chat.scheduler import Work
from workers.engines.chat.sequence import Request, Sequence
from workers.engines.failures import failure_of

log = logging.getLogger(__name__)


class ChatEngine:
    """Engine of a decoder-only language model (workers.engines.base.Engine)."""

    def __init__(self, entry: ChatModelEntry) -> None:
        self.entry = entry
        self.options = entry.engine
        self.metrics = Metrics()
        self._inbox: deque[Request] = deque()
        self._cancels: dict[str, CancelReason] = {}
        self._open: set[str] = set()
        """Ids whose last event is still to come, from the start of `submit` on."""
        self._wake = threading.Event()
        self._closing = False
        self._closed = False
        """No request is taken any more: closed, or the thread is dead."""
        self._lock = threading.Lock()
        """Guards _open, _cancels, _inbox and _closed, so that no request falls between two threads."""
        self._thread: threading.Thread | None = None

    def load(self, emit: Emit) -> None:
        self._emit = emit
        self._parts: Assembly = assemble(self.entry)
        self._requests = OpenRequests(
            self._parts.scheduler, self._parts.prompts.vocabulary, self.metrics, self._forget
        )
        self._thread = threading.Thread(target=self._run, name=f"chat-engine {self.entry.name}", daemon=True)
        self._thread.start()

    @property
    def max_context(self) -> int:
        return self._parts.max_context

    @property
    def kv_cache_tokens(self) -> int:
        """The KV cache's budget."""
        return self._parts.cache.num_pages * self._parts.cache.page_size

    def submit(self, job: Job) -> None:
        assert isinstance(job, ChatJob)
        with self._lock:
            self._open.add(job.id)
            closed = self._closed
        try:
            if closed:
                raise ShuttingDown
            request = self._parts.prompts.build(job)
            with self._lock:
                if not self._closed:
                    self._inbox.append(request)
                    self._wake.set()
                    return
            raise ShuttingDown
        except ServiceError as error:
            failed = Failed.of(error)
        except Exception:
            log.exception("request %s could not be prepared", job.id)
            failed = Failed.of(EngineError("the request could not be prepared"))
        with self._lock:
            self._open.discard(job.id)
            self._cancels.pop(job.id, None)
        self._emit([(job.id, failed)])

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        with self._lock:
            if request_id in self._open:
                self._cancels[request_id] = reason
        self._wake.set()

    def status(self) -> EngineStatus:
        alive = self._thread is not None and self._thread.is_alive()
        waiting = len(self._inbox) + len(self._parts.scheduler.waiting) if alive else 0
        running = len(self._requests.by_id) if alive else 0
        return EngineStatus(alive, running, waiting, self.metrics.steps)

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._parts.free()

    # the engine thread

    def _run(self) -> None:
        # torch counts its threads by calling thread
        torch.set_num_threads(self._parts.torch_threads)
        failure = Failed.of(WorkerLost())
        try:
            while not self._closing:
                if not self.step():
                    self._wake.wait()
                    self._wake.clear()
            failure = Failed.of(ShuttingDown())
        except BaseException:
            log.exception("the chat engine of %s is dead", self.entry.name)
        finally:
            self._end_all(failure)

    def step(self) -> bool:
        """One turn: take in, pick, compute, choose tokens, send. False: there was nothing to do."""
        started = time.perf_counter()
        self._take_in()
        work = self._parts.scheduler.schedule()
        if work:
            self._compute(work)
        self._send()
        self.metrics.step_seconds += time.perf_counter() - started
        self.metrics.preemptions = self._parts.scheduler.preemptions
        self.metrics.active_pages = self._parts.cache.num_active
        return bool(work)

    def _take_in(self) -> None:
        """New requests into the queue, cancelled ones out."""
        while self._inbox:
            self._requests.add(self._inbox.popleft())
        if not self._cancels:
            return
        with self._lock:
            here = {key: reason for key, reason in self._cancels.items() if key in self._requests.by_id}
            for key in here:
                del self._cancels[key]
        for key, reason in here.items():
            self._requests.cancel(self._requests.by_id[key], reason)

    def _compute(self, work: Work) -> None:
        """Run the step. Where it fails, run its parts one by one, so that only those fail that can't run."""
        try:
            self._forward(work)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            log.exception("a step failed; its parts are tried one by one")
            for part in work.parts():
                # a request that failed in an earlier part is gone with all its choices
                if all(sequence.slot >= 0 for sequence in part.sequences()):
                    self._compute_part(part)

    def _compute_part(self, part: Work) -> None:
        try:
            self._forward(part)
        except Exception as error:
            (sequence,) = part.sequences()
            self.metrics.failures += 1
            self._requests.fail(sequence.request, failure_of(error))

    def _forward(self, work: Work) -> None:
        chunks = [_chunk(sequence, 1) for sequence in work.decode]
        chunks += [_chunk(sequence, count) for sequence, count in work.prefill]
        try:
            rows, chosen = self._choose(work, chunks)
        except BaseException:
            # nothing was said: as before the step, so that its parts can be tried one by one
            for sequence, chunk in zip(work.sequences(), chunks, strict=True):
                sequence.computed = chunk.start
            self._parts.scheduler.rewind_forks()
            raise
        for sequence, sampled in zip(rows, chosen, strict=True):
            try:
                self._requests.advance(sequence, sampled)
            except Exception:
                log.exception("request %s: a token could not be taken in", sequence.request.id)
                self.metrics.failures += 1
                self._requests.fail(sequence.request, Failed.of(EngineError()))

    def _choose(self, work: Work, chunks: list[Chunk]) -> tuple[list[Sequence], list[Sampled]]:
        """Run the model; the sequences that are computed to their end, and a token for each."""
        started = time.perf_counter()
        logits = self._parts.runner.forward(chunks)
        self.metrics.model_seconds += time.perf_counter() - started
        self._count(work)
        for sequence, chunk in zip(work.sequences(), chunks, strict=True):
            sequence.computed = chunk.end
        rows = [sequence for sequence in work.sequences() if sequence.uncomputed == 0]
        rows, logits = self._fork_choices(rows, logits)
        return rows, self._parts.sampler.sample(logits, rows) if rows else []

    def _count(self, work: Work) -> None:
        metrics = self.metrics
        metrics.steps += 1
        metrics.prefill_chunks += len(work.prefill)
        metrics.prefill_tokens += sum(count for _, count in work.prefill)
        if work.decode:
            metrics.decode_steps += 1
            metrics.decoded_rows += len(work.decode)
            metrics.max_batch = max(metrics.max_batch, len(work.decode))

    def _fork_choices(
        self, rows: list[Sequence], logits: torch.Tensor
    ) -> tuple[list[Sequence], torch.Tensor]:
        """Prompts that are just computed: keep them for others, and let a request's other choices start from them."""
        scheduler = self._parts.scheduler
        all_rows, sources = list(rows), list(range(len(rows)))
        for at, sequence in enumerate(rows):
            if sequence.output:
                continue
            scheduler.remember(sequence)
            self.metrics.cached_tokens += sequence.request.cached_tokens if sequence.index == 0 else 0
            if sequence.index > 0:
                continue
            for sibling in sequence.request.sequences[1:]:
                if scheduler.knows(sibling):
                    continue
                if scheduler.fork(sequence, sibling):
                    all_rows.append(sibling)
                    sources.append(at)
                else:
                    scheduler.add(sibling)
        return all_rows, logits if len(all_rows) == len(rows) else logits[sources]

    def _send(self) -> None:
        events = self._requests.take_events()
        if not events:
            return
        try:
            self._emit(events)
        except Exception:
            # whoever takes the events has lost them; the engine serves the others
            log.exception("emit failed for %d events", len(events))

    def _end_all(self, failure: Failed) -> None:
        """The thread ends: nobody may wait for ever."""
        with self._lock:
            self._closed = True
        while self._inbox:
            self._requests.add(self._inbox.popleft())
        for request in list(self._requests.by_id.values()):
            self._requests.fail(request, failure)
        self._send()

    def _forget(self, request_id: str) -> None:
        """Its last event is on its way: cancelling it means nothing any more."""
        with self._lock:
            self._open.discard(request_id)
            self._cancels.pop(request_id, None)


def _chunk(sequence: Sequence, count: int) -> Chunk:
    end = sequence.computed + count
    return Chunk(
        sequence.slot, sequence.computed, sequence.tokens(sequence.computed, end), end == sequence.length
    )
