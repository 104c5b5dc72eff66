"""The protocol between a model's layers and an attention implementation over the paged KV cache.

All tokens of a step go through the model as one row, [1, tokens]. Only attention needs to know which token
belongs to which sequence: before the forward pass `prepare` builds this metadata from the step's chunks, the
runner copies it to the device together with the model's own input, and `bind` takes it there. Each layer then
calls `attend`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.sequence import Chunk

KNOWN_ARGUMENTS = frozenset(
    {"dropout", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position"}
    | {"past_key_values", "logits_to_keep", "return_dict"}
)
"""Arguments of transformers' models that don't change attention's result. `output_...` flags don't either."""


class UnsupportedAttention(Exception):
    """The model asks for something that this attention doesn't do."""


class LayerCall(NamedTuple):
    """The arguments, besides tensors, that a layer passes to attention. They are the same in every step."""

    scale: float
    window: int | None
    """Number of keys that a token sees, its own included; None: all keys up to its own."""
    softcap: float | None


class ModelAttention:
    """The attention function of a transformers model. Subclasses implement `prepare`, `bind` and `attend`."""

    name: str
    """What the log calls this implementation."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.dtype = cache.shape.dtype
        """Of the tensors that `attend` takes and returns."""
        self.layers: dict[int, LayerCall] = {}
        """By layer, the arguments of its most recent call."""
        self._registered_name = f"paged_{id(self)}"

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
        """Implement transformers' attention interface.

        query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim], all of the step's
        tokens. Returns [1, tokens, heads, head_dim]. Raises UnsupportedAttention.
        """
        check_arguments(others)
        layer: int = module.layer_idx  # type: ignore[assignment]
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        call = self.layers[layer] = LayerCall(scale, sliding_window, softcap)
        dtype = query.dtype
        query, key, value = (tensor[0].transpose(0, 1).to(self.dtype) for tensor in (query, key, value))
        return self.attend(layer, query, key, value, call)[None].to(dtype), None

    def register(self) -> str:
        """Make this attention known to transformers. Returns the name for `set_attn_implementation`.

        The name has no entry among transformers' mask functions, so models build no masks.
        """
        ALL_ATTENTION_FUNCTIONS[self._registered_name] = self
        return self._registered_name

    def unregister(self) -> None:
        """Undo `register`, so that the cache's memory can be freed."""
        ALL_ATTENTION_FUNCTIONS.pop(self._registered_name, None)

    def prepare(self, chunks: list[Chunk]) -> list[np.ndarray]:
        """Build the metadata of the next forward pass, which computes exactly these chunks.

        Chunks of one token are decode rows and come before longer ones. Returns what `attend` reads on the
        device.
        """
        raise NotImplementedError

    def bind(self, inputs: list[torch.Tensor]) -> None:
        """Take the arrays that `prepare` returned, on the device."""
        raise NotImplementedError

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """Store the new keys and values in the cache, and attend.

        query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] -> like query.
        """
        raise NotImplementedError


def check_arguments(others: dict[str, Any]) -> None:
    """Raise UnsupportedAttention for an argument that would change the result (sinks, biases, ...)."""
    unknown = [
        name
        for name, given in others.items()
        if given is not None and name not in KNOWN_ARGUMENTS and not name.startswith("output_")
    ]
    if unknown:
        raise UnsupportedAttention(f"it needs attention with {', '.join(unknown)}")


def count_rows(chunks: list[Chunk]) -> int:
    """The number of decode rows: chunks of one token, which come first."""
    return next((at for at, chunk in enumerate(chunks) if len(chunk.tokens) > 1), len(chunks))
