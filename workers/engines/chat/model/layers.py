"""The operations of a Llama-shaped layer between its matrix products: norms, rotation, gate.

In torch, or compiled for a CPU.

Each of torch's operations has an overhead of some microseconds; with one row in the batch that is most of a
step.
"""

from typing import Any

import torch
import torch.nn.functional as F


class LayerOperations:
    """Uses torch's operations, on any device."""

    def __init__(self, rotary: Any, max_context: int, like: torch.Tensor) -> None:
        """`rotary`: the model's module that computes cos and sin of positions.

        `like`: a tensor with the model's dtype and device.
        """
        cos, sin = rotary(like[None], torch.arange(max_context, device=like.device)[None])
        self._cos, self._sin = self._tables(cos[0], sin[0])

    def _tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # [-x2, x1] * sin is [x2, x1] * [-sin, sin]
        half = sin.shape[-1] // 2
        return cos[:, None], torch.cat((-sin[:, :half], sin[:, half:]), -1)[:, None]

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def rotate(self, joined: torch.Tensor, heads: int, positions: torch.Tensor) -> torch.Tensor:
        """Rotate the first `heads` of joined [tokens, heads or more, head_dim] by positions [tokens]."""
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        plain = joined[:, :heads]
        return torch.addcmul(plain * cos, plain.roll(plain.shape[-1] // 2, -1), sin)

    def gate(self, joined: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. joined [rows, 2 * width] is gate and up side by side -> [rows, width]."""
        gate, up = joined.chunk(2, -1)
        return F.silu(gate) * up


class CompiledLayerOperations(LayerOperations):
    """For float32 on a CPU: norm and rotation are one compiled pass each, without the interpreter lock."""

    def __init__(self, rotary: Any, max_context: int, like: torch.Tensor) -> None:
        # imported here, so that a worker on a GPU doesn't load a compiler
        from workers.engines.chat.kernels import cpu

        super().__init__(rotary, max_context, like)
        self._kernels = cpu

    def _tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = sin.shape[-1] // 2
        return cos[:, :half].contiguous(), sin[:, :half].contiguous()

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._kernels.normalize(x.view(-1, width).numpy(), weight.numpy(), eps, out.view(-1, width).numpy())
        return out

    def rotate(self, joined: torch.Tensor, heads: int, positions: torch.Tensor) -> torch.Tensor:
        out = joined.new_empty(joined.shape[0], heads, joined.shape[2])
        tables = self._cos.numpy(), self._sin.numpy()
        self._kernels.rotate_heads(joined.numpy(), *tables, positions.numpy(), out.numpy())
        return out


def layer_operations(rotary: Any, max_context: int, like: torch.Tensor) -> LayerOperations:
    """Return the fastest implementation for the dtype and device of `like`."""
    compiled = like.device.type == "cpu" and like.dtype == torch.float32
    return (CompiledLayerOperations if compiled else LayerOperations)(rotary, max_context, like)
