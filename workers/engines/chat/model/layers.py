"""What a Llama-shaped layer does between its matrix products: norms, rotation, attention, gate.

In torch, compiled for a CPU, or compiled for a GPU.

Each of torch's operations has an overhead of some microseconds; with one row in the batch that is most of a
step.
"""

import copy
import importlib.util
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F

from workers.engines.chat.attention.base import LayerCall, ModelAttention
from workers.engines.chat.attention.flash import FlashPagedAttention


class Norm(NamedTuple):
    """A root mean square norm (Zhang and Sennrich 2019)."""

    weight: torch.Tensor
    """[width]"""
    eps: float


class LayerAttention(NamedTuple):
    """One layer's attention."""

    number: int
    """Of the layer."""
    call: LayerCall
    norms: tuple[Norm, Norm] | None
    """Of each head of query and key, before the rotation."""


class LayerOperations:
    """Uses torch's operations, on any device."""

    name = "torch's operations"
    """What the log calls this implementation."""
    refines = False
    """Whether there is a `refine_greatest`."""

    def __init__(self, model: Any, attention: ModelAttention, max_context: int) -> None:
        """`model`: of transformers, Llama-shaped. Its rotary positions are computed up to `max_context`."""
        self._attention = attention
        self._heads: int = model.config.num_attention_heads
        self._kv_heads: int = model.config.num_key_value_heads
        like = model.model.embed_tokens.weight.new_empty(1, dtype=attention.dtype)
        cos, sin = model.model.rotary_emb(like, torch.arange(max_context, device=like.device)[None])
        self._cos, self._sin = self._tables(cos[0], sin[0])

    def _tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # [-x2, x1] * sin is [x2, x1] * [-sin, sin]
        half = sin.shape[-1] // 2
        return cos[:, None], torch.cat((-sin[:, :half], sin[:, half:]), -1)[:, None]

    def with_attention(self, attention: ModelAttention) -> Self:
        """Return the same operations around another attention of the same kind."""
        other = copy.copy(self)
        other._attention = attention
        return other

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Norm the last dimension of x."""
        return F.rms_norm(x, norm.weight.shape, *norm)

    def add_norm(self, x: torch.Tensor, added: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + added, and its norm as the input of a product. x, added [tokens, width]."""
        total = x + added
        return total, self.norm(total, norm)

    def attend(self, joined: torch.Tensor, positions: torch.Tensor, layer: LayerAttention) -> torch.Tensor:
        """Rotate query and key by positions, store key and value in the cache, and attend.

        joined [tokens, (heads + 2 * kv_heads) * head_dim] is query, key and value side by side; positions
        int64 [tokens] -> [tokens, heads * head_dim].
        """
        tokens, heads, rotating = len(joined), self._heads, self._heads + self._kv_heads
        joined = joined.view(tokens, rotating + self._kv_heads, -1)
        unrotated = joined
        if layer.norms is not None:
            query_norm, key_norm = layer.norms
            normed = self.norm(joined[:, :heads], query_norm), self.norm(joined[:, heads:rotating], key_norm)
            unrotated = torch.cat(normed, 1)
        rotated = self.rotate(unrotated, rotating, positions)
        query, key, value = rotated[:, :heads], rotated[:, heads:], joined[:, rotating:]
        return self._attention.attend(layer.number, query, key, value, layer.call).reshape(tokens, -1)

    def rotate(self, joined: torch.Tensor, heads: int, positions: torch.Tensor) -> torch.Tensor:
        """Rotate the first `heads` of joined [tokens, heads or more, head_dim] by positions [tokens]."""
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        plain = joined[:, :heads]
        return torch.addcmul(plain * cos, plain.roll(plain.shape[-1] // 2, -1), sin)

    def gate(self, joined: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. joined [rows, 2 * width] is gate and up side by side -> [rows, width]."""
        gate, up = joined.chunk(2, -1)
        return F.silu(gate) * up

    def refine_greatest(self, logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Compute the greatest of the logits x weight^T again, in float32, in place.

        logits float32 [rows, vocabulary], rounded to bfloat16; x float32 [rows, width]; weight bfloat16
        [vocabulary, width].
        """
        raise NotImplementedError


class CompiledLayerOperations(LayerOperations):
    """For float32 on a CPU: norm and rotation are one compiled pass each, without the interpreter lock.

    Products with weights in bfloat16 take and return bfloat16, which the loops read and write.
    """

    name = "compiled loops"
    refines = True

    def __init__(self, model: Any, attention: ModelAttention, max_context: int) -> None:
        # imported here, so that a worker on a GPU doesn't load a compiler
        from workers.engines.chat.kernels import cpu, cpu_layers

        super().__init__(model, attention, max_context)
        self._kernels, self._layers = cpu, cpu_layers
        half = model.lm_head.weight.dtype == torch.bfloat16
        self._of_products = torch.bfloat16 if half else torch.float32

    def _tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _half(cos), _half(sin)

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        rows, weight = x.view(-1, width).numpy(), norm.weight.numpy()
        self._kernels.normalize(rows, weight, norm.eps, out.view(-1, width).numpy())
        return out

    def add_norm(self, x: torch.Tensor, added: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        total, out = torch.empty_like(x), torch.empty_like(x, dtype=self._of_products)
        arrays = x.numpy(), _numbers(added), norm.weight.numpy()
        self._layers.add_and_normalize(*arrays, norm.eps, total.numpy(), _numbers(out))
        return total, out

    def attend(self, joined: torch.Tensor, positions: torch.Tensor, layer: LayerAttention) -> torch.Tensor:
        return super().attend(joined.to(torch.float32), positions, layer).to(self._of_products)

    def gate(self, joined: torch.Tensor) -> torch.Tensor:
        if joined.dtype == torch.float32:
            return super().gate(joined)
        out = joined.new_empty(len(joined), joined.shape[1] // 2)
        self._layers.gate(_numbers(joined), _numbers(out))
        return out

    def rotate(self, joined: torch.Tensor, heads: int, positions: torch.Tensor) -> torch.Tensor:
        out = joined.new_empty(joined.shape[0], heads, joined.shape[2])
        tables = self._cos.numpy(), self._sin.numpy()
        self._kernels.rotate_heads(joined.numpy(), *tables, positions.numpy(), out.numpy())
        return out

    def refine_greatest(self, logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        self._kernels.refine(logits.numpy(), x.contiguous().numpy(), _numbers(weight))


class TritonLayerOperations(LayerOperations):
    """For a GPU: addition and norm, rotation and storing, and the gate are one kernel each."""

    name = "Triton's kernels"

    def __init__(self, model: Any, attention: FlashPagedAttention, max_context: int) -> None:
        # imported here: Triton is installed only with a CUDA build of torch
        from workers.engines.chat.kernels import gpu

        super().__init__(model, attention, max_context)
        self._kernels = gpu
        self._flash = attention

    def with_attention(self, attention: ModelAttention) -> Self:
        other = super().with_attention(attention)
        assert isinstance(attention, FlashPagedAttention)
        other._flash = attention
        return other

    def _tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _half(cos), _half(sin)

    def add_norm(self, x: torch.Tensor, added: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.add_norm(x, added, *norm)

    def attend(self, joined: torch.Tensor, positions: torch.Tensor, layer: LayerAttention) -> torch.Tensor:
        tokens = len(joined)
        query = self._kernels.rotate_and_store(
            joined.view(tokens, self._heads + 2 * self._kv_heads, -1),
            positions,
            (self._cos, self._sin),
            self._flash.destination(layer.number),
            layer.norms,
        )
        return self._flash.attend_stored(layer.number, query, layer.call).view(tokens, -1)

    def gate(self, joined: torch.Tensor) -> torch.Tensor:
        return self._kernels.gate(joined)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as float32, or as the bits of bfloat16, uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _half(table: torch.Tensor) -> torch.Tensor:
    """The first half of each row: the second half is the same."""
    return table[:, : table.shape[-1] // 2].contiguous()


def kinds_of_operations(device: torch.device, attention: ModelAttention) -> list[type[LayerOperations]]:
    """The implementations for a model on `device`, the fastest first."""
    if device.type == "cpu" and attention.dtype == torch.float32:
        return [CompiledLayerOperations]
    if (
        device.type == "cuda"
        and isinstance(attention, FlashPagedAttention)
        and importlib.util.find_spec("triton")
    ):
        return [TritonLayerOperations, LayerOperations]
    return [LayerOperations]
