"""Keys and values of all running sequences, in pages of one pool.

The pool's first `num_active` pages belong to running sequences, without holes: when a sequence is released,
the last active pages move into its place. A decode step can then treat the whole active part as one batch,
without gathering or padding (attention/paged.py). The pages above belong to the prefix cache
(prefix_cache.py), which makes room when the active part grows. Sequences never share a page: a cached prefix
is copied, at a thousandth of the cost of computing it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from workers.engines.chat.sequence import Chunk


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
        self.num_active = 0
        self.scratch_page = num_pages
        self.padding_slot = num_slots
        self.tables: list[list[int]] = [*([] for _ in range(num_slots)), [self.scratch_page]]
        """For each slot the pages of its tokens, in order."""
        self.slot_of_page = np.zeros(num_pages, np.int64)
        self.start_of_page = np.zeros(num_pages, np.int64)
        """For each active page the position of its first token."""
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self.vacate: Callable[[int, int], None] = lambda start, end: None
        """Called before pages start..end become active, to move or evict their cached content."""

    @property
    def num_free_pages(self) -> int:
        return self.num_pages - self.num_active

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def pages_for(self, tokens: int) -> int:
        """The number of pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def take_slot(self) -> int:
        """Reserve a slot for a sequence. There must be a free one."""
        return self._free_slots.pop()

    def grow(self, slot: int, tokens: int) -> None:
        """Give `slot` pages for `tokens` tokens in all. Raises OutOfPages and then changes nothing."""
        table = self.tables[slot]
        missing = self.pages_for(tokens) - len(table)
        if missing <= 0:
            return
        if missing > self.num_free_pages:
            raise OutOfPages
        start, end = self.num_active, self.num_active + missing
        self.vacate(start, end)
        for page in range(start, end):
            self.slot_of_page[page] = slot
            self.start_of_page[page] = len(table) * self.page_size
            table.append(page)
        self.num_active = end

    def release(self, slot: int) -> None:
        """Free the slot and its pages, and move the last active pages into the holes they leave."""
        freed = set(self.tables[slot])
        self.tables[slot] = []
        self._free_slots.append(slot)
        remaining = self.num_active - len(freed)
        holes = [page for page in freed if page < remaining]
        movers = [page for page in range(remaining, self.num_active) if page not in freed]
        self.copy_pages(movers, holes)
        for source, hole in zip(movers, holes, strict=True):
            owner, start = int(self.slot_of_page[source]), int(self.start_of_page[source])
            self.tables[owner][start // self.page_size] = hole
            self.slot_of_page[hole], self.start_of_page[hole] = owner, start
        self.num_active = remaining

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole pages in all layers. No page may be both source and target."""
        if self.pool.device.type == "cpu":
            for source, target in zip(sources, targets, strict=True):
                self.pool[:, :, target] = self.pool[:, :, source]
        elif sources:
            # two kernels, however many pages there are
            index = torch.tensor([sources, targets], device=self.pool.device)
            self.pool[:, :, index[1]] = self.pool[:, :, index[0]]

    def places(self, chunks: list[Chunk]) -> np.ndarray:
        """int64 [2, tokens]: page and offset of each of the chunks' tokens."""
        pages: list[int] = []
        offsets: list[int] = []
        for chunk in chunks:
            table = self.tables[chunk.slot]
            for position in range(chunk.start, chunk.end):
                page, offset = divmod(position, self.page_size)
                pages.append(table[page])
                offsets.append(offset)
        return np.array([pages, offsets], np.int64)
