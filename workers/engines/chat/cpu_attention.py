"""Attention over the paged KV cache in float32 on a CPU: two compiled loops a layer, which read each page once.

torch's own operations (paged_attention.py) need a dozen passes over scores and partial results, and hand the interpreter
lock back and forth in each. These loops hold no lock, and give the same result to rounding (ADR 0004 has the figures).
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from workers.engines.chat.attention import LayerCall
from workers.engines.chat.paged_attention import PagedAttention, Plan

REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in any order, which vector instructions need; infinities keep their meaning."""


class CpuPagedAttention(PagedAttention):
    """`PagedAttention` for a float32 cache in the machine's memory, [pages, kv_heads, page_size, head_dim] a layer."""

    def begin(self, plan: Plan) -> None:
        self.plan = plan
        pool = self._cache.pool.numpy()
        self._pools = [(pool[layer, 0], pool[layer, 1]) for layer in range(pool.shape[0])]
        self._places = plan.pages.numpy(), plan.offsets.numpy()
        held = [self._cache.tables[slot] for slot in plan.slots]
        self._tables = np.zeros((len(held), max(map(len, held), default=0)), np.int64)
        for row, table in enumerate(held):
            self._tables[row, : len(table)] = table
        self._ends = np.array(plan.ends, np.int64)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        keys, values = self._pools[layer]
        _store(key.contiguous().numpy(), value.contiguous().numpy(), *self._places, keys, values)

    def _decode(self, layer: int, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        keys, values = self._pools[layer]
        query = query.contiguous()
        out = torch.empty_like(query)
        scale, window, softcap = np.float32(call.scale), call.window or 0, np.float32(call.softcap or 0)
        _decode(query.numpy(), keys, values, self._tables, self._ends, scale, window, softcap, out.numpy())
        return out


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as machine code, kept beside this file from its first call on, or wherever numba may write."""
    try:
        return numba.njit(function, cache=True, nogil=True, fastmath=REORDERED)
    except RuntimeError:
        # nowhere to write: every start of a worker compiles for two seconds
        return numba.njit(function, nogil=True, fastmath=REORDERED)


def _store_in_pages(key: Any, value: Any, pages: Any, offsets: Any, keys: Any, values: Any) -> None:
    """key, value [tokens, kv_heads, head_dim] to keys, values[pages[token], :, offsets[token]]."""
    tokens, kv_heads, head_dim = key.shape
    for token in range(tokens):
        page, offset = pages[token], offsets[token]
        for head in range(kv_heads):
            for at in range(head_dim):
                keys[page, head, offset, at] = key[token, head, at]
                values[page, head, offset, at] = value[token, head, at]


def _exp_of_differences(row: Any, count: int) -> Any:
    """row[:count] becomes exp(row - its maximum). Returns the sum.

    exp(x) = 2^k e^r with |r| <= ln(2)/2: a polynomial of degree 6 is exact to float32's rounding, and unlike a call of
    the library's exp it is done for many numbers at once.
    """
    best = row[0]
    for at in range(1, count):
        best = max(best, row[at])
    exponents = np.empty(count, np.int32)
    powers = exponents.view(np.float32)
    for at in range(count):
        # below 2^-126 there are only denormals
        scaled = max((row[at] - best) * np.float32(1.4426950408889634), np.float32(-126))
        whole = np.floor(scaled + np.float32(0.5))
        exponents[at] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        r = (scaled - whole) * np.float32(0.6931471805599453)
        e = r * np.float32(1 / 720) + np.float32(1 / 120)
        e = e * r + np.float32(1 / 24)
        e = e * r + np.float32(1 / 6)
        e = e * r + np.float32(0.5)
        e = e * r + np.float32(1)
        row[at] = e * r + np.float32(1)
    total = np.float32(0)
    for at in range(count):
        row[at] *= powers[at]
        total += row[at]
    return total


def _decode_rows(
    query: Any,
    keys: Any,
    values: Any,
    tables: Any,
    ends: Any,
    scale: Any,
    window: int,
    softcap: Any,
    out: Any,
) -> None:
    """One query [heads, head_dim] for each row, over the pages tables[row] up to key ends[row]; 0: no window, no softcap."""
    rows, heads, head_dim = query.shape
    kv_heads, page_size = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    longest = 0
    for row in range(rows):
        longest = max(longest, ends[row])
    scores = np.empty((heads, longest), np.float32)
    for row in range(rows):
        end = ends[row]
        first = max(0, end - window) if window > 0 else 0
        for page in range(first // page_size, (end - 1) // page_size + 1):
            block, start = keys[tables[row, page]], page * page_size
            low, high = max(first, start), min(end, start + page_size)
            for kv_head in range(kv_heads):
                for place in range(low, high):
                    for head in range(kv_head * group, kv_head * group + group):
                        score = np.float32(0)
                        for at in range(head_dim):
                            score += query[row, head, at] * block[kv_head, place - start, at]
                        scores[head, place - first] = score * scale
        for head in range(heads):
            if softcap > 0:
                for place in range(end - first):
                    scores[head, place] = softcap * math.tanh(scores[head, place] / softcap)
            share = np.float32(1) / _exp(scores[head], end - first)
            for place in range(end - first):
                scores[head, place] *= share
            for at in range(head_dim):
                out[row, head, at] = 0
        for page in range(first // page_size, (end - 1) // page_size + 1):
            block, start = values[tables[row, page]], page * page_size
            low, high = max(first, start), min(end, start + page_size)
            for head in range(heads):
                for place in range(low, high):
                    weight = scores[head, place - first]
                    for at in range(head_dim):
                        out[row, head, at] += weight * block[head // group, place - start, at]


_store = compiled(_store_in_pages)
_exp = compiled(_exp_of_differences)
_decode = compiled(_decode_rows)
