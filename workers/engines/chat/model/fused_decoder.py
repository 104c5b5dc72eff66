"""The forward pass of Llama-shaped models in few large operations.

Each of transformers' own layers runs some 60 operations and as much Python between them: with one row in the
batch that is most of a step. Here query, key and value are one product, as are gate and up; layers.py has
what lies between the products. backend.py compares the result with the model's own before the first request.
transformers' layers are used if it differs, and for every other architecture.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from workers.engines.chat.attention.base import ModelAttention
from workers.engines.chat.model.head import Head
from workers.engines.chat.model.layers import LayerAttention, LayerOperations, Norm
from workers.engines.chat.model.linear import LinearProduct, join, linear_product

if TYPE_CHECKING:
    from workers.engines.chat.vision.encoder import ImageInput

ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Models whose layers are norm, attention with rotary positions, residual, norm, gated MLP, residual.

Listed by name and not recognised by structure, because a short comparison wouldn't show a scale that changes
only far into the context.
"""


@dataclass(frozen=True, slots=True)
class _Layer:
    query_key_value: LinearProduct
    attention: LayerAttention
    attention_out: LinearProduct
    mlp_norm: Norm
    gate_up: LinearProduct
    down: LinearProduct
    next_norm: Norm
    """The input norm of the next layer, or the model's last norm."""


def can_fuse(model: Any) -> bool:
    """Whether FusedDecoder can run `model`: one of ARCHITECTURES, unquantized."""
    if type(model).__name__ not in ARCHITECTURES or getattr(model, "is_quantized", False):
        return False
    linears = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    return all(type(module) is nn.Linear for module in linears) and model.config.hidden_act == "silu"


class JoinedWeights(NamedTuple):
    """Weight and bias of one layer's two joined products."""

    query_key_value: tuple[torch.Tensor, torch.Tensor | None]
    gate_up: tuple[torch.Tensor, torch.Tensor | None]


def join_weights(model: Any) -> list[JoinedWeights]:
    """Join the weights of each layer.

    The model's own become views of the result, so that the model still runs.
    """
    return [
        JoinedWeights(
            join([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            join([layer.mlp.gate_proj, layer.mlp.up_proj]),
        )
        for layer in model.model.layers
    ]


class FusedDecoder:
    """Implements runner.Forward with the weights of `model`."""

    def __init__(
        self,
        model: Any,
        joined: list[JoinedWeights],
        attention: ModelAttention,
        operations: LayerOperations,
    ) -> None:
        """The model must have run once with `attention`, which has then recorded each layer's arguments."""
        inner = model.model
        self._embedding: torch.Tensor = inner.embed_tokens.weight.detach()
        self._operations = operations
        self._dtype = attention.dtype
        self._first_norm = _norm(inner.layers[0].input_layernorm, self._dtype)
        next_norms = [*(layer.input_layernorm for layer in inner.layers[1:]), inner.norm]
        self._layers = [
            _layer(layer, weights, attention, _norm(next_norm, self._dtype))
            for layer, weights, next_norm in zip(inner.layers, joined, next_norms, strict=True)
        ]
        self._head_weight: torch.Tensor = model.lm_head.weight.detach()
        self.head = Head(self._head_weight, model.lm_head.bias, self._dtype)
        self._last_norm = self._layers[-1].next_norm
        rounded = self._head_weight.dtype == torch.bfloat16 and model.lm_head.bias is None
        self._refines = rounded and operations.refines

    def with_attention(self, attention: ModelAttention) -> "FusedDecoder":
        """Return a decoder with the same weights around another attention of the same kind."""
        other = copy.copy(self)
        other._operations = self._operations.with_attention(attention)
        return other

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        outputs: torch.Tensor | None,
        images: "ImageInput | None" = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Implements Forward. In these architectures the positions of images are in order."""
        ops = self._operations
        x = F.embedding(ids, self._embedding) if images is None else images.embeds
        x = x.to(self._dtype)
        normed = ops.norm(x, self._first_norm)
        for layer in self._layers:
            attended = ops.attend(layer.query_key_value(normed), positions, layer.attention)
            x, normed = ops.add_norm(x, layer.attention_out(attended), layer.mlp_norm)
            x, normed = ops.add_norm(x, layer.down(ops.gate(layer.gate_up(normed))), layer.next_norm)
        logits = self.head(normed if outputs is None else normed[outputs], out)
        if self._refines:
            # `normed` is rounded to the weights' dtype
            exact = ops.norm(x if outputs is None else x[outputs], self._last_norm)
            ops.refine_greatest(logits, exact, self._head_weight)
        return logits


def _layer(layer: Any, joined: JoinedWeights, attention: ModelAttention, next_norm: Norm) -> _Layer:
    own, mlp, dtype = layer.self_attn, layer.mlp, attention.dtype
    has_norms = hasattr(own, "q_norm")
    norms = (_norm(own.q_norm, dtype), _norm(own.k_norm, dtype)) if has_norms else None
    return _Layer(
        query_key_value=linear_product(*joined.query_key_value),
        attention=LayerAttention(own.layer_idx, attention.layers[own.layer_idx], norms),
        attention_out=linear_product(own.o_proj.weight, own.o_proj.bias),
        mlp_norm=_norm(layer.post_attention_layernorm, dtype),
        gate_up=linear_product(*joined.gate_up),
        down=linear_product(mlp.down_proj.weight, mlp.down_proj.bias),
        next_norm=next_norm,
    )


def _norm(module: Any, dtype: torch.dtype) -> Norm:
    return Norm(module.weight.detach().to(dtype), module.variance_epsilon)
