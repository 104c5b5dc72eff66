"""`torch.nn.attention.varlen.varlen_attn` as the pinned CUDA build of torch computes it, errors included.

The rules are those of `mha_varlen_fwd` in torch 2.13.0 for an H100: when it lets the query heads that share a
key head be one sequence, into how many parts it splits a long context, and that the merging of such parts
writes every sequence to the first rows of the result (pytorch issue 194167).
"""

import math
from typing import NamedTuple

import torch

MULTIPROCESSORS = 132
MOST_SPLITS = 128
UNWRITTEN = 0.1
"""Stands for memory that nobody has written to."""


class Call(NamedTuple):
    """What a call of the kernel chose."""

    sequences: int
    longest_query: int
    grouped: bool
    splits: int


class FlashAttentionStandIn:
    """Replaces `varlen_attn`. Keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        longest_query: int,
        longest_key: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor,
        num_splits: int | None,
    ) -> torch.Tensor:
        heads, kv_heads, head_dim = query.shape[1], keys.shape[2], query.shape[2]
        assert query_starts.dtype == key_starts.dtype == seqused_k.dtype == block_table.dtype == torch.int32
        assert query.is_contiguous() and len(key_starts) == len(query_starts) == len(seqused_k) + 1
        assert enable_gqa == (heads != kv_heads)
        left, right = window_size
        # one token sees all keys either way; but the kernel still takes (-1, 0) for a window
        grouped = longest_query == 1 and heads > kv_heads and left < 0 and right < 0 and head_dim % 8 == 0
        rows = heads // kv_heads if grouped else longest_query
        blocks = len(seqused_k) * (kv_heads if grouped else heads) * -(-rows // 64)
        key_block = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
        splits = num_splits or number_of_splits(blocks, -(-longest_key // key_block))
        self.calls.append(Call(len(seqused_k), longest_query, grouped, splits))
        return paged_attention(
            query,
            keys,
            values,
            query_starts,
            seqused_k,
            block_table,
            scale,
            left,
            right,
            longest_query,
            longest_key,
            splits > 1 and not grouped,
        )


def number_of_splits(blocks: int, key_blocks: int) -> int:
    """The smallest number of parts that is within 85 % of the best use of the multiprocessors."""
    processors = 2 * MULTIPROCESSORS
    if blocks >= 0.8 * processors:
        return 1
    candidates = [
        splits
        for splits in range(1, min(MOST_SPLITS, processors, key_blocks) + 1)
        if splits == 1 or -(-key_blocks // splits) != -(-key_blocks // (splits - 1))
    ]
    use = {splits: blocks * splits / processors for splits in candidates}
    efficiency = {splits: waves / math.ceil(waves) for splits, waves in use.items()}
    best = max(efficiency.values())
    return next(splits for splits in candidates if efficiency[splits] >= 0.85 * best)


@torch.library.custom_op("tests::paged_attention", mutates_args=())
def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor,
    key_lengths: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    left: int,
    right: int,
    longest_query: int,
    longest_key: int,
    all_to_first_rows: bool,
) -> torch.Tensor:
    """Attend, one sequence after another. One operation, so that a graph can repeat it."""
    out = torch.full_like(query, UNWRITTEN)
    for number, count in enumerate(key_lengths.tolist()):
        start, end = int(query_starts[number]), int(query_starts[number + 1])
        assert end - start <= longest_query and count <= longest_key
        pages = block_table[number].long()
        own_keys, own_values = (pool[pages].flatten(0, 1)[:count].transpose(0, 1) for pool in (keys, values))
        at = torch.arange(count - (end - start), count)[:, None]
        seen = torch.ones(end - start, count, dtype=torch.bool)
        if left >= 0:
            seen &= torch.arange(count)[None] >= at - left
        if right >= 0:
            seen &= torch.arange(count)[None] <= at + right
        result = torch.nn.functional.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            own_keys[None],
            own_values[None],
            attn_mask=seen,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[2],
        )[0].transpose(0, 1)
        first = 0 if all_to_first_rows else start
        out[first : first + end - start] = result
    return out
