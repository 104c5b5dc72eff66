"""Attention over the paged KV cache in float32 on a CPU.

Two compiled loops a layer: one writes new keys and values, one reads each page once.
"""

import numpy as np
import torch

from workers.engines.chat.attention.base import LayerCall
from workers.engines.chat.attention.paged import PagedAttention
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.kernels.cpu import decode_rows, store_in_pages
from workers.engines.chat.sequence import Chunk


class CpuPagedAttention(PagedAttention):
    """`PagedAttention` for a float32 cache in host memory, [pages, kv_heads, page_size, head_dim] a layer."""

    name = "compiled loops"

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        pool = cache.pool.numpy()
        self._pools = [(pool[layer, 0], pool[layer, 1]) for layer in range(pool.shape[0])]
        self._places = (np.zeros(0, np.int64), np.zeros(0, np.int64))
        """int64 [tokens] each: page and offset of each new token."""
        self._tables = np.zeros((0, 0), np.int32)
        """Pages of each decode row, int32 [rows, most pages of a row]."""
        self._ends = np.zeros(0, np.int64)
        """Number of keys that each decode row sees, its own included, int64 [rows]."""

    def prepare(self, chunks: list[Chunk]) -> list[np.ndarray]:
        tables = self._prepare_segments(chunks)
        pages, offsets = self._cache.places(chunks)
        self._places = pages, offsets
        rows = chunks[: self._rows]
        if rows:
            ends = [chunk.end for chunk in rows]
            self._ends = np.array(ends, np.int64)
            width = self._cache.pages_for(max(ends))
            self._tables = self._cache.tables[[chunk.slot for chunk in rows], :width]
        return tables

    def bind(self, inputs: list[torch.Tensor]) -> None:
        self._bind_segments(inputs)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        keys, values = self._pools[layer]
        store_in_pages(key.contiguous().numpy(), value.contiguous().numpy(), *self._places, keys, values)

    def _decode(self, layer: int, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        keys, values = self._pools[layer]
        query = query.contiguous()
        out = torch.empty_like(query)
        scale, window, softcap = np.float32(call.scale), call.window or 0, np.float32(call.softcap or 0)
        decode_rows(
            query.numpy(), keys, values, self._tables, self._ends, scale, window, softcap, out.numpy()
        )
        return out
