"""Finds out which tokens the rows of a step may have, while the model computes their logits."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor

from workers.engines.chat.sampling.masks import Masks
from workers.engines.chat.sequence import Sequence


class MaskFiller:
    """Fills masks in threads of its own, without the interpreter's lock."""

    def __init__(self, words: int, threads: int) -> None:
        """`words`: of 32 bits, of a mask."""
        self._words = words
        self._threads = threads
        self._executor: LLExecutor | None = None
        # calling the executor waits for its threads
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="grammar masks")

    def start(self, sequences: Iterable[Sequence]) -> "PendingMasks | None":
        """Begin with the masks of the sequences that have a grammar. None if there are none."""
        rows = [sequence for sequence in sequences if sequence.grammar is not None]
        if not rows:
            return None
        known = [row for row in rows if row.output]
        if not known:
            return PendingMasks([], None)
        self._executor = self._executor or LLExecutor(num_threads=self._threads)
        bits = np.empty((len(known), self._words), np.int32)
        matchers = [(row.grammar.matcher, at) for at, row in enumerate(known) if row.grammar is not None]
        future = self._caller.submit(
            self._executor.unsafe_compute_mask_ptr,
            matchers,
            bits.ctypes.data,
            4 * self._words,
            len(known),
        )
        return PendingMasks(list(zip(known, bits, strict=True)), future)

    def close(self) -> None:
        self._caller.shutdown()


class PendingMasks:
    """The masks of a step. A choice without output has the first mask of its grammar."""

    def __init__(self, bits: list[tuple[Sequence, np.ndarray]], future: "Future[None] | None") -> None:
        """bits: for each sequence with output its mask, int32 [words], valid once `future` is done."""
        self._bits = dict(bits)
        self._future = future

    def wait(self) -> None:
        """Return when no thread uses the rows' grammars any more."""
        if self._future is not None:
            self._future.result()

    def of(self, rows: list[Sequence]) -> Masks | None:
        """Return the masks of a step's rows, which may have forks that `start` did not know."""
        masked, bits = [], []
        for at, row in enumerate(rows):
            if row.grammar is None:
                continue
            masked.append(at)
            bits.append(without(self._bits.get(row, row.grammar.first), unwanted_ends(row)))
        return Masks(np.array(masked), np.stack(bits)) if masked else None


def unwanted_ends(row: Sequence) -> frozenset[int]:
    """The tokens that would end a choice too early, as min_tokens and ignore_eos say."""
    assert row.grammar is not None
    stops, ends = row.sampling.stop_token_ids, row.grammar.ends
    return stops | ends if len(row.output) < row.sampling.min_tokens else ends - stops


def without(bits: np.ndarray, tokens: frozenset[int]) -> np.ndarray:
    """Return a mask, int32 [words], without these tokens, unless it allows no others."""
    if not tokens:
        return bits
    kept = bits.copy()
    for token in tokens:
        kept[token // 32] &= ~np.int32(1 << token % 32) if token % 32 < 31 else np.int32(2**31 - 1)
    return kept if kept.any() else bits
