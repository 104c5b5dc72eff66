"""Chooses a token for each row: the best one or a drawn one, of those that its grammar allows.

There are two implementations, in torch and compiled for a CPU.
"""

from typing import Protocol

import numpy as np
import torch

from workers.engines.chat.sampling.draw import Filters, draw
from workers.engines.chat.sampling.masks import LateMasks, exclude

TRIES = 4
"""How many of the best tokens are looked up in a mask before a pass over all of it."""


class Choose(Protocol):
    """Chooses tokens."""

    def __call__(
        self,
        logits: torch.Tensor,
        filters: Filters | None,
        sent: dict[str, torch.Tensor],
        late: LateMasks | None = None,
    ) -> torch.Tensor:
        """Return the rows' tokens, int64 [rows]. logits float32 [rows, vocabulary] may be overwritten.

        filters: of the rows that are drawn, None: none. sent: `uniforms`, float64 [drawn rows], if there are
        any, and `masked` and `allowed`, those of Masks, if rows have a grammar. late: that of Masks.
        """


def choose(
    logits: torch.Tensor,
    filters: Filters | None,
    sent: dict[str, torch.Tensor],
    late: LateMasks | None = None,
) -> torch.Tensor:
    """`Choose` with torch's operations, on any device, without late masks."""
    assert late is None
    if "allowed" in sent:
        exclude(logits, sent["masked"], sent["allowed"])
    if filters is None:
        return logits.argmax(-1)
    drawn = draw(logits, filters, sent["uniforms"])
    if len(drawn) == len(logits):
        return drawn
    return logits.argmax(-1).index_copy_(0, filters.rows, drawn)


def compiled_choose() -> Choose:
    """Return the `Choose` for a CPU."""
    # imported here, so that a worker on a GPU doesn't load a compiler
    from workers.engines.chat.kernels.cpu_sampling import FEW, best_tokens, count_bits, draw_tokens

    def count(masks: np.ndarray) -> np.ndarray:
        counts = np.empty(len(masks), np.int64)
        count_bits(masks.view(np.uint32), counts)
        return counts

    def choose(
        logits: torch.Tensor,
        filters: Filters | None,
        sent: dict[str, torch.Tensor],
        late: LateMasks | None = None,
    ) -> torch.Tensor:
        values = logits.contiguous().numpy()
        if filters is None and "allowed" not in sent:
            # numpy uses vector instructions here and takes a tenth of torch's time
            return torch.from_numpy(values.argmax(-1))
        tokens, greedy = np.zeros(len(values), np.int64), np.ones(len(values), np.bool_)
        mask_of, allowed = _masks(len(values), sent)
        masks = mask_of, allowed, (counts := count(allowed))
        if filters is not None:
            rows, *columns = (column.numpy() for column in (*filters[:5], sent["uniforms"]))
            drawn = np.zeros(len(rows), np.int64)
            draw_tokens(values, rows, *columns, *masks, drawn)
            tokens[rows], greedy[rows] = drawn, False
        others = []
        for row in np.flatnonzero(greedy).tolist():
            mask = int(mask_of[row])
            filled = mask >= 0 and (late is None or mask not in late)
            if filled and counts[mask] <= values.shape[1] // FEW:
                others.append(row)
            elif (best := _best_if_allowed(values[row], mask, allowed, late)) is not None:
                tokens[row] = best
            else:
                others.append(row)
        if others:
            if filled_late := _fill_late([int(mask_of[row]) for row in others], allowed, late):
                counts[filled_late] = count(allowed[filled_late])
            found = np.zeros(len(others), np.int64)
            best_tokens(values, np.array(others), *masks, found)
            tokens[others] = found
        return torch.from_numpy(tokens)

    return choose


def _best_if_allowed(row: np.ndarray, mask: int, allowed: np.ndarray, late: LateMasks | None) -> int | None:
    """Return the token with the greatest logit; None if the mask, -1 for none, doesn't allow it.

    Most masks of many tokens allow one of the best, and numpy finds some in less time than a pass takes that
    looks at the mask.
    """
    if late is not None and mask in late:
        return late.best(mask, row)
    for _ in range(TRIES):
        best = int(row.argmax())
        if mask < 0 or allowed[mask, best // 32] >> best % 32 & 1:
            return best
        row[best] = -np.inf
    return None


def _fill_late(masks: list[int], allowed: np.ndarray, late: LateMasks | None) -> list[int]:
    """Fill those of the masks that are late, and return them."""
    unfilled = [mask for mask in masks if late is not None and mask in late]
    if late is not None and unfilled:
        late.fill(unfilled, allowed)
    return unfilled


def _masks(rows: int, sent: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return mask_of and allowed for the compiled loops."""
    mask_of = np.full(rows, -1)
    if "allowed" not in sent:
        return mask_of, np.zeros((1, 1), np.int32)
    allowed = sent["allowed"].numpy()
    mask_of[sent["masked"].numpy()] = np.arange(len(allowed))
    return mask_of, allowed
