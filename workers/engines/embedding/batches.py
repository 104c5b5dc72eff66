"""Chooses the inputs of the next forward pass: requests take turns, inputs of similar length go together."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from protocol.jobs import EmbeddingJob

_length = attrgetter("length")


class Request:
    """A job whose inputs are encoded. `dimensions`: numbers of each of its vectors."""

    def __init__(self, job: EmbeddingJob, inputs: Sequence[list[int]], dimensions: int) -> None:
        self.job = job
        self.dimensions = dimensions
        self.prompt_tokens = sum(map(len, inputs))
        self.remaining = len(inputs)
        """Inputs whose vectors were not sent."""
        self.items = [Item(self, index, tokens) for index, tokens in enumerate(inputs)]
        self.pending = sorted(self.items, key=_length)
        """Ascending by length; those at the end may have been taken meanwhile."""


class Item:
    """One input of a request. `index` is its place among them."""

    __slots__ = ("index", "length", "request", "taken", "tokens")

    def __init__(self, request: Request, index: int, tokens: list[int]) -> None:
        self.request = request
        self.index = index
        self.tokens = tokens
        self.length = len(tokens)
        self.taken = False


class BatchQueue:
    """Inputs that are in no pass yet. Not thread-safe."""

    def __init__(self, max_tokens: int, pass_cost: float = 0.0) -> None:
        """`max_tokens`: of a pass, padding included.

        `pass_cost`: what a pass costs beside its tokens, in tokens.
        """
        self._max_tokens = max_tokens
        # with more padding, two passes over halves of the inputs cost less than one
        self._max_padding = 2 * pass_cost
        self._items: list[Item] = []
        """Ascending by length."""
        self._turns: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def add(self, request: Request) -> None:
        self._items += request.items
        # almost sorted, which Python's sort makes use of
        self._items.sort(key=_length)
        self._turns.append(request)

    def discard(self, job: EmbeddingJob) -> None:
        """Remove the request of a job, if it is here."""
        self._items = [item for item in self._items if item.request.job is not job]
        self._turns = deque(request for request in self._turns if request.job is not job)

    def next_batch(self) -> list[Item]:
        """Remove and return the inputs of the next pass; without any the list is empty.

        The request whose turn it is gives its longest input. Other pending inputs of similar length, of any
        request, are added.
        """
        while self._turns:
            request = self._turns.popleft()
            while request.pending and request.pending[-1].taken:
                request.pending.pop()
            if request.pending:
                self._turns.append(request)
                return self._take(self._place_of(request.pending[-1]))
        return []

    def _place_of(self, item: Item) -> int:
        place = bisect_left(self._items, item.length, key=_length)
        while self._items[place] is not item:
            place += 1
        return place

    def _take(self, seed: int) -> list[Item]:
        """Remove the item at `seed` and its neighbours: longer ones first, as long as all fit."""
        items = self._items
        first, end, padding = seed, seed + 1, 0
        while end < len(items):
            more = (items[end].length - items[end - 1].length) * (end - first)
            if not self._fits(end + 1 - first, items[end], padding + more):
                break
            padding, end = padding + more, end + 1
        longest = items[end - 1]
        while first:
            more = longest.length - items[first - 1].length
            if not self._fits(end + 1 - first, longest, padding + more):
                break
            padding, first = padding + more, first - 1
        batch = items[first:end]
        del items[first:end]
        for item in batch:
            item.taken = True
        return batch

    def _fits(self, count: int, longest: Item, padding: int) -> bool:
        return count * longest.length <= self._max_tokens and padding <= self._max_padding
