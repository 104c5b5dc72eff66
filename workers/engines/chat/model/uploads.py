"""Copies a step's arrays to the device in one transfer."""

from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 16
"""Bytes. Each array starts at a multiple of it."""


class Uploads:
    """Packs arrays into one block of pinned memory, so that the host doesn't wait for the copy.

    On a CPU the tensors share the arrays' memory instead.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def tensors(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the arrays as tensors on the device."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        return self.views(self.packed(arrays).to(self._device, non_blocking=True), arrays)

    def named(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Return the arrays as tensors on the device, by their names."""
        return dict(zip(arrays, self.tensors(list(arrays.values())), strict=True)) if arrays else {}

    def packed(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        """Return the arrays' bytes, uint8 on the host.

        torch's allocator of pinned memory reuses a block only after the copies out of it are done.
        """
        starts, total = _starts(arrays)
        block = torch.empty(total, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        target = block.numpy()
        for start, array in zip(starts, arrays, strict=True):
            target[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        return block

    @staticmethod
    def views(block: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the parts of a packed block, uint8 on any device, as tensors like the arrays."""
        starts, _ = _starts(arrays)
        return [
            block[start : start + array.nbytes].view(DTYPES[array.dtype]).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]


DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def _starts(arrays: Sequence[np.ndarray]) -> tuple[list[int], int]:
    """The first byte of each array in a packed block, and the block's size."""
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end
