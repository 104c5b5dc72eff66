"""Attention over the paged KV cache on a CPU, in float32 over a cache of float32 or bfloat16.

Two compiled loops a layer: one writes new keys and values, one reads each page once. A page of keys is
transposed: a score for each of its places is then a sum of whole vectors.
"""

import numpy as np
import torch

from workers.engines.chat.attention.base import LayerCall
from workers.engines.chat.attention.paged import PagedAttention, Segment, join_pages
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.kernels.cpu import decode_rows, store_in_pages
from workers.engines.chat.sequence import Chunk


class CpuPagedAttention(PagedAttention):
    """`PagedAttention` for a cache of float32 or bfloat16 in host memory.

    Its own pages of keys are [kv_heads, head_dim, page_size].
    """

    name = "compiled loops"

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        self.dtype = torch.float32
        self._keys = [_transposed(layer[0]) for layer in cache.pool.unbind()]
        """For each layer, [pages, kv_heads, head_dim, page_size]: a view of the pool."""
        self._bits = [
            (_bits(keys), _bits(layer[1]))
            for keys, layer in zip(self._keys, cache.pool.unbind(), strict=True)
        ]
        """For each layer, keys and values as they are written."""
        self._readable = self._bits
        """For each layer, keys and values as they are read: float32, or the bits of bfloat16."""
        if cache.pool.dtype == torch.float32:
            self._readable = [(keys.view(np.float32), values.view(np.float32)) for keys, values in self._bits]
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
        key_bits, value_bits = (tensor.contiguous().numpy().view(np.uint32) for tensor in (key, value))
        store_in_pages(key_bits, value_bits, *self._places, *self._bits[layer])

    def _decode(self, layer: int, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        keys, values = self._readable[layer]
        query = query.contiguous()
        out = torch.empty_like(query)
        scale, window, softcap = np.float32(call.scale), call.window or 0, np.float32(call.softcap or 0)
        decode_rows(
            query.numpy(), keys, values, self._tables, self._ends, scale, window, softcap, out.numpy()
        )
        return out

    def _past(self, layer: int, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._keys[layer].index_select(0, segment.pages).transpose(2, 3)
        values = self._cache.pool[layer, 1].index_select(0, segment.pages)
        return join_pages(keys, segment, self.dtype), join_pages(values, segment, self.dtype)


def _transposed(pages: torch.Tensor) -> torch.Tensor:
    """The same memory as pages of [kv_heads, head_dim, page_size]."""
    count, kv_heads, page_size, head_dim = pages.shape
    return pages.view(count, kv_heads, head_dim, page_size)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The bits of float32 or bfloat16, uint32 or uint16, in the same memory."""
    return tensor.view(torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint32).numpy()
