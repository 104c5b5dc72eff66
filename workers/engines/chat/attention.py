"""Attention over the paged KV cache, hooked into any transformers model through its attention interface.

All tokens of a step go through the model as one row, [1, tokens]: first the decode rows (one token each), then the
prefill segments. Only attention needs to know which token belongs to whom; a `Plan` tells it.

The portable kernel (CPU, and any device as a fallback) treats each page of the active pool as a batch element: queries
are copied to their pages, two batched products run over the pool where it lies, and the pages' partial results are
merged by a segmented softmax. No gathering, no padding to the longest, work in proportion to the tokens held.
The varlen kernel (CUDA) is torch's own FlashAttention with a block table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workers.engines.chat.kv_cache import KVCache

MASKED = -1e30
"""Finite, so that a page without a visible key gets weight 0 and not NaN."""

KNOWN_ARGUMENTS = frozenset(
    {"dropout", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position"}
    | {"past_key_values", "logits_to_keep", "return_dict"}
)
"""What models hand to attention without a meaning for it; so are the `output_...` flags."""


class UnsupportedAttention(Exception):
    """The model asks for something that this attention doesn't do."""


def check_arguments(others: dict[str, Any]) -> None:
    """Raises UnsupportedAttention for an argument that would change the result (sinks, biases, ...)."""
    strange = [
        name
        for name, given in others.items()
        if given is not None and name not in KNOWN_ARGUMENTS and not name.startswith("output_")
    ]
    if strange:
        raise UnsupportedAttention(f"it wants attention with {', '.join(strange)}")


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
    decode_rows: int
    segments: list[Segment]
    outputs: torch.Tensor | None
    """Tokens whose logits are wanted; None: all."""
    owner: torch.Tensor
    """[active pages]: decode row each page belongs to; of other pages any row, with nothing visible."""
    visible: torch.Tensor
    """[active pages]: keys that the owner sees, from the page's start."""
    newest: torch.Tensor
    """[active pages]: the owner's position minus the page's first position, for sliding windows."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, page_size: int) -> torch.Tensor:
        """float32 [active pages, 1, 1, page_size], added to scores."""
        if window not in self.masks:
            places = torch.arange(page_size, device=self.visible.device)
            seen = places < self.visible[:, None]
            if window is not None:
                seen &= places > self.newest[:, None] - window
            self.masks[window] = torch.where(seen, 0.0, MASKED)[:, None, None]
        return self.masks[window]


def page_owners(
    cache: KVCache, slots: list[int], lengths: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each active page: owning decode row, visible keys, newest position. `lengths`: keys each row may see."""
    active = cache.num_active
    row_of_slot = np.zeros(len(cache.tables), np.int64)
    length_of_slot = np.zeros(len(cache.tables), np.int64)
    row_of_slot[slots] = np.arange(len(slots))
    length_of_slot[slots] = lengths
    slot, start = cache.slot_of_page[:active], cache.start_of_page[:active]
    past_start = length_of_slot[slot] - start
    return row_of_slot[slot], np.clip(past_start, 0, cache.page_size), past_start - 1


def register(attention: Callable[..., Any]) -> str:
    """Make an attention known to transformers. Returns the name for `set_attn_implementation`.

    The name has no entry among transformers' mask functions, so that models build no masks.
    """
    name = f"paged_{id(attention)}"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    return name


class PagedAttention:
    """The function that a model calls in each layer. `plan` is set before each forward pass."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.plan: Plan | None = None
        self.windowed_layers: set[int] = set()

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim], all of new tokens.

        Returns [1, tokens, heads, head_dim].
        """
        check_arguments(others)
        assert self.plan is not None
        layer: int = module.layer_idx  # type: ignore[assignment]
        if sliding_window is not None:
            self.windowed_layers.add(layer)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        out = self._attend(self.plan, layer, query[0], key[0], value[0], scale, sliding_window, softcap)
        return out[None], None

    def _attend(
        self,
        plan: Plan,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        keys, values = self._cache.pool[layer, 0], self._cache.pool[layer, 1]
        keys[plan.pages, :, plan.offsets] = key.transpose(0, 1)
        values[plan.pages, :, plan.offsets] = value.transpose(0, 1)
        parts = []
        if rows := plan.decode_rows:
            parts.append(_decode(plan, query[:, :rows].transpose(0, 1), keys, values, scale, window, softcap))
        for segment in plan.segments:
            own = slice(segment.start, segment.end)
            fresh = segment.past == 0
            all_keys = key[:, own] if fresh else _gather(keys, segment)
            all_values = value[:, own] if fresh else _gather(values, segment)
            parts.append(_prefill(segment, query[:, own], all_keys, all_values, scale, window, softcap))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(
    plan: Plan,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """query [rows, heads, head_dim], keys and values [pages, kv_heads, page_size, head_dim] -> like query."""
    rows, heads, head_dim = query.shape
    owner, active = plan.owner, plan.owner.shape[0]
    _, kv_heads, page_size, _ = keys.shape
    group = heads // kv_heads
    # each page gets its owner's query; the heads that share a key head stand as rows of one small product
    spread = (query.reshape(rows, -1) * scale).index_select(0, owner).view(active * kv_heads, group, head_dim)
    flat_keys = keys[:active].view(active * kv_heads, page_size, head_dim)
    flat_values = values[:active].view(active * kv_heads, page_size, head_dim)
    scores = torch.bmm(spread, flat_keys.transpose(1, 2)).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(active, kv_heads, group, page_size) + plan.mask(window, page_size)
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
    segment: Segment,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """query [heads, tokens, head_dim], keys and values [kv_heads, keys, head_dim] -> [tokens, heads, head_dim]."""
    heads, tokens, _ = query.shape
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
