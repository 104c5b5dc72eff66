"""The place where a transformers model calls for attention in each of its layers: its attention interface.

All tokens of a step go through the model as one row, [1, tokens]. Only attention needs to know which token belongs to
whom; the plan of the step tells it (paged_attention.py, cuda_runner.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workers.engines.chat.cache.kv_cache import KVCache

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


class LayerCall(NamedTuple):
    """What a layer of a model hands to attention beside its tensors, the same in each step."""

    scale: float
    window: int | None
    """Keys that a token sees, its own included; None: all before it."""
    softcap: float | None


class ModelAttention:
    """What a transformers model calls in each of its layers. `attend` does the work."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.layers: dict[int, LayerCall] = {}
        """By layer, how the model called it last."""

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
        layer: int = module.layer_idx  # type: ignore[assignment]
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        call = self.layers[layer] = LayerCall(scale, sliding_window, softcap)
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self.attend(layer, query, key, value, call)[None], None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """Keep new keys and values, and attend. query [tokens, heads, head_dim], key and value with kv_heads -> like query."""
        raise NotImplementedError


def register(attention: Callable[..., Any]) -> str:
    """Make an attention known to transformers. Returns the name for `set_attn_implementation`.

    The name has no entry among transformers' mask functions, so that models build no masks.
    """
    name = f"paged_{id(attention)}"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    return name
