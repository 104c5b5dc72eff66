"""Excludes the tokens that a row's grammar does not allow next."""

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


def exclude(logits: torch.Tensor, masked: torch.Tensor, allowed: torch.Tensor) -> None:
    """Set what is not allowed to -inf, in place, with torch's operations, on any device.

    logits float32 [rows, vocabulary]; masked and allowed: those of Masks.
    """
    bit = torch.arange(8, dtype=torch.uint8, device=logits.device)
    # the lowest byte of a word comes first
    allowed = allowed.view(torch.uint8)
    for at in pieces(len(masked), 11 * logits.shape[-1]):
        bits = (allowed[at, :, None] >> bit) & 1
        excluded = bits.flatten(1)[:, : logits.shape[-1]] == 0
        logits[masked[at]] = logits[masked[at]].masked_fill(excluded, -torch.inf)
