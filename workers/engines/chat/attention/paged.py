"""Attention over the paged KV cache with torch's own operations: on any device, and where no faster kernel fits.

Each page of the active pool is a batch element: queries are copied to their pages, two batched products run over the
pool where it lies, and the pages' partial results are merged by a segmented softmax. No gathering, no padding to the
longest, work in proportion to the tokens held.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from workers.engines.chat.attention.base import LayerCall, ModelAttention
from workers.engines.chat.cache.kv_cache import KVCache

MASKED = -1e30
"""Finite, so that a page without a visible key gets weight 0 and not NaN."""


@dataclass(slots=True)
class Segment:
    """Tokens start..end of the step are positions past..past+end-start of one sequence."""

    start: int
    end: int
    past: int
    pages: torch.Tensor
    """int64 [pages of the sequence up to its last token here]."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """bool [tokens, keys]: what each token sees. The same in all layers of one window."""
        if window not in self.masks:
            queries = torch.arange(self.past, self.past + self.end - self.start, device=self.pages.device)[
                :, None
            ]
            keys = torch.arange(self.past + self.end - self.start, device=self.pages.device)[None, :]
            seen = keys <= queries
            self.masks[window] = seen if window is None else seen & (keys > queries - window)
        return self.masks[window]


@dataclass(slots=True)
class Plan:
    """One step's tokens. Index tensors are int64."""

    ids: torch.Tensor
    """[tokens]"""
    positions: torch.Tensor
    """[tokens]"""
    pages: torch.Tensor
    """[tokens]: page each token's key and value go to."""
    offsets: torch.Tensor
    """[tokens]: place inside that page."""
    slots: list[int]
    """Of the decode rows, which stand before the segments' tokens."""
    ends: list[int]
    """Of the decode rows: keys that each may see, its own included."""
    segments: list[Segment]
    outputs: torch.Tensor | None
    """Tokens whose logits are wanted; None: all."""


class PagedAttention(ModelAttention):
    """Attention with torch's own operations, for any device. `begin` comes before each forward pass."""

    def begin(self, plan: Plan) -> None:
        self.plan = plan
        self._owners = PageOwners(self._cache, plan) if plan.slots else None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        self._store(layer, key, value)
        rows = len(self.plan.slots)
        parts = [self._decode(layer, query[:rows], call)] if rows else []
        for segment in self.plan.segments:
            own = slice(segment.start, segment.end)
            query_of, key_of, value_of = (tensor[own].transpose(0, 1) for tensor in (query, key, value))
            if segment.past:
                key_of = _gather(self._cache.pool[layer, 0], segment)
                value_of = _gather(self._cache.pool[layer, 1], segment)
            parts.append(_prefill(segment, query_of, key_of, value_of, call))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """New keys and values [tokens, kv_heads, head_dim] into their pages."""
        self._cache.pool[layer, 0][self.plan.pages, :, self.plan.offsets] = key
        self._cache.pool[layer, 1][self.plan.pages, :, self.plan.offsets] = value

    def _decode(self, layer: int, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """query [rows, heads, head_dim] of the decode rows, over their pages -> like query."""
        assert self._owners is not None
        keys, values = self._cache.pool[layer, 0], self._cache.pool[layer, 1]
        return _decode(self._owners, query, keys, values, call)


class PageOwners:
    """For each active page the decode row it belongs to, so that all pages can be treated as one batch."""

    def __init__(self, cache: KVCache, plan: Plan) -> None:
        active, rows = cache.num_active, len(cache.tables)
        row_of_slot, length_of_slot = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        row_of_slot[plan.slots] = np.arange(len(plan.slots))
        length_of_slot[plan.slots] = plan.ends
        slot, start = cache.slot_of_page[:active], cache.start_of_page[:active]
        past_start = length_of_slot[slot] - start
        of_pages = [row_of_slot[slot], np.clip(past_start, 0, cache.page_size), past_start - 1]
        self.owner, self._visible, self._newest = to_device(np.stack(of_pages), cache.pool.device)
        """int64 [active pages] each. `owner` of a page of nobody's is any row, with nothing visible; `_visible`: keys that
        the owner sees, from the page's start; `_newest`: the owner's position minus the page's first."""
        self._page_size = cache.page_size
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor:
        """float32 [active pages, 1, 1, page_size], added to scores."""
        if window not in self._masks:
            places = torch.arange(self._page_size, device=self.owner.device)
            seen = places < self._visible[:, None]
            if window is not None:
                seen &= places > self._newest[:, None] - window
            self._masks[window] = torch.where(seen, 0.0, MASKED)[:, None, None]
        return self._masks[window]


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor over there."""
    tensor = torch.as_tensor(values)
    # pinned memory lets the copy run beside the host; on a CPU there is nothing to copy
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _decode(
    owners: PageOwners, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> torch.Tensor:
    """keys, values [pages, kv_heads, page_size, head_dim]."""
    rows, heads, head_dim = query.shape
    owner, active = owners.owner, owners.owner.shape[0]
    _, kv_heads, page_size, _ = keys.shape
    group = heads // kv_heads
    # each page gets its owner's query; the heads that share a key head stand as rows of one small product
    spread = (
        (query.reshape(rows, -1) * call.scale).index_select(0, owner).view(active * kv_heads, group, head_dim)
    )
    flat_keys = keys[:active].view(active * kv_heads, page_size, head_dim)
    flat_values = values[:active].view(active * kv_heads, page_size, head_dim)
    scores = torch.bmm(spread, flat_keys.transpose(1, 2)).float()
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.view(active, kv_heads, group, page_size) + owners.mask(call.window)
    # softmax over all pages of a row: common maximum, then sums by owner
    best = scores.amax(-1).view(active, heads)
    by_head = owner[:, None].expand(active, heads)
    row_best = best.new_full((rows, heads), 2 * MASKED).scatter_reduce_(0, by_head, best, "amax")
    weights = scores.sub_(row_best.index_select(0, owner).view(active, kv_heads, group, 1)).exp_()
    total = best.new_zeros(rows, heads).index_add_(0, owner, weights.sum(-1).view(active, heads))
    weights = weights.to(values.dtype).view(active * kv_heads, group, page_size)
    partial = torch.bmm(weights, flat_values).view(active, heads, head_dim).float()
    merged = best.new_zeros(rows, heads, head_dim).index_add_(0, owner, partial)
    return (merged / total[..., None]).to(query.dtype)


def _gather(pool: torch.Tensor, segment: Segment) -> torch.Tensor:
    """A sequence's keys or values up to its last token here, [kv_heads, keys, head_dim]."""
    _, kv_heads, _, head_dim = pool.shape
    pages = pool.index_select(0, segment.pages).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    return pages[:, : segment.past + segment.end - segment.start]


def _prefill(
    segment: Segment, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> torch.Tensor:
    """query [heads, tokens, head_dim], keys and values [kv_heads, keys, head_dim] -> [tokens, heads, head_dim]."""
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
