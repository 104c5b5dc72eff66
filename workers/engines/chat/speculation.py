"""Speculative decoding by n-gram lookup: drafts are what followed the last tokens before (prompt lookup).

A step computes a sequence's next token and the drafts after it as decode rows of their own, and samples each.
A sampled token depends on the request's seed, the choice and the position alone, so a draft is right if it is
the token that was sampled before it: the text is the same as without drafts.
"""

from workers.engines.chat.cache.kv_cache import KVCache, OutOfPages
from workers.engines.chat.scheduler import ScheduledBatch
from workers.engines.chat.sequence import Sequence

NGRAM = 3
"""Tokens that must be the same. Shorter ones are found more often, but what follows is seldom right."""


class NgramIndex:
    """Where each n-gram of a sequence occurred last."""

    __slots__ = ("_after", "_tokens")

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """n-gram -> position of the token after it; the n-gram at the very end is not included."""

    def extend(self, tokens: list[int]) -> None:
        """Add the sequence's next tokens."""
        for token in tokens:
            if len(self._tokens) >= NGRAM:
                self._after[tuple(self._tokens[-NGRAM:])] = len(self._tokens)
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def following(self, count: int) -> list[int]:
        """Return the `count` tokens that followed the last n-gram when it occurred before; [] if it did not.

        If it occurred less than `count` tokens ago, what followed is repeated.
        """
        start = self._after.get(tuple(self._tokens[-NGRAM:]))
        if start is None:
            return []
        period = len(self._tokens) - start
        return [self._tokens[start + at % period] for at in range(count)]


class NgramDrafter:
    """Adds drafts to batches."""

    def __init__(self, cache: KVCache, num_tokens: int, max_rows: int) -> None:
        """`num_tokens`: the largest number of drafts of a sequence. `max_rows`: of a step's decode rows."""
        self._cache = cache
        self._num_tokens = num_tokens
        self._max_rows = max_rows

    def add_drafts(self, batch: ScheduledBatch) -> None:
        """Give the batch's decode rows drafts while there are rows and free pages."""
        rows = len(batch.decode)
        for sequence in batch.decode:
            if rows >= self._max_rows:
                return
            drafts = self._propose(sequence, self._max_rows - rows)
            if drafts:
                batch.drafts[sequence] = drafts
                rows += len(drafts)

    def _propose(self, sequence: Sequence, room: int) -> list[int]:
        sampling = sequence.sampling
        # penalties and grammars depend on the tokens before, which are not known yet
        if sampling.penalised or sequence.grammar is not None or not sequence.output:
            return []
        index = sequence.ngrams = sequence.ngrams or NgramIndex()
        index.extend(sequence.tokens(len(index), sequence.length))
        left = sampling.max_tokens - len(sequence.output) - 1
        # a sequence whose drafts are right gets more of them
        count = min(self._num_tokens, 2 * sequence.accepted_drafts + 2, left, room)
        drafts = index.following(count) if count > 0 else []
        try:
            self._cache.grow(sequence.slot, sequence.length + len(drafts))
        except OutOfPages:
            return []
        return drafts
