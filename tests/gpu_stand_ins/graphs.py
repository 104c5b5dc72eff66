"""CUDA graphs on a CPU: a recording keeps the operations and the tensors they read, and repeats them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gpu_stand_ins.tensor import on_gpu, tensors_in
from tests.gpu_stand_ins.waits import READS_VALUES, waits_of


class RecordedOperations(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph.

    While it records, whatever would make the host wait raises RuntimeError. Within a StandInGpu each copy
    from the host does, too: a replay would read the host's memory again, whatever is there by then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        self._refuse(func.overloadpacket, args, kwargs)
        result = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, tree_leaves(result)))
        return result

    def _refuse(self, operation: Any, args: Any, kwargs: Any) -> None:
        if operation in READS_VALUES:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation} reads a value")
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if to_gpu or any(map(on_gpu, tensors_in(args, kwargs))):
            # no tensor counts as pinned: see above
            for reason in waits_of(operation, args, kwargs, lambda tensor: False):
                raise RuntimeError(f"operation not permitted when stream is capturing: {reason}")

    def pool(self) -> int:
        return 1

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self._operations:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(results, again, strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


@contextmanager
def recorded(graph: RecordedOperations, pool: int | None, capture_error_mode: str) -> Iterator[None]:
    """Stands in for torch.cuda.graph."""
    with graph:
        yield
