"""Which operations make the host wait for the device."""

from collections.abc import Iterator
from typing import Any

import torch

from tests.gpu_stand_ins.tensor import on_gpu, tensors_in

aten = torch.ops.aten

READS_VALUES = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.bincount,
    aten.repeat_interleave,
}
"""Operations that give the host a number (item, bool), or whose result has a shape that depends on values."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}


def waits_of(operation: Any, args: Any, kwargs: Any, pinned: Any) -> Iterator[str]:
    """Say why the host waits in this operation with a tensor on the device, once for each reason.

    pinned: whether a tensor on the host is in pinned memory. Raises RuntimeError for an operation that mixes
    devices, as torch does.
    """
    given = tensors_in(args, kwargs)
    on_host = [tensor for tensor in given if not on_gpu(tensor)]
    if operation in READS_VALUES:
        yield "the host reads a value"
    elif operation in INDEXING:
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            yield "an index that is a mask: the host reads the shape of the result"
        if on_host:
            yield "an index or value is copied from the host"
    elif operation in COPIES:
        yield from _waits_of_copy(operation, args, kwargs, pinned)
    elif any(tensor.dim() > 0 for tensor in on_host):
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device")


def _waits_of_copy(operation: Any, args: Any, kwargs: Any, pinned: Any) -> Iterator[str]:
    if operation is aten.copy_:
        target_on_gpu, source, asynchronous = on_gpu(args[0]), args[1], args[2:] == (True,)
    else:
        source, asynchronous = args[0], False
        device = kwargs.get("device")
        target_on_gpu = on_gpu(source) if device is None else torch.device(device).type == "cuda"
    asynchronous = asynchronous or bool(kwargs.get("non_blocking"))
    if target_on_gpu and not on_gpu(source) and not (asynchronous and pinned(source)):
        yield "a copy from the host that isn't both pinned and non_blocking"
    if on_gpu(source) and not target_on_gpu and not asynchronous:
        yield "a copy to the host"
