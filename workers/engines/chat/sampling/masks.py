"""Excludes the tokens that a row's grammar does not allow next."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from workers.engines.chat.sampling.device import pieces


class LateMasks(Protocol):
    """The masks of greedy rows that were not filled before the logits were known.

    Only a CPU's sampler takes them. A mask is meant by its place among those of a step.
    """

    def __contains__(self, mask: object) -> bool:
        """Whether the mask is one of these."""

    def best(self, mask: int, logits: np.ndarray) -> int | None:
        """Return the token with the greatest logit that the mask would allow; None if only the mask tells.

        logits float32 [vocabulary]: those of tokens that it would not allow may become -inf.
        """

    def fill(self, masks: Sequence[int], allowed: np.ndarray) -> None:
        """Fill these rows of `allowed`, that of Masks."""


class Masks(NamedTuple):
    """What a step's rows with a grammar allow."""

    masked: np.ndarray
    """int64 [these rows]: their places among the step's rows."""
    allowed: np.ndarray
    """int32 [these rows, words]: a bit for each token, token % 32 of the word token // 32.

    There are at least as many bits as logits.
    """
    late: LateMasks | None = None
    """Of which rows `allowed` is not filled; None: it is."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what goes to the device."""
        return {"masked": self.masked, "allowed": self.allowed}


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
