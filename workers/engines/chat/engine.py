"""The chat engine: one thread that decodes all requests together, one `step` after another.

`submit` (any thread) applies the chat template, tokenizes, and puts the request into an inbox. The engine
thread takes it from there: scheduler, model, sampler, events. Each step calls `emit` once.
"""

import logging
import threading
import time
from collections import deque

import torch

from catalogue import ChatModelEntry
from protocol.errors import EngineStopped, ShuttingDown
from protocol.events import Failed
from protocol.jobs import ChatJob, Job
from workers.engines.base import CancelReason, Emit, EngineStatus
from workers.engines.chat.build import EngineParts, build_engine
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.pipeline import LaunchedStep
from workers.engines.chat.scheduler import ScheduledBatch
from workers.engines.chat.sequence import Chunk, Request, Sequence, SequenceStatus
from workers.engines.failures import failure_of, free_memory

log = logging.getLogger(__name__)


class ChatEngine:
    """Serves a decoder-only language model. Implements workers.engines.base.Engine."""

    def __init__(self, entry: ChatModelEntry, gpu_share: float = 1.0) -> None:
        """`gpu_share`: the part of the GPU's memory that this process may use."""
        self.entry = entry
        self._gpu_share = gpu_share
        self.metrics = Metrics()
        self._parts: EngineParts | None = None
        self._callback: Emit = lambda events: None
        """Takes the events: the argument of `load`."""
        self._inbox: deque[Request] = deque()
        self._cancels: dict[str, CancelReason] = {}
        self._launched: LaunchedStep | None = None
        """A step whose tokens have not been read (pipeline.py). None on a CPU."""
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
        assert isinstance(job, ChatJob)
        with self._lock:
            self._open.add(job.id)
            closed = self._closed
        try:
            if closed:
                raise ShuttingDown
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
        if self._parts is None or not self._thread.is_alive():
            return EngineStatus(False, 0, 0, self.metrics.steps)
        waiting = len(self._inbox) + len(self._parts.scheduler.waiting)
        running = len(self._parts.outputs.by_id)
        return EngineStatus(True, running, waiting, self.metrics.steps, self._parts.max_context)

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
        started = time.perf_counter()
        self._admit()
        worked = self._work()
        self._emit()
        self.metrics.step_seconds += time.perf_counter() - started
        self.metrics.preemptions = self.parts.scheduler.preemptions
        self.metrics.active_pages = self.parts.cache.num_active
        return worked

    def _work(self) -> bool:
        """Compute one step. Returns False if there was nothing to compute or to read."""
        launched, self._launched = self._launched, None
        if launched is not None:
            self._launch_after(launched)
            self._read(launched)
            if self._launched is not None:
                return True
        batch = self.parts.scheduler.schedule()
        if self.parts.drafter is not None:
            self.parts.drafter.add_drafts(batch)
        if batch and self.parts.pipeline is not None and self.parts.pipeline.suits(batch):
            self._launch(batch)
        elif batch:
            self._compute(batch)
        return bool(batch) or launched is not None

    def _launch(self, batch: ScheduledBatch) -> None:
        assert self.parts.pipeline is not None
        try:
            self._launched = self.parts.pipeline.launch(batch)
        except Exception:
            # nothing has changed; where the fault lies shows when it is computed in the usual way
            log.exception("a step could not be launched")
            free_memory()
            self._compute(batch)
            return
        self._count(batch)

    def _launch_after(self, launched: LaunchedStep) -> None:
        assert self.parts.pipeline is not None
        try:
            self._launched = self.parts.pipeline.launch_after(launched)
        except Exception:
            log.exception("a step could not be launched")
            free_memory()
        if self._launched is not None:
            self._count(ScheduledBatch(self._launched.rows))

    def _read(self, launched: LaunchedStep) -> None:
        """Give the rows of a launched step their tokens, if they still run."""
        try:
            tokens = launched.tokens.read()
        except Exception:
            # the rows are computed again, in the usual way
            log.exception("a launched step failed")
            free_memory()
            self._launched = None
            return
        for sequence, chunk, token in zip(launched.rows, launched.chunks, tokens, strict=True):
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            sequence.computed = chunk.end
            try:
                self.parts.outputs.advance(sequence, token, None)
            except Exception as error:
                self._fail(sequence, error)

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

    def _compute(self, batch: ScheduledBatch) -> None:
        """Run the step. If it fails, run each sequence by itself, so that only those that can't run fail."""
        try:
            self._advance(batch)
        except Exception:
            log.exception("a step failed; its sequences are computed one by one")
            free_memory()
            for part in batch.split():
                (sequence,) = part.sequences()
                # an earlier part may have ended this one's request
                if sequence.status is SequenceStatus.RUNNING:
                    self._compute_alone(sequence, part)

    def _compute_alone(self, sequence: Sequence, part: ScheduledBatch) -> None:
        try:
            self._advance(part)
        except Exception as error:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self.metrics.failures += 1
        self.parts.outputs.fail(sequence.request, failure_of(error))

    def _advance(self, batch: ScheduledBatch) -> None:
        """Compute the batch, and give each sequence that is then fully computed its next token."""
        chunks = batch.chunks()
        try:
            rows, logits = self._forward(batch, chunks)
            ahead, drafted = _ahead(batch, chunks)
            tokens, logprobs = self.parts.sampler.sample(logits, rows, ahead) if rows else ([], {})
        except BaseException:
            # no token was added: restore the state before the step, so that its parts can be tried one by one
            for sequence, chunk in zip(reversed(batch.sequences()), reversed(chunks), strict=True):
                sequence.computed = chunk.start
            self.parts.scheduler.rewind_forks()
            raise
        for at, (sequence, token) in enumerate(zip(rows, tokens, strict=True)):
            if at in drafted and not self._accept(sequence, drafted[at]):
                continue
            try:
                self.parts.outputs.advance(sequence, token, logprobs.get(at))
            except Exception as error:
                self._fail(sequence, error)

    def _accept(self, sequence: Sequence, draft: Chunk) -> bool:
        """Whether a draft is the token that was sampled for its position, so that the next one counts."""
        running = sequence.status is SequenceStatus.RUNNING
        if not running or draft.start != sequence.length - 1 or draft.tokens[0] != sequence.output[-1]:
            return False
        sequence.computed = draft.end
        sequence.accepted_drafts += 1
        self.metrics.accepted_drafts += 1
        return True

    def _forward(self, batch: ScheduledBatch, chunks: list[Chunk]) -> tuple[list[Sequence], torch.Tensor]:
        """Run the model.

        Returns the sequences that are now fully computed, and their logits [sequences, vocabulary].
        """
        started = time.perf_counter()
        logits = self.parts.runner.forward(chunks)
        self.metrics.model_seconds += time.perf_counter() - started
        self._count(batch)
        sequences = batch.sequences()
        for sequence, chunk in zip(sequences, chunks, strict=True):
            if chunk.start < sequence.length:  # the others are drafts
                sequence.computed = chunk.end
        return self._fork_choices([sequence for sequence in sequences if sequence.uncomputed == 0], logits)

    def _count(self, batch: ScheduledBatch) -> None:
        metrics = self.metrics
        metrics.steps += 1
        metrics.prefill_chunks += len(batch.prefill)
        metrics.prefill_tokens += sum(count for _, count in batch.prefill)
        if batch.decode:
            metrics.decode_steps += 1
            metrics.decoded_rows += len(batch.decode)
            metrics.max_batch = max(metrics.max_batch, len(batch.decode))
        for sequence, drafts in batch.drafts.items():
            metrics.drafts += len(drafts)
            sequence.accepted_drafts = 0

    def _fork_choices(
        self, rows: list[Sequence], logits: torch.Tensor
    ) -> tuple[list[Sequence], torch.Tensor]:
        """Fork the other choices of requests whose prompts were just computed; cache these prompts.

        Returns rows and logits with the forks added.
        """
        scheduler = self.parts.scheduler
        all_rows, sources = list(rows), list(range(len(rows)))
        for at, sequence in enumerate(rows):
            if sequence.output:
                continue
            scheduler.remember(sequence)
            if sequence.index > 0:
                continue
            self.metrics.cached_tokens += sequence.request.cached_tokens
            for sibling in sequence.request.sequences[1:]:
                if sibling.status is not SequenceStatus.NEW:
                    continue
                if scheduler.fork(sequence, sibling):
                    all_rows.append(sibling)
                    sources.append(at)
                else:
                    scheduler.add(sibling)
        return all_rows, logits if len(all_rows) == len(rows) else logits[sources]

    def _emit(self) -> None:
        events = self.parts.outputs.take_events()
        if not events:
            return
        try:
            self._callback(events)
        except Exception:
            # these events are lost; the engine goes on with the other requests
            log.exception("emit failed for %d events", len(events))

    def _fail_all(self, failure: Failed) -> None:
        """The thread ends: end every request, so that no caller waits indefinitely."""
        outputs = self.parts.outputs
        with self._lock:
            self._closed = True
        while self._inbox:
            outputs.add(self._inbox.popleft())
        for request in list(outputs.by_id.values()):
            outputs.fail(request, failure)
        self._emit()

    def _forget(self, request_id: str) -> None:
        """The request has ended: from now on its cancellation is ignored."""
        with self._lock:
            self._open.discard(request_id)
            self._cancels.pop(request_id, None)


def _ahead(batch: ScheduledBatch, chunks: list[Chunk]) -> tuple[list[int] | None, dict[int, Chunk]]:
    """For each row that is sampled, how many tokens before it are not known yet; and the drafts, by row."""
    if not batch.drafts:
        return None, {}
    starts = [sequence.length - 1 for sequence in batch.sequences()]
    sampled = [
        (chunk, chunk.start - start)
        for chunk, start in zip(chunks, starts, strict=True)
        if chunk.wants_logits
    ]
    rows = [max(0, ahead) if len(chunk.tokens) == 1 else 0 for chunk, ahead in sampled]
    return rows, {at: sampled[at][0] for at, ahead in enumerate(rows) if ahead}
