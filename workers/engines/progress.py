"""Counts the layers of a forward pass as progress: one pass may take longer than HANG_S."""

from collections.abc import Callable, Iterable

from torch import nn


def call_after_layers(modules: Iterable[nn.Module], call: Callable[[], object]) -> None:
    """Let each item of each ModuleList among `modules` call `call` after its forward pass."""
    for module in modules:
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.register_forward_hook(lambda *_: call())
