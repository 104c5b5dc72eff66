"""What the sampler needs of a device: results in one transfer, and bounded memory."""

from typing import Any

import torch

WORKSPACE = 96 << 20
"""Bytes that the intermediate results of an operation on all rows of logits take at most."""


def to_host(tensors: list[torch.Tensor]) -> list[list[Any]]:
    """Return the tensors' values as nested lists. On a GPU this waits once, for one transfer of all."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.tolist() for tensor in tensors]
    # float64 holds float32 and the ids of tokens exactly
    packed = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return [
        part.to(tensor.dtype).view(tensor.shape).tolist() for part, tensor in zip(parts, tensors, strict=True)
    ]


class LaterTokens:
    """The rows' tokens, int64 [rows], on the device now and on the host later."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self._host = tokens
        self._copied: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> list[int]:
        """Wait for the step that chooses these tokens, and not for those that were launched after it."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


def pieces(rows: int, row_bytes: int) -> list[slice]:
    """Cut rows into pieces whose intermediate results, `row_bytes` for each row, fit into WORKSPACE."""
    step = max(1, WORKSPACE // row_bytes)
    return [slice(start, start + step) for start in range(0, rows, step)]
