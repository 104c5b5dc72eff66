"""Triton's kernels without a GPU: launches are noted instead of run, and can be compiled for any GPU."""

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
"""Pointers, as signatures name them."""


class Launch(NamedTuple):
    """What a launch passed to its kernel."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, capability: int) -> Any:
        """Compile this version of the kernel for a compute capability, 90 for 9.0, down to machine code."""
        signature, constants, alignments = {}, {}, {}
        for parameter, argument in zip(self.kernel.params, self.arguments, strict=True):
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = argument
            elif isinstance(argument, torch.Tensor):
                signature[parameter.name] = TYPES[argument.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    alignments[(parameter.num,)] = [["tt.divisibility", 16]]
            else:
                assert isinstance(argument, float)
                signature[parameter.name] = "fp32"
        source = ASTSource(self.kernel, signature, constants, alignments)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


class NotedKernel:
    """Replaces a kernel: `kernel[grid](...)` notes the launch."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self._launches.append(Launch(self._kernel, arguments, options))

        return launch


def note_launches(monkeypatch: Any, module: Any) -> list[Launch]:
    """Replace all kernels of a module. Returns the list of launches, which grows."""
    launches: list[Launch] = []
    for name, kernel in vars(module).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, NotedKernel(kernel, launches))
    return launches
