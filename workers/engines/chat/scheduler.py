"""Picks what each step computes: continuous batching over the KV cache's pages."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice

from workers.engines.chat.cache.kv_cache import KVCache, OutOfPages
from workers.engines.chat.cache.prefix_cache import Prefix, PrefixCache
from workers.engines.chat.sequence import Chunk, Sequence, SequenceStatus

SMALLEST_CHUNK = 16
"""Prompt tokens. Smaller chunks aren't worth a step's overhead, even if running streams wait a little."""

STALL = 1.5
"""Prefill may add this multiple of a decode step's time.

Gaps between tokens then stay under three times the usual one.
"""

BURST = 2
"""A step may be longer if it completes this many prompts for each row that it delays."""


@dataclass(slots=True)
class ScheduledBatch:
    """What one step computes: one token of each sequence in `decode`, several of each one in `prefill`."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    """Guesses of the tokens after the next one, for sequences of `decode` (speculation.py)."""
    scored: int = 0
    """Number of tokens of `prefill` whose logits are all needed."""

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    def sequences(self) -> list[Sequence]:
        """The sequence of each of `chunks`."""
        decode = self.decode
        if self.drafts:
            decode = [each for each in decode for _ in range(1 + len(self.drafts.get(each, ())))]
        return decode + [sequence for sequence, _ in self.prefill]

    def chunks(self) -> list[Chunk]:
        """The tokens to compute: decode rows first, each followed by its drafts."""
        decode = [sequence.last_token() for sequence in self.decode]
        if self.drafts:
            decode = [
                chunk
                for sequence, last in zip(self.decode, decode, strict=True)
                for chunk in (last, *self._draft_rows(sequence, last))
            ]
        return decode + [sequence.chunk(count) for sequence, count in self.prefill]

    def _draft_rows(self, sequence: Sequence, last: Chunk) -> list[Chunk]:
        drafts = self.drafts.get(sequence, ())
        return [
            Chunk(last.slot, last.end + at, [token], True, images=last.images)
            for at, token in enumerate(drafts)
        ]

    def split(self) -> list["ScheduledBatch"]:
        """The same work as batches of one sequence each."""
        decode = [ScheduledBatch(decode=[sequence]) for sequence in self.decode]
        return decode + [ScheduledBatch(prefill=[part]) for part in self.prefill]


class BatchScheduler:
    """First come, first served.

    A running sequence that needs a page when none is free preempts the youngest one. A preempted sequence
    goes back to the head of the queue. It is later computed again from its own tokens, so its text doesn't
    change.
    """

    def __init__(
        self,
        cache: KVCache,
        prefixes: PrefixCache | None,
        max_prefill: int,
        attention_cost: float = 0.0,
        max_scored: int = SMALLEST_CHUNK,
    ) -> None:
        """`max_prefill`: prompt tokens a step computes at most.

        `attention_cost`: what each earlier token adds to the cost of computing a later one, relative to the
        cost of that token alone.

        `max_scored`: tokens of scored prompts that a step computes at most, each with a row of logits.
        """
        self._cache = cache
        self._prefixes = prefixes
        self._max_prefill = max_prefill
        self.step_overhead = 0.0
        """A forward pass's fixed cost, in tokens. Measured once the model runs (build.py)."""
        self._attention_cost = attention_cost
        self._max_scored = max_scored
        self._arrivals = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._refused: tuple[Sequence, int] | None = None
        """A waiting sequence that had no room, and the number of free pages then."""

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        sequence.status = SequenceStatus.WAITING
        self.waiting.append(sequence)

    def schedule(self) -> ScheduledBatch:
        """Pick the next step's work."""
        batch = ScheduledBatch(self._decoding())
        prefilling = (
            [sequence for sequence in self.running if sequence.uncomputed > 1]
            if len(self.running) > len(batch.decode)
            else []
        )
        budget: float = self._max_prefill
        if batch.decode:
            budget = min(budget, self._budget_beside(len(batch.decode), prefilling))
        key_cost = self._attention_cost if batch.decode else 0.0
        # a long prompt leaves half of the step to the prompts behind it, which may be short
        share = budget / 2 if self.waiting or len(prefilling) > 1 else budget
        for sequence in prefilling:
            if budget > 0:
                budget -= self._add_tokens(batch, sequence, min(budget, share), key_cost)
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            budget -= self._add_tokens(batch, sequence, budget, key_cost)
        return batch

    def _decoding(self) -> list[Sequence]:
        """The running sequences with one uncomputed token, which each gets a page if it needs one."""
        cache, rows, preemptions = self._cache, [], self.preemptions
        for sequence in list(self.running):
            if sequence.length - sequence.computed != 1:
                continue
            if sequence.length <= cache.capacity(sequence.slot) or self._make_room(sequence):
                rows.append(sequence)
        if self.preemptions == preemptions:
            return rows
        # making room may have preempted a sequence that was picked before
        return [sequence for sequence in rows if sequence.status is SequenceStatus.RUNNING]

    def _budget_beside(self, decoding: int, prefilling: list[Sequence]) -> float:
        """Prompt tokens that a step may compute beside `decoding` rows.

        While more sequences wait for their first token than decode, the budget grows in proportion: a small
        step would cost each of the many that wait as much as it saves each of the few that decode. Short
        prompts of a burst are computed at once.
        """
        startable = self.startable()
        ratio = max(1.0, (len(prefilling) + startable) / decoding)
        budget = STALL * (self.step_overhead + decoding) * ratio
        prompts, tokens = self._whole_prompts(prefilling, startable)
        return max(budget, tokens) if prompts * ratio >= BURST * decoding else budget

    def _whole_prompts(self, prefilling: list[Sequence], startable: int) -> tuple[int, int]:
        """The number of prompts that one step of `max_prefill` tokens would complete, and their tokens."""
        prompts = tokens = 0
        for sequence in chain(prefilling, islice(self.waiting, startable)):
            if tokens + sequence.uncomputed > self._max_prefill:
                break
            prompts, tokens = prompts + 1, tokens + sequence.uncomputed
        return prompts, tokens

    def startable(self) -> int:
        """The number of waiting sequences that could start now if all were as long as the first."""
        if not self.waiting:
            return 0
        room = self._room_for(self.waiting[0])
        return min(len(self.waiting), self._cache.num_free_slots, room)

    def _room_for(self, sequence: Sequence, in_use: int = 0) -> int:
        """How many sequences as long as this one fit into the free pages.

        `in_use`: how many of its pages other sequences hold already. Some pages are kept back for the running
        sequences, which will soon need them: otherwise a newcomer would be preempted at once.
        """
        free = self._cache.num_free_pages - len(self.running) // 4
        # a scored prompt that nothing follows may fill the whole cache
        needed = min(self._cache.pages_for(sequence.length + 1), self._cache.num_pages)
        return max(0, free) // (needed - in_use)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Start the new sequence `child` with what `parent` has computed. False if there is no room."""
        if not self._cache.num_free_slots:
            return False
        try:
            self._start(child, lambda slot: self._fork_pages(parent, slot))
        except OutOfPages:
            return False
        return True

    def _fork_pages(self, parent: Sequence, slot: int) -> int:
        self._cache.fork(parent.slot, slot, parent.computed)
        return parent.computed

    def rewind_forks(self) -> None:
        """After a failed step: let forks that got no token compute the prompt's last token again."""
        for sequence in self.running:
            if sequence.uncomputed == 0:
                sequence.computed -= 1

    def remember(self, sequence: Sequence) -> None:
        """Keep what a running sequence has computed for later prompts with the same beginning."""
        if self._prefixes is not None and sequence.status is SequenceStatus.RUNNING:
            self._prefixes.store(sequence.slot, sequence.keys(0, sequence.computed))

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Remove sequences that have ended, of every status."""
        for sequence in sequences:
            if sequence.status is SequenceStatus.RUNNING:
                self._stop(sequence)
            elif sequence.status is SequenceStatus.WAITING:
                self.waiting.remove(sequence)
            sequence.status = SequenceStatus.FINISHED

    def _add_tokens(self, batch: ScheduledBatch, sequence: Sequence, budget: float, key_cost: float) -> float:
        """Add as many of a sequence's tokens to the batch as `budget` allows. Returns their cost."""
        # a cached prompt may leave a single token, which is an ordinary decode row
        if sequence.uncomputed == 1:
            batch.decode.append(sequence)
            return 1
        price = 1 + sequence.computed * key_cost
        count = min(max(SMALLEST_CHUNK, int(budget / price)), sequence.uncomputed)
        if sequence.request.unscored:
            count = min(count, self._max_scored - batch.scored)
            if not count:
                return 0
            batch.scored += count
        batch.prefill.append((sequence, count))
        return count * price

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence, from what the prefix cache has of its tokens. False: no room."""
        if not self._cache.num_free_slots:
            return False
        prefix = self._prefix_of(sequence)
        if prefix is None:
            return False
        self._start(sequence, lambda slot: self._first_pages(slot, prefix, sequence.length))
        if not sequence.output:
            sequence.request.cached_tokens = sequence.computed
        return True

    def _prefix_of(self, sequence: Sequence) -> Prefix | None:
        """Look up what the prefix cache has of a waiting sequence. None: there is no room for the rest."""
        free = self._cache.num_free_pages
        fits = self._room_for(sequence) > 0
        # what is cached has no logits
        if not self._prefixes or sequence.request.unscored:
            return Prefix([]) if fits else None
        # a long prompt isn't looked up again before the number of free pages has changed
        if not fits and self._refused == (sequence, free):
            return None
        prefix = self._prefixes.match(sequence.keys(0, sequence.length - 1))
        in_use = sum(map(self._cache.in_use, prefix.pages))
        if fits or self._room_for(sequence, in_use) > 0:
            return prefix
        self._refused = (sequence, free)
        return None

    def _first_pages(self, slot: int, prefix: Prefix, tokens: int) -> int:
        if self._prefixes:
            return self._prefixes.start(slot, prefix, tokens)
        self._cache.grow(slot, tokens)
        return 0

    def _start(self, sequence: Sequence, take_pages: Callable[[int], int]) -> None:
        """Make a sequence RUNNING.

        `take_pages` gives its slot pages and returns how many tokens' keys and values these hold. If it
        raises, nothing has changed.
        """
        slot = self._cache.take_slot()
        try:
            sequence.computed = take_pages(slot)
        except BaseException:
            self._cache.release(slot)
            raise
        sequence.slot = slot
        self._arrivals += 1
        sequence.arrival = self._arrivals
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Take slot and pages from a RUNNING sequence. The caller sets its next status."""
        self._cache.release(sequence.slot)
        sequence.slot, sequence.computed = -1, 0
        self.running.remove(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        """Get a page for the sequence's next token.

        False if it was preempted, now or for an earlier one of the step.
        """
        while sequence.status is SequenceStatus.RUNNING:
            try:
                self._cache.grow(sequence.slot, sequence.length)
                return True
            except OutOfPages:
                self._preempt(max(self.running, key=lambda running: running.arrival))
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1
