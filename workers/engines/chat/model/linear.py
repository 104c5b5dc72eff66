"""Matrix products with a layer's weights, prepared once at load: the most of a forward pass.

On a CPU in float32 a weight is kept in oneDNN's own blocked layout. torch would bring it there in every call: for 64 rows
of the 4.2 M model a third of the time, for one row two thirds (ADR 0004).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

Product = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in_features] -> [rows, out_features]"""

ROWS_HINT = 64
"""Rows of the products that the blocked layout is chosen for; those with one are no slower for it."""


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN takes such a weight in a layout of its own."""
    # builds of torch without oneDNN don't have the operation
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and weight.device.type == "cpu" and weight.dtype == torch.float32


def product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """x -> x weight^T + bias. weight [out_features, in_features]; what it returns may keep a copy instead of it."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not can_pack(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, packed, bias, "none", [], "")


class PackedLinear(nn.Module):
    """Stands in the place of an nn.Linear of a model that runs through transformers' own code."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = product(linear.weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)


def pack_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Replace every nn.Linear of `model` that can be packed. Returns them with their places, as (module, name, linear)."""
    replaced = []
    for module in model.modules():
        for name, child in list(module.named_children()):
            # a subclass computes something else, or keeps its weights in another form
            if type(child) is nn.Linear and can_pack(child.weight):
                replaced.append((module, name, child))
                setattr(module, name, PackedLinear(child))
    return replaced


def join(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of linears with the same input as those of one; theirs become views of it."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in linears])
    start = 0
    for linear in linears:
        end = start + linear.out_features
        # without this a GPU would hold all weights twice
        linear.weight.data = weight[start:end]
        if bias is not None:
            linear.bias.data = bias[start:end]
        start = end
    return weight, bias
