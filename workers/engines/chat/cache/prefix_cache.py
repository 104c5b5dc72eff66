"""Keeps keys and values of earlier sequences in the pages that no running sequence needs.

Only full pages are kept. A page is found by its tokens and the page before it, so the same text at another
position or after another beginning is another entry. The least recently used entries are evicted first; of
one sequence, later pages first.
"""

from collections import OrderedDict
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from workers.engines.chat.cache.kv_cache import KVCache

Key = tuple[int, tuple[int, ...]]
"""The serial number of the previous page's entry (0: none), and the tokens of this page."""


@dataclass(eq=False, slots=True)
class _Entry:
    serial: int
    key: Key
    page: int
    """Its page in the pool; -1 once evicted."""


class PrefixCache:
    """Full pages of earlier sequences, copied to the inactive part of `cache`'s pool."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._at: dict[int, _Entry] = {}
        self._serial = 0
        cache.vacate = self._vacate

    def __len__(self) -> int:
        return len(self._entries)

    def store(self, slot: int, tokens: Tokens[int]) -> None:
        """Keep the full pages of the first `len(tokens)` tokens of a sequence, which must be computed."""
        size, table = self._cache.page_size, self._cache.tables[slot]
        sources, targets, parent = [], [], 0
        chain: list[_Entry] = []
        for number in range(len(tokens) // size):
            key = (parent, tuple(tokens[number * size : (number + 1) * size]))
            entry = self._entries.get(key)
            if entry is None:
                page = self._free_page(chain)
                if page is None:
                    break
                self._serial += 1
                entry = self._entries[key] = self._at[page] = _Entry(self._serial, key, page)
                sources.append(table[number])
                targets.append(page)
            chain.append(entry)
            parent = entry.serial
        self._touch(chain)
        self._cache.copy_pages(sources, targets)

    def match(self, tokens: Tokens[int]) -> list[_Entry]:
        """Return the entries of the longest known beginning of `tokens`."""
        size, chain, parent = self._cache.page_size, [], 0
        for number in range(len(tokens) // size):
            entry = self._entries.get((parent, tuple(tokens[number * size : (number + 1) * size])))
            if entry is None:
                break
            chain.append(entry)
            parent = entry.serial
        self._touch(chain)
        return chain

    def load(self, slot: int, chain: list[_Entry]) -> int:
        """Copy entries to the first pages of `slot`, which must have grown already.

        Returns the number of tokens copied.

        Growing may have evicted entries of the chain: the copy ends before the first of these.
        """
        pages: list[int] = []
        for entry in chain:
            if entry.page < 0:
                break
            pages.append(entry.page)
        self._cache.copy_pages(pages, self._cache.tables[slot][: len(pages)])
        return len(pages) * self._cache.page_size

    def _touch(self, chain: list[_Entry]) -> None:
        # the first page last: later pages are of no use without it
        for entry in reversed(chain):
            self._entries.move_to_end(entry.key)

    def _free_page(self, keep: list[_Entry]) -> int | None:
        """Find a page for a new entry: a free one, or that of the least recently used entry outside `keep`.

        None: there is no such page.
        """
        if len(self._at) < self._cache.num_free_pages:
            page = self._cache.num_pages - 1 - len(self._at)
            while page in self._at or page < self._cache.num_active:
                page = page + 1 if page + 1 < self._cache.num_pages else self._cache.num_active
            return page
        oldest = next((entry for entry in self._entries.values() if entry not in keep), None)
        return self._evict(oldest) if oldest is not None else None

    def _evict(self, entry: _Entry) -> int:
        """Forget an entry. Returns the page it had."""
        page, entry.page = entry.page, -1
        del self._entries[entry.key], self._at[page]
        return page

    def _vacate(self, start: int, end: int) -> None:
        """Clear pages start..end, which are about to become active: evict or move their entries."""
        inside = [entry for page in range(start, end) if (entry := self._at.get(page)) is not None]
        if not inside:
            return
        room = self._cache.num_pages - end
        while len(self._at) > room:
            self._evict(next(iter(self._entries.values())))
        movers = [entry for entry in inside if entry.page >= 0]
        free = (page for page in range(self._cache.num_pages - 1, end - 1, -1) if page not in self._at)
        sources, targets = [], []
        for entry, page in zip(movers, free, strict=False):
            sources.append(entry.page)
            targets.append(page)
            del self._at[entry.page]
            entry.page = page
            self._at[page] = entry
        self._cache.copy_pages(sources, targets)
