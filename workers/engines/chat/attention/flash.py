"""Attention on a GPU with torch's FlashAttention over the pages.

Not run on a GPU in this repository's tests. A stand-in with the kernel's rules replaces `varlen_attn` there
(tests/gpu_stand_ins).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from workers.engines.chat.attention.base import LayerCall, ModelAttention, UnsupportedAttention, count_rows
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.sequence import Chunk

BOUNDS = (2048, 16384)
"""Tokens. The longest context of a decode step is rounded up to one of these, or to the largest possible.

The kernel divides its work by this bound, and a CUDA graph replays the one it was recorded with.
"""


class Sequences(NamedTuple):
    """Some sequences of a step, in the form of FlashAttention's varlen kernel."""

    longest_query: int
    longest_key: int
    query_starts: torch.Tensor
    """int32 [sequences + 1]"""
    key_starts: torch.Tensor
    """int32 [sequences + 1]"""
    key_lengths: torch.Tensor
    """int32 [sequences]"""
    block_table: torch.Tensor
    """int32 [sequences, pages]"""


class Destination(NamedTuple):
    """Where a layer's new keys and values go."""

    keys: torch.Tensor
    """[pages, page_size, kv_heads, head_dim]"""
    values: torch.Tensor
    """like keys"""
    pages: torch.Tensor
    """int64 [tokens]"""
    offsets: torch.Tensor
    """int64 [tokens]: the token's place in its page."""


class FlashPagedAttention(ModelAttention):
    """Attention over a token-major cache, for contexts of up to `max_context` tokens.

    Decode rows and longer chunks are two calls of the kernel: its way of sharing key heads, and of splitting
    long contexts, needs queries of one token.
    """

    name = "FlashAttention"

    def __init__(self, cache: KVCache, max_context: int) -> None:
        super().__init__(cache)
        self.device = cache.pool.device
        self.bounds = [*(bound for bound in BOUNDS if bound < max_context), max_context]
        """All values of a decode step's bound on its contexts, in ascending order."""
        self._lengths: list[tuple[int, int]] = []
        """Longest query and longest key of each call."""
        self._rows = 0
        self._pages = self._offsets = torch.zeros(0, dtype=torch.int64)
        """int64 [tokens]: page of each token's key and value, and the offset inside it."""
        self._calls: list[Sequences] = []

    def bound_of(self, rows: list[Chunk]) -> int:
        """The bound that a decode step over these rows uses."""
        longest = max(chunk.end for chunk in rows)
        return next(bound for bound in self.bounds if bound >= longest)

    def prepare(self, chunks: list[Chunk], bound: int | None = None) -> list[np.ndarray]:
        """As in ModelAttention. `bound` is used instead of `bound_of` the decode rows."""
        self._rows = count_rows(chunks)
        self._lengths = []
        inputs = [self._cache.places(chunks)]
        rows, longer = chunks[: self._rows], chunks[self._rows :]
        if rows:
            inputs += self._describe(rows, bound or self.bound_of(rows))
        if longer:
            inputs += self._describe(longer, max(chunk.end for chunk in longer))
        return inputs

    def bind(self, inputs: list[torch.Tensor]) -> None:
        (self._pages, self._offsets), *others = inputs
        self._calls = [
            Sequences(*lengths, *others[4 * number : 4 * number + 4])
            for number, lengths in enumerate(self._lengths)
        ]

    def _describe(self, chunks: list[Chunk], longest_key: int) -> list[np.ndarray]:
        queries = np.array([len(chunk.tokens) for chunk in chunks], np.int32)
        keys = np.array([chunk.end for chunk in chunks], np.int32)
        slots = [chunk.slot for chunk in chunks]
        table = self._cache.tables[slots, : self._cache.pages_for(longest_key)]
        self._lengths.append((int(queries.max()), longest_key))
        return [_starts(queries), _starts(keys), keys, table]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        keys, values, pages, offsets = self.destination(layer)
        keys[pages, offsets] = key
        values[pages, offsets] = value
        return self.attend_stored(layer, query, call)

    def destination(self, layer: int) -> Destination:
        """Where the step's new keys and values of a layer go."""
        pool = self._cache.pool[layer]
        return Destination(pool[0], pool[1], self._pages, self._offsets)

    def attend_stored(self, layer: int, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """`attend`, after the new keys and values have been written to their destination."""
        if call.softcap is not None:
            raise UnsupportedAttention("it needs attention with softcap")
        keys, values = self._cache.pool[layer]
        parts = [query] if len(self._calls) == 1 else query.tensor_split([self._rows])
        out = [
            _attend(part.contiguous(), keys, values, sequences, call)
            for part, sequences in zip(parts, self._calls, strict=True)
        ]
        return out[0] if len(out) == 1 else torch.cat(out)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sequences: Sequences, call: LayerCall
) -> torch.Tensor:
    """One call of the kernel. query [tokens, heads, head_dim] -> like query."""
    heads, kv_heads = query.shape[1], keys.shape[2]
    # The kernel of torch 2.13 computes the rows of a split context wrongly (pytorch issue 194167), unless it
    # treats the query heads that share a key head as one sequence. It does so only for queries of one token,
    # without any window, and the causal one counts.
    may_split = sequences.longest_query == 1 and call.window is None and heads > kv_heads
    # a window of n keys includes the query's own: n - 1 to its left, none to its right
    window = (-1, -1) if may_split else (-1 if call.window is None else call.window - 1, 0)
    out = varlen_attn(
        query,
        keys,
        values,
        sequences.query_starts,
        sequences.key_starts,
        sequences.longest_query,
        sequences.longest_key,
        scale=call.scale,
        window_size=window,
        enable_gqa=heads != kv_heads,
        seqused_k=sequences.key_lengths,
        block_table=sequences.block_table,
        num_splits=None if may_split else 1,
    )
    assert isinstance(out, torch.Tensor)
    return out


def _starts(lengths: np.ndarray) -> np.ndarray:
    """int32 [lengths + 1]: where each of several consecutive runs starts, and where the last one ends."""
    return np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
