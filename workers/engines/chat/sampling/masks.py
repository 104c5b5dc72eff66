"""Excludes the tokens that a row's grammar does not allow next."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from workers.engines.chat.sampling.device import pieces


class Masks(NamedTuple):
    """What a step's rows with a grammar allow."""

    masked: np.ndarray
    """int64 [these rows]: their places among the step's rows."""
    allowed: np.ndarray
    """int32 [these rows, words]: a bit for each token, token % 32 of the word token // 32.

    There are at least as many bits as logits.
    """


Exclude = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(logits float32 [rows, vocabulary], masked, allowed): sets what is not allowed to -inf, in place."""


def exclude(logits: torch.Tensor, masked: torch.Tensor, allowed: torch.Tensor) -> None:
    """`Exclude` with torch's operations, on any device."""
    bit = torch.arange(8, dtype=torch.uint8, device=logits.device)
    # the lowest byte of a word comes first
    allowed = allowed.view(torch.uint8)
    for at in pieces(len(masked), 11 * logits.shape[-1]):
        bits = (allowed[at, :, None] >> bit) & 1
        excluded = bits.flatten(1)[:, : logits.shape[-1]] == 0
        logits[masked[at]] = logits[masked[at]].masked_fill(excluded, -torch.inf)


def compiled_exclude() -> Exclude:
    """Return the `Exclude` for a CPU."""
    # imported here, so that a worker on a GPU doesn't load a compiler
    from workers.engines.chat.kernels.cpu_sampling import exclude_tokens

    def exclude(logits: torch.Tensor, masked: torch.Tensor, allowed: torch.Tensor) -> None:
        exclude_tokens(logits.numpy(), masked.numpy(), allowed.numpy())

    return exclude
