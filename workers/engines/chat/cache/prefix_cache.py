"""Finds pages of the KV cache whose tokens a new sequence begins with.

A page is found by its tokens and the page before it, so the same text at another position or after another
beginning is another entry. Full pages are shared. The first tokens of a page, in steps of BEGINNING, are
found as well and copied: on a GPU a page has 256 tokens, more than many system prompts.

Nothing is stored apart: an entry points to a page of a running sequence or to a free page, and ends when the
page gets other content. Free pages are reused in the order of their last use.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from typing import NamedTuple

from workers.engines.chat.cache.kv_cache import KVCache

BEGINNING = 32
"""Tokens. A page is also found by its first 32, 64, 96, ... tokens."""

Key = tuple[int, tuple[int, ...]]
"""The serial number of the page before (0: none), and the tokens of this page, or its first ones."""


class Prefix(NamedTuple):
    """What the cache has of a sequence's first tokens."""

    pages: list[int]
    """Full pages, to be shared."""
    beginning: int | None = None
    """A page whose first `copied` tokens continue them, to be copied."""
    copied: int = 0


class PrefixCache:
    """The pages of `cache` whose content is known."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._pages: dict[Key, int] = {}
        self._keys: dict[int, list[Key]] = {}
        """For each known page all keys that lead to it."""
        self._serials: dict[int, int] = {}
        """For each known page the number by which the keys of following pages name its content."""
        self._last_serial = 0
        cache.forget = self._forget

    def __len__(self) -> int:
        """The number of known pages."""
        return len(self._keys)

    def store(self, slot: int, tokens: Tokens[int]) -> None:
        """Remember the pages that hold the first `len(tokens)` tokens of a sequence, all computed."""
        size, table = self._cache.page_size, self._cache.pages_of(slot)
        parent = 0
        for number, start in enumerate(range(0, len(tokens), size)):
            content = tuple(tokens[start : start + size])
            keys = [(parent, content[:count]) for count in self._lengths(len(content))]
            page = self._pages.get(keys[-1]) if keys else None
            if page is None:
                page = table[number]
                self._remember(page, keys)
            if len(content) == size:
                parent = self._serials[page]

    def match(self, tokens: Tokens[int]) -> Prefix:
        """Find the longest known beginning of `tokens`. Valid until pages are next taken."""
        size = self._cache.page_size
        pages: list[int] = []
        parent = 0
        while len(tokens) >= (len(pages) + 1) * size:
            start = len(pages) * size
            page = self._pages.get((parent, tuple(tokens[start : start + size])))
            if page is None:
                break
            pages.append(page)
            parent = self._serials[page]
        rest = tuple(tokens[len(pages) * size : (len(pages) + 1) * size])
        for count in range(len(rest) // BEGINNING * BEGINNING, 0, -BEGINNING):
            if (page := self._pages.get((parent, rest[:count]))) is not None:
                return Prefix(pages, page, count)
        return Prefix(pages)

    def start(self, slot: int, prefix: Prefix, tokens: int) -> int:
        """Give the empty `slot` pages for `tokens` tokens, the first of them from `prefix`.

        Returns the number of tokens whose keys and values are there. Raises OutOfPages; what the slot has got
        until then is freed with it.
        """
        cache = self._cache
        cache.share(slot, prefix.pages)
        have = len(prefix.pages) * cache.page_size
        if prefix.beginning is None:
            cache.grow(slot, tokens)
            return have
        cache.grow(slot, have + 1)
        target = cache.pages_of(slot)[-1]
        # the page that was taken may be the source itself, if that was free
        if target != prefix.beginning:
            cache.copy_page(prefix.beginning, target)
        cache.grow(slot, tokens)
        return have + prefix.copied

    def _lengths(self, count: int) -> Iterator[int]:
        """The numbers of first tokens by which a page with `count` tokens is found."""
        yield from range(BEGINNING, count, BEGINNING)
        if count == self._cache.page_size or count % BEGINNING == 0:
            yield count

    def _remember(self, page: int, keys: list[Key]) -> None:
        if not keys:
            return
        if page not in self._keys:
            self._last_serial += 1
            self._serials[page] = self._last_serial
            self._keys[page] = []
            self._cache.kept.add(page)
        for key in keys:
            if key not in self._pages:
                self._pages[key] = page
                self._keys[page].append(key)

    def _forget(self, page: int) -> None:
        for key in self._keys.pop(page):
            del self._pages[key]
        del self._serials[page]
