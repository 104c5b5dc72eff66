"""Who is computed in the next step: continuous batching over the KV cache's pages. No torch here."""

from collections import deque
from collections.abc import Iterable

from workers.engines.chat.cache.kv_cache import KVCache, OutOfPages
from workers.engines.chat.cache.prefix_cache import PrefixCache
from workers.engines.chat.sequence import Sequence

SMALLEST_CHUNK = 16
"""Prompt tokens: fewer in a step aren't worth their overhead, even where running streams wait a little."""


STALL = 1.5
"""A prefill chunk may lengthen a decode step by this factor: gaps stay under three times the ordinary one."""


class Work:
    """What one step computes: `decode` sequences gain a token each, `prefill` ones (sequence, tokens) of their prompt."""

    __slots__ = ("decode", "prefill")

    def __init__(self) -> None:
        self.decode: list[Sequence] = []
        self.prefill: list[tuple[Sequence, int]] = []

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    def sequences(self) -> list[Sequence]:
        return self.decode + [sequence for sequence, _ in self.prefill]

    def parts(self) -> list["Work"]:
        """The same work, each sequence by itself."""
        parts = []
        for sequence in self.decode:
            part = Work()
            part.decode.append(sequence)
            parts.append(part)
        for sequence, count in self.prefill:
            part = Work()
            part.prefill.append((sequence, count))
            parts.append(part)
        return parts


class BatchScheduler:
    """First come, first served. A running sequence that needs a page when none is free preempts the youngest.

    A preempted sequence goes back to the head of the queue and is later computed again from its own tokens, so that its
    text doesn't change.
    """

    def __init__(
        self, cache: KVCache, prefixes: PrefixCache | None, max_prefill: int, attention_cost: float = 0.0
    ) -> None:
        """`attention_cost`: what one earlier token adds to the cost of computing a later one, which is 1 by itself."""
        self._cache = cache
        self._prefixes = prefixes
        self._max_prefill = max_prefill
        self.step_overhead = 0.0
        """A forward pass's fixed cost, in tokens; measured once the model runs."""
        self._attention_cost = attention_cost
        self._arrivals = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Work:
        """Pick the next step's work."""
        work = Work()
        for sequence in list(self.running):
            if sequence.slot >= 0 and sequence.uncomputed == 1 and self._make_room(sequence):
                work.decode.append(sequence)
        # making room may have preempted one that was picked before
        work.decode = [sequence for sequence in work.decode if sequence.slot >= 0]
        prefilling = [sequence for sequence in self.running if sequence.uncomputed > 1]
        budget: float = self._max_prefill
        if work.decode:
            budget = min(budget, self._beside(len(work.decode), len(prefilling) + self._startable()))
        key_cost = self._attention_cost if work.decode else 0.0
        # a long prompt leaves half of the step to those behind it, so that short ones needn't wait for its end
        share = budget / 2 if self.waiting or len(prefilling) > 1 else budget
        for sequence in prefilling:
            if budget > 0:
                budget -= self._take(work, sequence, min(budget, share), key_cost)
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            budget -= self._take(work, sequence, budget, key_cost)
        return work

    def _beside(self, decoding: int, waiting: int) -> float:
        """Prompt tokens that a step may compute beside `decoding` rows. While more wait for their first token than have
        one, those few bear longer gaps: each step of this size costs all who wait as much as it spares the few."""
        return STALL * (self.step_overhead + decoding) * max(1.0, waiting / decoding)

    def _startable(self) -> int:
        """Waiting sequences that there is room for, were all as long as the first."""
        if not self.waiting:
            return 0
        room = self._room_for(self.waiting[0])
        return min(len(self.waiting), self._cache.num_free_slots, room)

    def _room_for(self, sequence: Sequence) -> int:
        """How many sequences as long as this one the free pages hold.

        Pages that those running will want soon are left to them, or a newcomer would be preempted at once.
        """
        free = self._cache.num_free_pages - len(self.running) // 4
        return max(0, free) // self._cache.pages_for(sequence.length + 1)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Start `child` with a copy of what `parent` has computed. False: no room, it must wait its turn."""
        cache = self._cache
        needed = cache.pages_for(parent.computed)
        if not cache.num_free_slots or needed > cache.num_free_pages:
            return False
        self._enter(child, parent.computed)
        cache.copy_pages(cache.tables[parent.slot][:needed], cache.tables[child.slot])
        child.computed = parent.computed
        return True

    def knows(self, sequence: Sequence) -> bool:
        """Whether it runs or waits."""
        return sequence.slot >= 0 or sequence in self.waiting

    def rewind_forks(self) -> None:
        """After a step that failed: forks that got no token compute the prompt's last token again."""
        for sequence in self.running:
            if sequence.uncomputed == 0:
                sequence.computed -= 1

    def remember(self, sequence: Sequence) -> None:
        """Keep what is computed of a running sequence for later prompts that start alike."""
        if self._prefixes is not None and sequence.slot >= 0:
            self._prefixes.store(sequence.slot, sequence.tokens(0, sequence.computed))

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Sequences that have ended, wherever they are."""
        for sequence in sequences:
            if sequence.slot >= 0:
                self._leave(sequence)
            elif sequence in self.waiting:
                self.waiting.remove(sequence)

    def _take(self, work: Work, sequence: Sequence, budget: float, key_cost: float) -> float:
        """Put as much of a sequence into the step as `budget` bears. Returns what it costs."""
        # a cached prompt may leave a single token: that is a decode row like any other
        if sequence.uncomputed == 1:
            work.decode.append(sequence)
            return 1
        price = 1 + sequence.computed * key_cost
        count = min(max(SMALLEST_CHUNK, int(budget / price)), sequence.uncomputed)
        work.prefill.append((sequence, count))
        return count * price

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the pages of all its tokens, from the prefix cache where it can."""
        cache = self._cache
        if not cache.num_free_slots or not self._room_for(sequence):
            return False
        chain = self._prefixes.match(sequence.tokens(0, sequence.length - 1)) if self._prefixes else []
        self._enter(sequence, sequence.length)
        if self._prefixes and chain:
            sequence.computed = self._prefixes.load(sequence.slot, chain)
            if not sequence.output:
                sequence.request.cached_tokens = sequence.computed
        return True

    def _enter(self, sequence: Sequence, tokens: int) -> None:
        sequence.slot = self._cache.take_slot()
        self._cache.grow(sequence.slot, tokens)
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.running.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._cache.release(sequence.slot)
        sequence.slot, sequence.computed = -1, 0
        self.running.remove(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        """A page for the sequence's next token. False: it was the youngest itself and has been preempted."""
        while sequence.slot >= 0:
            try:
                self._cache.grow(sequence.slot, sequence.length)
                return True
            except OutOfPages:
                self._preempt(max(self.running, key=lambda running: running.arrival))
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
