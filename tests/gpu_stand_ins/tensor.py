"""Tensors that say they are on device "cuda" and keep their values in a tensor on the CPU."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


class GpuTensor(torch.Tensor):
    """A tensor on device "cuda". Only StandInGpu makes and computes with them."""

    host: torch.Tensor
    """Its values. Views share the memory of their base."""

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "GpuTensor":
        made: GpuTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("cuda", 0),
        )
        made.host = host
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError("tensors of the stand-in can be used inside `with StandInGpu()` only")

    def tolist(self) -> Any:
        return self.cpu().tolist()


def on_gpu(value: Any) -> bool:
    return isinstance(value, GpuTensor)


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """Return all tensors in nested arguments."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def to_host(values: Any) -> Any:
    """Replace each GpuTensor in nested arguments by the tensor with its values."""
    return tree_map_only(GpuTensor, lambda tensor: tensor.host, values)
