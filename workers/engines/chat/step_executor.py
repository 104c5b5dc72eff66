"""Computes steps: which sequences, the forward pass, their next tokens, and what happens if one fails."""

import logging
import time

import torch

from workers.engines.chat.build import EngineParts
from workers.engines.chat.metrics import Metrics
from workers.engines.chat.pipeline import LaunchedStep
from workers.engines.chat.sampling.scoring import score
from workers.engines.chat.scheduler import ScheduledBatch
from workers.engines.chat.sequence import Chunk, Sequence, SequenceStatus
from workers.engines.failures import failure_of, free_memory

log = logging.getLogger(__name__)


class StepExecutor:
    """Used by the engine thread only."""

    def __init__(self, parts: EngineParts, metrics: Metrics) -> None:
        self._parts = parts
        self._metrics = metrics
        self._launched: LaunchedStep | None = None
        """A step whose tokens have not been read (pipeline.py). None on a CPU."""

    def work(self) -> bool:
        """Compute one step. Returns False if there was nothing to compute or to read."""
        launched, self._launched = self._launched, None
        if launched is not None:
            self._launch_after(launched)
            self._read(launched)
            if self._launched is not None:
                return True
        batch = self._parts.scheduler.schedule()
        if self._parts.drafter is not None:
            self._parts.drafter.add_drafts(batch)
        if batch and self._parts.pipeline is not None and self._parts.pipeline.suits(batch):
            self._launch(batch)
        elif batch:
            self._compute(batch)
        return bool(batch) or launched is not None

    def _launch(self, batch: ScheduledBatch) -> None:
        assert self._parts.pipeline is not None
        try:
            self._launched = self._parts.pipeline.launch(batch)
        except Exception:
            # nothing has changed; where the fault lies shows when it is computed in the usual way
            log.exception("a step could not be launched")
            free_memory()
            self._compute(batch)
            return
        self._count(batch)

    def _launch_after(self, launched: LaunchedStep) -> None:
        assert self._parts.pipeline is not None
        try:
            self._launched = self._parts.pipeline.launch_after(launched)
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
                self._parts.outputs.advance(sequence, token, None)
            except Exception as error:
                self._fail(sequence, error)

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
        self._metrics.failures += 1
        self._parts.outputs.fail(sequence.request, failure_of(error))

    def _advance(self, batch: ScheduledBatch) -> None:
        """Compute the batch, and give each sequence that is then fully computed its next token."""
        chunks = batch.chunks()
        try:
            pending = self._parts.masks.start(_with_grammar(batch, chunks))
            try:
                rows, logits = self._forward(batch, chunks)
            finally:
                if pending is not None:
                    pending.stop()
            masks = pending.of(rows) if pending is not None else None
            ahead, drafted = _ahead(batch, chunks)
            tokens, logprobs = self._parts.sampler.sample(logits, rows, ahead, masks) if rows else ([], {})
        except BaseException:
            # no token was added: restore the state before the step, so that its parts can be tried one by one
            for sequence, chunk in zip(reversed(batch.sequences()), reversed(chunks), strict=True):
                sequence.computed = chunk.start
            self._parts.scheduler.rewind_forks()
            raise
        for at, (sequence, token) in enumerate(zip(rows, tokens, strict=True)):
            if at in drafted and not self._accept(sequence, drafted[at]):
                continue
            try:
                self._parts.outputs.advance(sequence, token, logprobs.get(at))
            except Exception as error:
                self._fail(sequence, error)

    def _accept(self, sequence: Sequence, draft: Chunk) -> bool:
        """Whether a draft is the token that was sampled for its position, so that the next one counts."""
        running = sequence.status is SequenceStatus.RUNNING
        if not running or draft.start != sequence.length - 1 or draft.tokens[0] != sequence.output[-1]:
            return False
        sequence.computed = draft.end
        sequence.accepted_drafts += 1
        self._metrics.accepted_drafts += 1
        return True

    def _forward(self, batch: ScheduledBatch, chunks: list[Chunk]) -> tuple[list[Sequence], torch.Tensor]:
        """Run the model.

        Returns the sequences that are now fully computed, and their logits [sequences, vocabulary].
        """
        started = time.perf_counter()
        logits = self._parts.runner.forward(chunks)
        self._metrics.model_seconds += time.perf_counter() - started
        self._count(batch)
        sequences = batch.sequences()
        for sequence, chunk in zip(sequences, chunks, strict=True):
            if chunk.start < sequence.length:  # the others are drafts
                sequence.computed = chunk.end
        if batch.prefill and any(chunk.scored for chunk in chunks[-len(batch.prefill) :]):
            logits = self._score(sequences, chunks, logits)
        return self._fork_choices([sequence for sequence in sequences if sequence.uncomputed == 0], logits)

    def _score(self, sequences: list[Sequence], chunks: list[Chunk], logits: torch.Tensor) -> torch.Tensor:
        """Report the log probabilities of prompt tokens that the step has computed.

        `sequences`: those of the chunks. Returns the logits of the sequences that are fully computed and
        still run.
        """
        last_rows, following = [], []
        row = 0
        for sequence, chunk in zip(sequences, chunks, strict=True):
            if chunk.scored:
                tokens = sequence.request.prompt[chunk.start + 1 : chunk.end + 1]
                following.append((sequence.request, chunk.start + 1, slice(row, row + len(tokens)), tokens))
            row += chunk.logit_rows
            last_rows.append(row - 1)
        # all are computed before the first is sent: if one fails, the step is repeated
        scores = [
            score(logits[rows], tokens, request.sampling.logprobs or 0, self._parts.sampled_tokens)
            for request, _, rows, tokens in following
        ]
        for (request, start, _, _), own in zip(following, scores, strict=True):
            self._parts.outputs.score(request, start, own)
        kept = [row for sequence, row in zip(sequences, last_rows, strict=True) if sequence.uncomputed == 0]
        return logits[kept]

    def _count(self, batch: ScheduledBatch) -> None:
        metrics = self._metrics
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
        scheduler = self._parts.scheduler
        all_rows, forked = list(rows), []
        for at, sequence in enumerate(rows):
            if sequence.output:
                continue
            scheduler.remember(sequence)
            if sequence.index > 0:
                continue
            self._metrics.prompt_tokens += len(sequence.request.prompt)
            self._metrics.cached_tokens += sequence.request.cached_tokens
            for sibling in sequence.request.sequences[1:]:
                if sibling.status is not SequenceStatus.NEW:
                    continue
                if scheduler.fork(sequence, sibling):
                    all_rows.append(sibling)
                    forked.append(at)
                else:
                    scheduler.add(sibling)
        return all_rows, with_copies(logits, forked) if forked else logits


def with_copies(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return the logits and, after them, those of `rows` again.

    By slices: a list as index goes to the device first, and the host waits for that.
    """
    return torch.cat([logits, *(logits[row : row + 1] for row in rows)])


def _with_grammar(batch: ScheduledBatch, chunks: list[Chunk]) -> list[Sequence]:
    """The sequences that a grammar constrains and that get a token in this step."""
    sequences = batch.sequences()
    return [
        sequence
        for sequence, chunk in zip(sequences, chunks, strict=True)
        if sequence.grammar is not None and chunk.wants_logits
    ]


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
