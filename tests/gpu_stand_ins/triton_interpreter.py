"""Triton's interpreter runs kernels on a CPU, with numpy. In a process with TRITON_INTERPRET=1 only."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton import language
from triton.runtime import interpreter


def round_as_a_gpu(monkeypatch: Any) -> None:
    """Let the interpreter round float32 to the nearest bfloat16, as a GPU does. It cuts off the digits."""
    convert: Callable[..., np.ndarray] = interpreter._convert_float

    def rounded(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(data, source, target, rounding_mode)
        exact = torch.from_numpy(np.ascontiguousarray(data, np.float32))
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
