"""The forward pass of Llama-shaped models in few large operations.

transformers' own layers run some 60 operations each, and as much Python between them: with one row in the batch that is
most of a step. Here query, key and value are one product, as are gate and up; keys and queries are rotated together
(operations.py). assembly.py compares the result with the model's own before the first request, and uses
transformers' code where it differs and for every other architecture.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from workers.engines.chat.attention.base import LayerCall, ModelAttention
from workers.engines.chat.model.layers import operations
from workers.engines.chat.model.linear import Product, join, product

ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Whose layers are: norm, attention with rotated keys and queries, residual, norm, gated MLP, residual. A list, since no
short comparison would show a scale that only changes far into the context."""


class _Norm(NamedTuple):
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: _Norm
    query_key_value: Product
    query_norm: _Norm | None
    key_norm: _Norm | None
    attention_out: Product
    mlp_norm: _Norm
    gate_up: Product
    down: Product
    call: LayerCall


def can_fuse(model: Any) -> bool:
    """Whether `model` has the layers that FusedDecoder runs, unquantized."""
    if type(model).__name__ not in ARCHITECTURES or getattr(model, "is_quantized", False):
        return False
    linears = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    return all(type(module) is nn.Linear for module in linears) and model.config.hidden_act == "silu"


class JoinedWeights(NamedTuple):
    """Of one layer: weight and bias of its two joint products."""

    query_key_value: tuple[torch.Tensor, torch.Tensor | None]
    gate_up: tuple[torch.Tensor, torch.Tensor | None]


def join_weights(model: Any) -> list[JoinedWeights]:
    """The joint weights of each layer. The model's own become views of them, so that it still runs by itself."""
    return [
        JoinedWeights(
            join([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            join([layer.mlp.gate_proj, layer.mlp.up_proj]),
        )
        for layer in model.model.layers
    ]


class FusedDecoder:
    """Forward pass of `model`, whose layers must have called `attention` once: how they did is how it is called here."""

    def __init__(
        self, model: Any, joined: list[JoinedWeights], attention: ModelAttention, max_context: int
    ) -> None:
        inner, config = model.model, model.config
        self._attention = attention
        self._embedding: torch.Tensor = inner.embed_tokens.weight.detach()
        self._do = operations(inner.rotary_emb, max_context, self._embedding)
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._layers = [
            _layer(layer, joined[number], attention.layers[number])
            for number, layer in enumerate(inner.layers)
        ]
        self._norm = _norm(inner.norm)
        self._head = product(model.lm_head.weight, model.lm_head.bias)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None
    ) -> torch.Tensor:
        """ids, positions int64 [tokens] -> logits [outputs, vocabulary] of the tokens `outputs`, None: of all."""
        do = self._do
        x = F.embedding(ids, self._embedding)
        for number, layer in enumerate(self._layers):
            x = x + self._attend(number, layer, do.norm(x, *layer.input_norm), positions)
            x = x + layer.down(do.gate(layer.gate_up(do.norm(x, *layer.mlp_norm))))
        if outputs is not None:
            x = x[outputs]
        return self._head(do.norm(x, *self._norm))

    def _attend(self, number: int, layer: _Layer, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tokens, heads, do = x.shape[0], self._heads + self._kv_heads, self._do
        joined = layer.query_key_value(x).view(tokens, heads + self._kv_heads, -1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = joined[:, : self._heads], joined[:, self._heads : heads]
            normed = do.norm(query, *layer.query_norm), do.norm(key, *layer.key_norm)
            rotated = do.rotate(torch.cat(normed, 1), heads, positions)
        else:
            rotated = do.rotate(joined, heads, positions)
        query, key, value = rotated[:, : self._heads], rotated[:, self._heads :], joined[:, heads:]
        attended = self._attention.attend(number, query, key, value, layer.call)
        return layer.attention_out(attended.reshape(tokens, -1))


def _layer(layer: Any, joined: JoinedWeights, call: LayerCall) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        input_norm=_norm(layer.input_layernorm),
        query_key_value=product(*joined.query_key_value),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        attention_out=product(attention.o_proj.weight, attention.o_proj.bias),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=product(*joined.gate_up),
        down=product(mlp.down_proj.weight, mlp.down_proj.bias),
        call=call,
    )


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight.detach(), module.variance_epsilon)
