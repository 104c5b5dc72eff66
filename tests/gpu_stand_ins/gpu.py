"""The mode that computes on the CPU what is asked of device "cuda", and counts."""

import traceback
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.gpu_stand_ins.guard import load_guard
from tests.gpu_stand_ins.tensor import GpuTensor, on_gpu, tensors_in, to_host
from tests.gpu_stand_ins.waits import waits_of

aten = torch.ops.aten


@dataclass
class Cost:
    """What a function asked of the device."""

    result: Any = None
    waits: list[str] = field(default_factory=list)
    """For each time that the host waited for the device: the line of code, and why."""
    operations: int = 0
    """All operations but views: each launches a kernel or a copy, some launch several."""
    peak_bytes: int = 0
    """The most memory that tensors on the device held at once, those from before included.

    What an operation needs while it runs, beside its result, is not known.
    """


class StandInGpu(TorchDispatchMode):
    """While entered, device "cuda" exists."""

    def __init__(self) -> None:
        super().__init__()
        load_guard()
        self._cost = Cost()
        self._held: dict[int, int] = {}
        """By storage on the device, its bytes."""
        self._pinned: set[int] = set()
        """Storages on the host."""
        self._entered: list[ExitStack] = []

    def __enter__(self) -> "StandInGpu":
        stack = ExitStack()
        # torch would look for a driver when it makes the first tensor on the device
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        # torch.tensor(..., device="cuda") then copies from the host by an operation that is seen here
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self._entered.append(stack)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._entered.pop().close()

    def measure(self, function: Callable[[], Any]) -> Cost:
        """Call `function` and count."""
        cost = self._cost = Cost(peak_bytes=sum(self._held.values()))
        cost.result = function()
        self._cost = Cost()
        return cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        operation = func.overloadpacket
        if operation is aten.is_pinned:
            return self._is_pinned(args[0])
        if operation is aten._pin_memory:
            return self._pin(args[0].clone())
        device = kwargs.get("device")
        makes_on_gpu = device is not None and torch.device(device).type == "cuda"
        if not makes_on_gpu and not any(map(on_gpu, tensors_in(args, kwargs))):
            pin = kwargs.pop("pin_memory", False)
            made = func(*args, **kwargs)
            return self._pin(made) if pin else made
        for reason in waits_of(operation, args, kwargs, self._is_pinned):
            self._cost.waits.append(f"{_caller()}: {reason}")
        if not func.is_view:
            self._cost.operations += 1
        host_args, host_kwargs = to_host((args, kwargs))
        if makes_on_gpu:
            host_kwargs = {**host_kwargs, "device": "cpu"}
        result = func(*host_args, **host_kwargs)
        to_cpu = device is not None and not makes_on_gpu
        return result if to_cpu else self._wrap(result, tensors_in(args, kwargs))

    def _wrap(self, result: Any, given: list[torch.Tensor]) -> Any:
        """Put results on the device. A result that was an argument stays the same object."""
        known = {id(to_host(tensor)): tensor for tensor in given}

        def wrap(host: torch.Tensor) -> torch.Tensor:
            if id(host) in known:
                return known[id(host)]
            self._hold(host.untyped_storage())
            # a view of an ordinary tensor is one, also within inference mode
            with torch.inference_mode(host.is_inference()):
                return GpuTensor(host)

        return tree_map_only(torch.Tensor, wrap, result)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._held:
            self._held[key] = storage.nbytes()
            weakref.finalize(storage, self._held.pop, key, None)
            self._cost.peak_bytes = max(self._cost.peak_bytes, sum(self._held.values()))

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return tensor

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return not on_gpu(tensor) and tensor.untyped_storage()._cdata in self._pinned


def _caller() -> str:
    """Return the innermost line of code that is neither torch's nor of this folder."""
    for frame in reversed(traceback.extract_stack()):
        if "site-packages" not in frame.filename and Path(frame.filename).parent != Path(__file__).parent:
            return f"{Path(frame.filename).name}:{frame.lineno}"
    raise AssertionError("somebody called")
