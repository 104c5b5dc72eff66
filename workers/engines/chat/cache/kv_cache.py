"""Keys and values of all running sequences, in pages of one pool.

A page is used by one sequence or, if it is full, by several whose tokens begin alike. Each use is counted. A
page without a use is free, but keeps its content until it is needed: the prefix cache (prefix_cache.py) gives
it to a later sequence with the same beginning. No page ever moves.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from workers.engines.chat.sequence import Chunk

FEW = 8
"""Decode rows whose places are found one by one, in less time than numpy's calls take."""


class CacheShape(NamedTuple):
    """Shape and dtype of one token's keys and values.

    The GPU kernel needs token-major pages; on a CPU head-major is faster.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    token_major: bool

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class OutOfPages(Exception):
    """Raised by `grow` when there are too few free pages: the scheduler preempts a sequence or waits."""


class KVCache:
    """Pages for `num_pages * page_size` tokens in `num_slots` sequences.

    `pool` [layers, 2, pages + 1, ...] holds keys and values. A page of either is [page_size, kv_heads,
    head_dim] (token-major) or [kv_heads, page_size, head_dim] (head-major). The last page is scratch, and
    `padding_slot` consists of it alone: rows that only pad a CUDA graph write there.
    """

    def __init__(
        self, shape: CacheShape, num_pages: int, page_size: int, num_slots: int, device: torch.device
    ) -> None:
        page = (page_size, shape.num_kv_heads) if shape.token_major else (shape.num_kv_heads, page_size)
        # zeros, not empty: a masked key must be finite, and on a CPU untouched zero pages take no memory
        self.pool = torch.zeros(
            (shape.num_layers, 2, num_pages + 1, *page, shape.head_dim), dtype=shape.dtype, device=device
        )
        self.shape = shape
        self.num_pages = num_pages
        self.page_size = page_size
        self.scratch_page = num_pages
        self.padding_slot = num_slots
        self.tables = np.full((num_slots + 1, num_pages), self.scratch_page, np.int32)
        """int32 [slots + 1, pages]: for each slot the pages of its tokens, in order, then the scratch
        page."""
        self.held = [*(0 for _ in range(num_slots)), 1]
        """For each slot its number of pages."""
        self.kept: set[int] = set()
        """Pages whose content the prefix cache can find."""
        self.forget: Callable[[int], None] = lambda page: None
        """Called before a page of `kept` gets other content."""
        self._uses = [0] * num_pages
        """For each page the number of slots that hold it."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        """Pages without a use, those that are taken next first."""
        self._free_slots = list(range(num_slots - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def num_active(self) -> int:
        """The number of pages in use."""
        return self.num_pages - len(self._free)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def pages_for(self, tokens: int) -> int:
        """The number of pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def capacity(self, slot: int) -> int:
        """The number of tokens that the pages of a slot hold."""
        return self.held[slot] * self.page_size

    def pages_of(self, slot: int) -> list[int]:
        """The pages of a slot, in order."""
        pages: list[int] = self.tables[slot, : self.held[slot]].tolist()
        return pages

    def in_use(self, page: int) -> bool:
        """Whether any slot holds this page."""
        return self._uses[page] > 0

    def take_slot(self) -> int:
        """Reserve a slot for a sequence. There must be a free one."""
        return self._free_slots.pop()

    def grow(self, slot: int, tokens: int) -> None:
        """Give `slot` pages for `tokens` tokens in all. Raises OutOfPages and then changes nothing."""
        missing = self.pages_for(tokens) - self.held[slot]
        if missing > len(self._free):
            raise OutOfPages
        for _ in range(missing):
            page, _ = self._free.popitem(last=False)
            if page in self.kept:
                self.forget(page)
                self.kept.discard(page)
            self._append(slot, page)

    def share(self, slot: int, pages: Iterable[int]) -> None:
        """Append full pages with known content to a slot's own. They must not be written to any more."""
        for page in pages:
            self._free.pop(page, None)
            self._append(slot, page)

    def fork(self, source: int, target: int, tokens: int) -> None:
        """Give the empty slot `target` the first `tokens` tokens of `source`.

        Full pages are shared. The page of the last token is copied, because both will write there. Raises
        OutOfPages; what `target` has got until then is freed with it.
        """
        shared = (tokens - 1) // self.page_size
        self.share(target, self.pages_of(source)[:shared])
        self.grow(target, tokens)
        self.copy_page(int(self.tables[source, shared]), int(self.tables[target, shared]))

    def release(self, slot: int) -> None:
        """Free the slot, and those of its pages that no other slot holds."""
        # the last page first: a later page is of no use without those before it, so it is taken earlier
        for page in reversed(self.pages_of(slot)):
            self._uses[page] -= 1
            if self._uses[page]:
                continue
            self._free[page] = None
            if page not in self.kept:
                self._free.move_to_end(page, last=False)
        self.tables[slot, : self.held[slot]] = self.scratch_page
        self.held[slot] = 0
        self._free_slots.append(slot)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in all layers, without memory of its own."""
        self.pool[:, :, target].copy_(self.pool[:, :, source])

    def places(self, chunks: list[Chunk]) -> np.ndarray:
        """int64 [2, tokens]: page and offset of each of the chunks' tokens."""
        if len(chunks) <= FEW and all(len(chunk.tokens) == 1 for chunk in chunks):
            numbers = [(chunk.slot, *divmod(chunk.start, self.page_size)) for chunk in chunks]
            pages = [self.tables[slot, number] for slot, number, _ in numbers]
            return np.array([pages, [offset for _, _, offset in numbers]], np.int64)
        slots = np.array([chunk.slot for chunk in chunks], np.int64)
        positions = np.array([chunk.start for chunk in chunks], np.int64)
        counts = np.array([len(chunk.tokens) for chunk in chunks], np.int64)
        if counts.sum() > len(chunks):
            slots = slots.repeat(counts)
            first = counts.cumsum() - counts
            positions = (positions - first).repeat(counts) + np.arange(counts.sum())
        number, offsets = np.divmod(positions, self.page_size)
        return np.stack([self.tables[slots, number], offsets])

    def _append(self, slot: int, page: int) -> None:
        self.tables[slot, self.held[slot]] = page
        self.held[slot] += 1
        self._uses[page] += 1
