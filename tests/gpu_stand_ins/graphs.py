"""CUDA graphs on a CPU: a recording keeps the operations and the tensors they read, and repeats them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RecordedOperations(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: the host reads a value")
        result = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, result))
        return result

    def pool(self) -> int:
        return 1

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self._operations:
            again = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and again is not result:
                result.copy_(again)


@contextmanager
def recorded(graph: RecordedOperations, pool: int | None, capture_error_mode: str) -> Iterator[None]:
    """Stands in for torch.cuda.graph."""
    with graph:
        yield
