"""Finds out which tokens the rows of a step may have, while the model computes their logits."""

from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor

from workers.engines.chat.grammar.matcher import panics_as_errors
from workers.engines.chat.sampling.masks import Masks
from workers.engines.chat.sequence import Sequence


class MaskFiller:
    """Fills masks in threads of its own, without the interpreter's lock."""

    def __init__(self, words: int, threads: int) -> None:
        """`words`: of 32 bits, of a mask."""
        self._words = words
        self._threads = threads
        self._executor: LLExecutor | None = None
        self._bits = np.empty((0, words), np.int32)
        """The masks of a step, which the next one overwrites: new memory is mapped page by page."""
        # calling the executor waits for its threads
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="grammar masks")

    def start(self, sequences: Iterable[Sequence]) -> "PendingMasks | None":
        """Begin with the masks of the sequences that have a grammar. None if there are none."""
        rows = [sequence for sequence in sequences if sequence.grammar is not None]
        if not rows:
            return None
        known = [row for row in rows if row.output]
        if not known:
            return PendingMasks([])
        self._executor = self._executor or LLExecutor(num_threads=self._threads)
        if len(self._bits) < len(known):
            self._bits = np.empty((len(known), self._words), np.int32)
        bits = self._bits[: len(known)]
        matchers = [(row.grammar.matcher, at) for at, row in enumerate(known) if row.grammar is not None]
        future = self._caller.submit(
            self._executor.unsafe_compute_mask_ptr,
            matchers,
            bits.ctypes.data,
            4 * self._words,
            len(known),
        )
        return PendingMasks(known, bits, future)

    def close(self) -> None:
        self._caller.shutdown()


class PendingMasks:
    """The masks of a step. A choice without output has the first mask of its grammar."""

    def __init__(
        self, rows: list[Sequence], bits: np.ndarray | None = None, future: "Future[None] | None" = None
    ) -> None:
        """bits int32 [rows, words], valid once `future` is done; both None without rows."""
        self._rows = rows
        self._bits = bits
        self._future = future

    def wait(self) -> None:
        """Return when no thread uses the rows' grammars any more. Raises EngineError for a panic."""
        if self._future is not None:
            with panics_as_errors():
                self._future.result()

    def of(self, rows: list[Sequence]) -> Masks | None:
        """Return the masks of a step's rows, which may have forks that `start` did not know."""
        masked = [at for at, row in enumerate(rows) if row.grammar is not None]
        if not masked:
            return None
        constrained = [rows[at] for at in masked]
        bits = self._bits
        if bits is None or constrained != self._rows:
            known = dict(zip(self._rows, bits, strict=True)) if bits is not None else {}
            bits = np.stack([known.get(row, row.grammar.first) for row in constrained if row.grammar])
        rows_of_ends: defaultdict[frozenset[int], list[int]] = defaultdict(list)
        for at, row in enumerate(constrained):
            rows_of_ends[unwanted_ends(row)].append(at)
        for ends, places in rows_of_ends.items():
            for at in _with_any(ends, bits, places):
                exclude(bits[at], ends)
        return Masks(np.array(masked), bits)


def unwanted_ends(row: Sequence) -> frozenset[int]:
    """The tokens that would end a choice too early, as min_tokens and ignore_eos say."""
    assert row.grammar is not None
    stops, ends = row.sampling.stop_token_ids, row.grammar.ends
    return stops | ends if len(row.output) < row.sampling.min_tokens else ends - stops


def _with_any(tokens: frozenset[int], bits: np.ndarray, rows: list[int]) -> list[int]:
    """Return those of the rows whose mask allows one of the tokens; bits int32 [all rows, words].

    Seldom any, since within a value no end token is allowed, so this looks at all rows at once.
    """
    own = np.array(sorted(tokens), np.int64)
    found = bits.view(np.uint32)[np.ix_(np.array(rows), own // 32)] >> (own % 32).astype(np.uint32) & 1
    return [rows[at] for at in np.flatnonzero(found.any(1))]


def exclude(bits: np.ndarray, tokens: frozenset[int]) -> None:
    """Remove these tokens from a mask, int32 [words], unless it allows no others."""
    words = bits.view(np.uint32)
    before = bits.copy()
    for token in tokens:
        words[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
    if not bits.any():
        bits[:] = before
