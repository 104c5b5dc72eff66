"""Chooses the dtype of the weights: the catalogue's, or with "auto" what suits device and checkpoint."""

import statistics
import time
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from workers.engines.chat.model.linear import LinearProduct, linear_product
from workers.engines.chat.vision.language_model import auto_class, text_layers
from workers.engines.device import half_precision

ROWS = (1, 16, 64)
"""Numbers of rows with which a layer's products are measured."""

REPEATS = 5

LEAST_GAIN = 1.2
"""How many times faster a layer's products must be in bfloat16. Less is not worth the rounding."""


class Precision(NamedTuple):
    """The dtype of the weights."""

    dtype: torch.dtype
    reason: str = ""
    """Why a CPU has this dtype; empty if the catalogue names it."""

    def describe(self) -> str:
        """The dtype and the reason, for the log."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} ({self.reason})" if self.reason else name


def choose_precision(dtype: str, config: PreTrainedConfig, device: torch.device) -> Precision:
    """Choose the dtype for a model of `config`, as read from its folder. `dtype`: the catalogue's.

    On a CPU "auto" measures the products of one layer, if the checkpoint has 16 bits and the processor
    multiplies bfloat16.
    """
    if dtype != "auto":
        return Precision(getattr(torch, dtype))
    if device.type == "cuda":
        return Precision(half_precision())
    if hasattr(config, "quantization_config"):
        return Precision(torch.float32, "the checkpoint is quantized")
    if (config.dtype or config.get_text_config().dtype) not in (torch.bfloat16, torch.float16):
        return Precision(torch.float32, "as the checkpoint")
    if not has_bfloat16():
        return Precision(torch.float32, "the processor has no bfloat16")
    shapes = layer_shapes(config)
    if not shapes:
        return Precision(torch.float32, "its layers have products of another kind")
    gain = measure_gain(shapes)
    if gain < LEAST_GAIN:
        return Precision(torch.float32, f"bfloat16 is {gain:.1f} x as fast in a layer")
    return Precision(torch.bfloat16, f"{gain:.1f} x as fast as float32 in a layer")


def has_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16: AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def layer_shapes(config: PreTrainedConfig) -> list[torch.Size]:
    """The shape [out_features, in_features] of each linear module of a model's first layer."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    model = text_layers(model) or model
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # such as "model.layers.0.self_attn.q_proj"
    return [module.weight.shape for name, module in linears if _first_number(name) == "0"]


def _first_number(name: str) -> str | None:
    return next((part for part in name.split(".") if part.isdigit()), None)


def measure_gain(shapes: list[torch.Size]) -> float:
    """Measure how many times faster products with weights of these shapes are in bfloat16 than in float32.

    Inputs and results are float32 in both. The mean over ROWS, whose products count alike.
    """
    seconds = {(dtype, rows): 0.0 for dtype in (torch.float32, torch.bfloat16) for rows in ROWS}
    # one weight after another, because a layer of a large model would need gigabytes
    for shape in shapes:
        weight = torch.ones(shape)
        products = [
            (dtype, linear_product(weight.to(dtype), None)) for dtype in (torch.float32, torch.bfloat16)
        ]
        for rows in ROWS:
            x = torch.ones(rows, shape[1])
            # in turns, because the speed of a shared machine varies
            times = [[_seconds(product, x) for _, product in products] for _ in range(REPEATS)]
            for (dtype, _), of_one in zip(products, zip(*times, strict=True), strict=True):
                seconds[dtype, rows] += min(of_one)
    return statistics.geometric_mean(
        seconds[torch.float32, rows] / seconds[torch.bfloat16, rows] for rows in ROWS
    )


def _seconds(product: LinearProduct, x: torch.Tensor) -> float:
    started = time.perf_counter()
    product(x)
    return time.perf_counter() - started
