"""Launches a decode step before the tokens of the one before have been read.

On a GPU the host would otherwise stand still while a step is computed, and the device while the host samples,
writes events and prepares the next step. The chosen tokens stay on the device and are the next step's input.
Whether a sequence ends with a token is known one step late: its row in the step launched meanwhile is
dropped. What that row has written lies behind the tokens that count, and everything launched later overwrites
it.
"""

from typing import NamedTuple

import numpy as np

from workers.engines.chat.cache.kv_cache import KVCache, OutOfPages
from workers.engines.chat.model.runner import Runner
from workers.engines.chat.model.uploads import Uploads
from workers.engines.chat.sampling.device import LaterTokens
from workers.engines.chat.sampling.sampler import Sampler
from workers.engines.chat.scheduler import BatchScheduler, ScheduledBatch
from workers.engines.chat.sequence import Chunk, Sequence, SequenceStatus


class LaunchedStep(NamedTuple):
    """A decode step whose tokens have not been read."""

    rows: list[Sequence]
    chunks: list[Chunk]
    tokens: LaterTokens


class DecodePipeline:
    """Launches decode steps that need nothing of the tokens before but themselves."""

    def __init__(
        self,
        cache: KVCache,
        scheduler: BatchScheduler,
        runner: Runner,
        sampler: Sampler,
    ) -> None:
        self._cache = cache
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._uploads = Uploads(cache.pool.device)

    @staticmethod
    def suits(batch: ScheduledBatch) -> bool:
        """Whether the tokens of a scheduled batch may be read later."""
        return (
            bool(batch.decode)
            and not batch.prefill
            and not batch.drafts
            # a sequence without output may have choices to fork
            and all(sequence.independent and sequence.output for sequence in batch.decode)
        )

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Launch a batch that `suits`."""
        chunks = batch.chunks()
        logits = self._runner.forward(chunks)
        return LaunchedStep(batch.decode, chunks, self._sampler.sample_later(logits, batch.decode, None))

    def launch_after(self, step: LaunchedStep) -> LaunchedStep | None:
        """Launch the step after `step`. None if the scheduler has other work, or pages are missing."""
        rows = [at for at, sequence in enumerate(step.rows) if _goes_on(sequence)]
        running = sum(sequence.status is SequenceStatus.RUNNING for sequence in step.rows)
        if not rows or running < len(self._scheduler.running) or self._scheduler.startable():
            return None
        sequences = [step.rows[at] for at in rows]
        ids = step.tokens.tokens
        try:
            for sequence in sequences:
                self._cache.grow(sequence.slot, sequence.length + 1)
        except OutOfPages:
            return None
        if len(rows) < len(step.rows):
            ids = ids.index_select(0, self._uploads.tensors([np.array(rows, np.int64)])[0])
        chunks = [
            Chunk(sequence.slot, sequence.length, [0], True, images=sequence.request.images)
            for sequence in sequences
        ]
        logits = self._runner.forward(chunks, ids)
        tokens = self._sampler.sample_later(logits, sequences, ids)
        return LaunchedStep(sequences, chunks, tokens)


def _goes_on(sequence: Sequence) -> bool:
    """Whether a sequence may have a token after the one that is not yet read."""
    if sequence.status is not SequenceStatus.RUNNING:
        return False
    return len(sequence.output) + 1 < sequence.sampling.max_tokens
