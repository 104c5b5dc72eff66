"""Attention over the paged KV cache with torch's own operations: for any device and dtype.

In a decode step each page of each row is a batch element: every page gets a copy of its row's query, two
batched products run over the gathered pages, and a segmented softmax merges the pages' partial results.
Nothing is padded to the longest sequence, so the work is proportional to the tokens held.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from workers.engines.chat.attention.base import LayerCall, ModelAttention, count_rows
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.sequence import Chunk

MASKED = -1e30
"""Finite, so that a page without a visible key gets weight 0 and not NaN."""


@dataclass(slots=True)
class Segment:
    """A chunk of several tokens.

    They are start..end of the step's tokens, at positions past, past + 1, ... of their sequence.
    """

    start: int
    end: int
    past: int
    pages: torch.Tensor
    """int64 [pages of the sequence up to the chunk's last token]."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """bool [tokens, keys]: the keys that each token sees. Layers with the same window share a mask."""
        if window not in self.masks:
            tokens, device = self.end - self.start, self.pages.device
            queries = torch.arange(self.past, self.past + tokens, device=device)[:, None]
            keys = torch.arange(self.past + tokens, device=device)[None, :]
            seen = keys <= queries
            self.masks[window] = seen if window is None else seen & (keys > queries - window)
        return self.masks[window]


class PagedAttention(ModelAttention):
    """Attention with torch's own operations."""

    name = "torch operations"

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        self._chunks: list[Chunk] = []
        self._rows = 0
        """Number of decode rows. The other chunks are segments."""
        self._pages = self._offsets = torch.zeros(0, dtype=torch.int64)
        """int64 [tokens]: page of each token's key and value, and the offset inside it."""
        self._row_pages = RowPages(torch.zeros(3, 0, dtype=torch.int64), cache.page_size)
        self._segments: list[Segment] = []

    def prepare(self, chunks: list[Chunk]) -> list[np.ndarray]:
        tables = self._prepare_segments(chunks)
        rows = pages_of_rows(self._cache, chunks[: self._rows])
        return [self._cache.places(chunks), rows, *tables]

    def bind(self, inputs: list[torch.Tensor]) -> None:
        (self._pages, self._offsets), rows, *tables = inputs
        self._row_pages = RowPages(rows, self._cache.page_size)
        self._bind_segments(tables)

    def _prepare_segments(self, chunks: list[Chunk]) -> list[np.ndarray]:
        """Divide the chunks into decode rows and segments. Returns each segment's pages, int64."""
        cache = self._cache
        self._chunks, self._rows = chunks, count_rows(chunks)
        return [
            cache.tables[chunk.slot, : cache.pages_for(chunk.end)].astype(np.int64)
            for chunk in chunks[self._rows :]
        ]

    def _bind_segments(self, tables: list[torch.Tensor]) -> None:
        self._segments = []
        start = self._rows
        for chunk, pages in zip(self._chunks[self._rows :], tables, strict=True):
            end = start + len(chunk.tokens)
            self._segments.append(Segment(start, end, chunk.start, pages))
            start = end

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        self._store(layer, key, value)
        rows = self._rows
        parts = [self._decode(layer, query[:rows], call)] if rows else []
        for segment in self._segments:
            own = slice(segment.start, segment.end)
            query_of, key_of, value_of = (tensor[own].transpose(0, 1) for tensor in (query, key, value))
            if segment.past:
                key_of, value_of = self._past(layer, segment)
            parts.append(_prefill(segment, query_of, key_of, value_of, call))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write new keys and values [tokens, kv_heads, head_dim] to their pages."""
        self._cache.pool[layer, 0][self._pages, :, self._offsets] = key
        self._cache.pool[layer, 1][self._pages, :, self._offsets] = value

    def _past(self, layer: int, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy a sequence's keys and values, up to the segment's last token: each [kv_heads, keys,
        head_dim]."""
        keys, values = (self._cache.pool[layer, kind].index_select(0, segment.pages) for kind in (0, 1))
        return join_pages(keys, segment, self.dtype), join_pages(values, segment, self.dtype)

    def _decode(self, layer: int, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Attend with the decode rows. query [rows, heads, head_dim] -> like query."""
        pages = self._row_pages.pages
        keys, values = (self._cache.pool[layer, kind].index_select(0, pages) for kind in (0, 1))
        return _decode(self._row_pages, query, keys, values, call)


def pages_of_rows(cache: KVCache, rows: list[Chunk]) -> np.ndarray:
    """List the pages of all decode rows, one row's after another's.

    int64 [3, pages]: page, number of the row, and the row's position minus the page's first.
    """
    ends = np.array([chunk.end for chunk in rows], np.int64)
    slots = np.array([chunk.slot for chunk in rows], np.int64)
    counts = -(-ends // cache.page_size)
    row = np.arange(len(rows)).repeat(counts)
    number = np.arange(len(row)) - (counts.cumsum() - counts).repeat(counts)
    return np.stack([cache.tables[slots[row], number], row, ends[row] - 1 - number * cache.page_size])


class RowPages:
    """The pages of all decode rows, which are treated as one batch."""

    def __init__(self, pages_of_rows: torch.Tensor, page_size: int) -> None:
        self.pages, self.row, self._newest = pages_of_rows
        self._page_size = page_size
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor:
        """float32 [pages of all rows, 1, 1, page_size], added to scores."""
        if window not in self._masks:
            places = torch.arange(self._page_size, device=self.row.device)
            seen = places <= self._newest[:, None]
            if window is not None:
                seen &= places > self._newest[:, None] - window
            self._masks[window] = torch.where(seen, 0.0, MASKED)[:, None, None]
        return self._masks[window]


def _decode(
    row_pages: RowPages, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> torch.Tensor:
    """query [rows, heads, head_dim], keys and values [pages, kv_heads, page_size, head_dim] -> like query."""
    rows, heads, head_dim = query.shape
    row = row_pages.row
    pages, kv_heads, page_size, _ = keys.shape
    group = heads // kv_heads
    # each page gets its row's query; heads that share a key head are the rows of one small product
    spread = (
        (query.reshape(rows, -1) * call.scale).index_select(0, row).view(pages * kv_heads, group, head_dim)
    )
    flat_keys = keys.view(pages * kv_heads, page_size, head_dim)
    flat_values = values.view(pages * kv_heads, page_size, head_dim)
    scores = torch.bmm(spread, flat_keys.transpose(1, 2)).float()
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.view(pages, kv_heads, group, page_size) + row_pages.mask(call.window)
    # the softmax spans all pages of a row: their common maximum first, then sums by row
    best = scores.amax(-1).view(pages, heads)
    by_head = row[:, None].expand(pages, heads)
    row_best = best.new_full((rows, heads), 2 * MASKED).scatter_reduce_(0, by_head, best, "amax")
    weights = scores.sub_(row_best.index_select(0, row).view(pages, kv_heads, group, 1)).exp_()
    total = best.new_zeros(rows, heads).index_add_(0, row, weights.sum(-1).view(pages, heads))
    weights = weights.to(values.dtype).view(pages * kv_heads, group, page_size)
    partial = torch.bmm(weights, flat_values).view(pages, heads, head_dim).float()
    merged = best.new_zeros(rows, heads, head_dim).index_add_(0, row, partial)
    return (merged / total[..., None]).to(query.dtype)


def join_pages(pages: torch.Tensor, segment: Segment, dtype: torch.dtype) -> torch.Tensor:
    """Join pages [pages, kv_heads, page_size, head_dim] to [kv_heads, keys of the segment, head_dim]."""
    _, kv_heads, _, head_dim = pages.shape
    joined = pages.transpose(0, 1).reshape(kv_heads, -1, head_dim)
    return joined[:, : segment.past + segment.end - segment.start].to(dtype)


def _prefill(
    segment: Segment, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> torch.Tensor:
    """Attend with the tokens of a segment.

    query [heads, tokens, head_dim], keys and values [kv_heads, keys, head_dim] -> [tokens, heads, head_dim].
    """
    heads, tokens, _ = query.shape
    scale, window, softcap = call
    plain = segment.past == 0 and (window is None or tokens <= window)
    if softcap is not None:
        group = heads // keys.shape[0]
        scores = query.float() @ keys.repeat_interleave(group, 0).float().transpose(1, 2) * scale
        scores = torch.tanh(scores / softcap) * softcap
        weights = scores.masked_fill_(~segment.mask(window), MASKED).softmax(-1)
        return (weights @ values.repeat_interleave(group, 0).float()).to(query.dtype).transpose(0, 1)
    out = F.scaled_dot_product_attention(
        query[None],
        keys[None],
        values[None],
        attn_mask=None if plain else segment.mask(window),
        is_causal=plain,
        scale=scale,
        enable_gqa=heads != keys.shape[0],
    )
    return out[0].transpose(0, 1)
