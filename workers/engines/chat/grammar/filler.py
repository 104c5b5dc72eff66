"""Finds out which tokens the rows of a step may have, while the model computes their logits."""

import threading
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor

from workers.engines.chat.grammar.ends import exclude_ends, unwanted_ends
from workers.engines.chat.grammar.matcher import Grammar, panics_as_errors
from workers.engines.chat.sampling.masks import Masks
from workers.engines.chat.sequence import Sequence

TRIES = 8
"""How many tokens are asked for before a mask is filled after all, which takes longer."""

MOST_LATE = 16
"""How many tokens a row takes without a mask. Each mask renews what llguidance may spend on a text."""


class MaskThreads:
    """Fill masks without the interpreter's lock."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._executor: LLExecutor | None = None

    def fill(self, rows: dict[int, Sequence], bits: np.ndarray) -> None:
        """Fill the masks of rows, by place in bits, int32 [all rows, words]. Returns when that is done."""
        self._executor = self._executor or LLExecutor(num_threads=self.count)
        grammars = {at: grammar_of(row) for at, row in rows.items()}
        matchers = [(grammar.matcher, at) for at, grammar in grammars.items()]
        for grammar in grammars.values():
            grammar.late = 0
        self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, bits.strides[0], len(bits))


class MaskFiller:
    """Begins to fill the masks of a step.

    If the sampler takes late masks, those of greedy rows come last, and filling ends with the forward pass.
    Asking for one token takes a hundredth of a mask's time, and most often one of the best is allowed.
    """

    def __init__(self, words: int, threads: int, *, late: bool) -> None:
        """`words`: of 32 bits, of a mask. `late`: whether the sampler takes late masks."""
        self._words = words
        self._late = late
        self._threads = MaskThreads(threads)
        self._bits = np.empty((0, words), np.int32)
        """The masks of a step, which the next one overwrites: new memory is mapped page by page."""
        # the threads' caller waits for them
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="grammar masks")

    def start(self, sequences: Iterable[Sequence]) -> "PendingMasks | None":
        """Begin with the masks of the sequences that have a grammar. None if there are none."""
        rows = [sequence for sequence in sequences if sequence.grammar is not None]
        if not rows:
            return None
        known = [row for row in rows if row.output]
        if len(self._bits) < len(known):
            self._bits = np.empty((len(known), self._words), np.int32)
        pending = PendingMasks(known, self._bits[: len(known)], self._threads)
        if known:
            pending.unfilled = self._caller.submit(pending.fill, late=self._late)
        return pending

    def close(self) -> None:
        self._caller.shutdown()


class PendingMasks:
    """The masks of a step. A choice without output has the first mask of its grammar."""

    def __init__(self, rows: list[Sequence], bits: np.ndarray, threads: MaskThreads) -> None:
        """bits int32 [rows, words], valid after `stop`, but for `unfilled`."""
        self._rows = rows
        self._bits = bits
        self._threads = threads
        self._stopped = threading.Event()
        self.unfilled: Future[set[Sequence]] | None = None
        """The rows whose masks were not filled; None: all are."""

    def fill(self, *, late: bool) -> set[Sequence]:
        """Fill the masks. Returns the rows that were left out, if masks may be late, because of `stop`."""
        rows = dict(enumerate(self._rows))
        may_be_late = [late and row.sampling.greedy for row in self._rows]
        if first := {at: row for at, row in rows.items() if not may_be_late[at]}:
            self._threads.fill(first, self._bits)
        last = sorted(
            (at for at in rows if may_be_late[at]), key=lambda at: grammar_of(rows[at]).late, reverse=True
        )
        while last and not self._stopped.is_set():
            # few at once: the engine thread waits for them
            now, last = last[: self._threads.count], last[self._threads.count :]
            self._threads.fill({at: rows[at] for at in now}, self._bits)
        return {rows[at] for at in last}

    def stop(self) -> None:
        """Return when no thread uses the rows' grammars any more. Raises EngineError for a panic."""
        self._stopped.set()
        if self.unfilled is not None:
            with panics_as_errors():
                self.unfilled.result()

    def of(self, rows: list[Sequence]) -> Masks | None:
        """Return the masks of a step's rows, which may have forks that `MaskFiller.start` did not know."""
        masked = [at for at, row in enumerate(rows) if row.grammar is not None]
        if not masked:
            return None
        constrained = [rows[at] for at in masked]
        bits = self._bits
        if constrained != self._rows:
            known = dict(zip(self._rows, bits, strict=True))
            bits = np.stack([known.get(row, grammar_of(row).first) for row in constrained])
        unfilled = self.unfilled.result() if self.unfilled is not None else set()
        late = {at: row for at, row in enumerate(constrained) if row in unfilled}
        exclude_ends(bits, {at: row for at, row in enumerate(constrained) if at not in late})
        return Masks(np.array(masked), bits, LateRows(late, self._threads) if late else None)


def grammar_of(row: Sequence) -> Grammar:
    """Return the grammar of a row that has one."""
    assert row.grammar is not None
    return row.grammar


class LateRows:
    """Implements LateMasks."""

    def __init__(self, rows: dict[int, Sequence], threads: MaskThreads) -> None:
        self._rows = rows
        self._threads = threads

    def __contains__(self, mask: object) -> bool:
        return mask in self._rows

    def best(self, mask: int, logits: np.ndarray) -> int | None:
        """Implements LateMasks.best."""
        row = self._rows[mask]
        grammar, unwanted = grammar_of(row), unwanted_ends(row)
        if grammar.late >= MOST_LATE:
            return None
        grammar.late += 1
        forced = grammar.forced()
        if forced is not None and forced not in grammar.ends:
            return forced
        for _ in range(TRIES):
            token = int(logits.argmax())
            # a mask keeps its unwanted ends if it has nothing else
            if token in unwanted or not np.isfinite(logits[token]):
                return None
            allowed = grammar.allows(token)
            if allowed is not False:
                return token if allowed else None
            logits[token] = -np.inf
        return None

    def fill(self, masks: ListOf[int], allowed: np.ndarray) -> None:
        """Implements LateMasks.fill. Raises EngineError for a panic."""
        rows = {at: self._rows[at] for at in masks}
        with panics_as_errors():
            self._threads.fill(rows, allowed)
        exclude_ends(allowed, rows)
