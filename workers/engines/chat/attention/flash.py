"""Attention on a GPU with torch's FlashAttention over the pages.

Not run on a GPU in this repository's tests: these replace `varlen_attn` with a plain function.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from workers.engines.chat.attention.base import LayerCall, ModelAttention, UnsupportedAttention, to_device
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.sequence import Chunk


@dataclass(slots=True)
class FlashMetadata:
    """Which tokens of a step belong to which sequence, in the form of FlashAttention's varlen kernel."""

    pages: torch.Tensor
    """int64 [tokens]: page of each token's key and value."""
    offsets: torch.Tensor
    """int64 [tokens]: offset inside that page."""
    query_starts: torch.Tensor
    """int32 [sequences + 1]"""
    key_starts: torch.Tensor
    """int32 [sequences + 1]"""
    key_lengths: torch.Tensor
    """int32 [sequences]"""
    block_table: torch.Tensor
    """int32 [sequences, pages of the longest context]"""
    longest_query: int
    longest_key: int


class FlashPagedAttention(ModelAttention):
    """Attention over a token-major cache, for contexts of up to `max_context` tokens."""

    name = "FlashAttention"

    def __init__(self, cache: KVCache, max_context: int) -> None:
        super().__init__(cache)
        self._max_context = max_context
        self._metadata: FlashMetadata | None = None

    def prepare(self, chunks: list[Chunk]) -> None:
        cache, device = self._cache, self._cache.pool.device
        slots = [chunk.slot for chunk in chunks]
        table = cache.tables[slots, : cache.pages_for(self._max_context)]
        places = to_device(cache.places(chunks), device)
        queries = np.array([len(chunk.tokens) for chunk in chunks])
        keys = np.array([chunk.end for chunk in chunks])
        longest = int(queries.max())
        self._metadata = FlashMetadata(
            pages=places[0],
            offsets=places[1],
            query_starts=to_device(_starts(queries), device),
            key_starts=to_device(_starts(keys), device),
            key_lengths=to_device(keys.astype(np.int32), device),
            block_table=to_device(table, device),
            longest_query=longest,
            # a CUDA graph replays the bound it was recorded with, so decode steps always use the largest
            longest_key=self._max_context if longest == 1 else int(keys.max()),
        )

    def buffers(self) -> list[torch.Tensor]:
        """The tensors of the metadata that was prepared last.

        All else in the metadata depends only on the number of chunks, as long as each has one token. A
        recorded forward pass can therefore be replayed for other chunks by overwriting these tensors.
        """
        metadata = self._prepared()
        return [
            metadata.pages,
            metadata.offsets,
            metadata.query_starts,
            metadata.key_starts,
            metadata.key_lengths,
            metadata.block_table,
        ]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        if call.softcap is not None:
            raise UnsupportedAttention("it needs attention with softcap")
        metadata = self._prepared()
        keys, values = self._cache.pool[layer, 0], self._cache.pool[layer, 1]
        keys[metadata.pages, metadata.offsets] = key
        values[metadata.pages, metadata.offsets] = value
        out = varlen_attn(
            query.contiguous(),
            keys,
            values,
            metadata.query_starts,
            metadata.key_starts,
            metadata.longest_query,
            metadata.longest_key,
            scale=call.scale,
            # a window of n keys includes the query's own: n - 1 to its left, none to its right
            window_size=(-1 if call.window is None else call.window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=metadata.key_lengths,
            block_table=metadata.block_table,
        )
        assert isinstance(out, torch.Tensor)
        return out

    def _prepared(self) -> FlashMetadata:
        if self._metadata is None:
            raise RuntimeError("prepare() must come before the forward pass")
        return self._metadata


def _starts(lengths: np.ndarray) -> np.ndarray:
    """int32 [lengths + 1]: where each of several consecutive runs starts, and where the last one ends."""
    return np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
