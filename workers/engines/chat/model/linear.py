"""Matrix products with a layer's weights, prepared once at load. They are most of a forward pass.

On a CPU a weight in float32 or bfloat16 is kept in oneDNN's blocked layout. torch would convert it in every
call, which takes a third of the time for 64 rows of a model of 4.2 million parameters, and two thirds for one
row (docs/adr/0004-chat-engine.md).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

LinearProduct = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in_features] -> [rows, out_features], in the input's dtype, which may differ from the weight's."""

ROWS_HINT = 64
"""Number of rows that the blocked layout is optimized for. Products with one row are no slower with it."""


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN accepts this weight in its blocked layout."""
    # builds of torch without oneDNN don't have the operation
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return half or weight.dtype == torch.float32


def linear_product(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearProduct:
    """Return x -> x weight^T + bias, weight [out_features, in_features].

    The result may hold a packed copy instead of the weight.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    dtype = weight.dtype
    if not can_pack(weight):
        return lambda x: F.linear(x.to(dtype), weight, bias).to(x.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x.to(dtype), packed, bias, "none", [], "").to(x.dtype)


class PackedLinear(nn.Module):
    """Replaces an nn.Linear in a model that runs through transformers' own layers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = linear_product(linear.weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)


def pack_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Replace every nn.Linear of `model` that can be packed.

    Returns (parent module, name, replaced linear) of each.
    """
    replaced = []
    for module in model.modules():
        for name, child in list(module.named_children()):
            # not a subclass: it may compute something else, or keep its weights in another form
            if type(child) is nn.Linear and can_pack(child.weight):
                replaced.append((module, name, child))
                setattr(module, name, PackedLinear(child))
    return replaced


def join(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Join linears with the same input into one weight and bias. Their own become views of these."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in linears])
    start = 0
    for linear in linears:
        end = start + linear.out_features
        # otherwise the device would hold all weights twice
        linear.weight.data = weight[start:end]
        if bias is not None:
            linear.bias.data = bias[start:end]
        start = end
    return weight, bias
