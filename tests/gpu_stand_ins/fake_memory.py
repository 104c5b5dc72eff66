"""The memory that code would take on a GPU, from fake tensors: shapes of any size, and no values."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gpu_stand_ins.guard import load_guard

GPU = torch.device("cuda", 0)


class FakeGpuMemory(TorchDispatchMode):
    """While entered, tensors are fake, and torch.cuda's figures of memory are those of tensors on a GPU.

    What the allocator rounds up, and what an operation needs while it runs beside its result, is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        load_guard()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._held: dict[int, int] = {}
        """By storage on the GPU, its bytes."""
        self.allocated = 0
        self.peak = 0
        self._entered: list[ExitStack] = []

    def __enter__(self) -> "FakeGpuMemory":
        stack = ExitStack()
        figures: dict[str, Callable[..., Any]] = {
            "_lazy_init": lambda: None,
            "current_device": lambda: 0,
            "synchronize": lambda device=None: None,
            "reset_peak_memory_stats": lambda device=None: self.reset_peak(),
            "memory_allocated": lambda device=None: self.allocated,
            "max_memory_allocated": lambda device=None: self.peak,
        }
        for name, figure in figures.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, figure))
        stack.enter_context(self._fake)
        self._entered.append(stack)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._entered.pop().close()

    def reset_peak(self) -> None:
        self.peak = self.allocated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, FakeTensor) and made.fake_device.type == "cuda":
                self._hold(made.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes()
        weakref.finalize(storage, self._free, key)
        self.allocated += storage.nbytes()
        self.peak = max(self.peak, self.allocated)

    def _free(self, key: int) -> None:
        self.allocated -= self._held.pop(key)
