"""The forward pass of Llama-shaped models in few large operations.

Each of transformers' own layers runs some 60 operations and as much Python between them: with one row in the
batch that is most of a step. Here query, key and value are one product, as are gate and up, and keys and
queries are rotated together (layers.py). backend.py compares the result with the model's own before the first
request. transformers' layers are used if it differs, and for every other architecture.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from workers.engines.chat.attention.base import LayerCall, ModelAttention
from workers.engines.chat.model.layers import layer_operations
from workers.engines.chat.model.linear import LinearProduct, join, linear_product

ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Models whose layers are norm, attention with rotary positions, residual, norm, gated MLP, residual.

Listed by name and not recognised by structure, because a short comparison wouldn't show a scale that changes
only far into the context.
"""


class _Norm(NamedTuple):
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: _Norm
    query_key_value: LinearProduct
    query_norm: _Norm | None
    key_norm: _Norm | None
    attention_out: LinearProduct
    mlp_norm: _Norm
    gate_up: LinearProduct
    down: LinearProduct
    call: LayerCall


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
        self, model: Any, joined: list[JoinedWeights], attention: ModelAttention, max_context: int
    ) -> None:
        """The model must have run once with `attention`, which has then recorded each layer's arguments."""
        inner, config = model.model, model.config
        self._attention = attention
        self._embedding: torch.Tensor = inner.embed_tokens.weight.detach()
        self._operations = layer_operations(inner.rotary_emb, max_context, self._embedding)
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._layers = [
            _layer(layer, joined[number], attention.layers[number])
            for number, layer in enumerate(inner.layers)
        ]
        self._norm = _norm(inner.norm)
        self._head = linear_product(model.lm_head.weight, model.lm_head.bias)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the logits [outputs, vocabulary] of the tokens `outputs`, int64; None: of all tokens.

        ids, positions int64 [tokens].
        """
        ops = self._operations
        x = F.embedding(ids, self._embedding)
        for number, layer in enumerate(self._layers):
            x = x + self._attend(number, layer, ops.norm(x, *layer.input_norm), positions)
            x = x + layer.down(ops.gate(layer.gate_up(ops.norm(x, *layer.mlp_norm))))
        if outputs is not None:
            x = x[outputs]
        return self._head(ops.norm(x, *self._norm))

    def _attend(self, number: int, layer: _Layer, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tokens, heads, ops = x.shape[0], self._heads + self._kv_heads, self._operations
        joined = layer.query_key_value(x).view(tokens, heads + self._kv_heads, -1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = joined[:, : self._heads], joined[:, self._heads : heads]
            normed = ops.norm(query, *layer.query_norm), ops.norm(key, *layer.key_norm)
            rotated = ops.rotate(torch.cat(normed, 1), heads, positions)
        else:
            rotated = ops.rotate(joined, heads, positions)
        query, key, value = rotated[:, : self._heads], rotated[:, self._heads :], joined[:, heads:]
        attended = self._attention.attend(number, query, key, value, layer.call)
        return layer.attention_out(attended.reshape(tokens, -1))


def _layer(layer: Any, joined: JoinedWeights, call: LayerCall) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        input_norm=_norm(layer.input_layernorm),
        query_key_value=linear_product(*joined.query_key_value),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        attention_out=linear_product(attention.o_proj.weight, attention.o_proj.bias),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=linear_product(*joined.gate_up),
        down=linear_product(mlp.down_proj.weight, mlp.down_proj.bias),
        call=call,
    )


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight.detach(), module.variance_epsilon)
