"""Draws tokens with temperature, top_k, top_p and min_p, each from one uniform number.

With torch's operations, on any device; kernels/cpu_sampling.py does the same on a CPU. Both invert the
cumulative distribution in the order of the vocabulary, so a seed gives the same text with either. Neither
sorts the vocabulary, and the one in torch never waits for the device.
"""

from typing import NamedTuple

import torch

from workers.engines.chat.sampling.device import pieces

BLOCK = 128
"""Number of weights whose sum is looked at first to find a token."""

BITS_OF_ONE = 0x3F800000
"""The bits of 1.0 in float32. Positive floats are ordered like their bits."""

DIGIT = 15
"""A cutoff's bits are found in two digits of so many bits."""


class Filters(NamedTuple):
    """What a step's drawn rows ask for: tensors [drawn rows], on the logits' device."""

    rows: torch.Tensor
    """int64, their places among the step's rows."""
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k_used: bool
    """Whether any row uses it, known without a look at the tensors."""
    top_p_used: bool

    def part(self, at: slice) -> "Filters":
        return self._replace(
            rows=self.rows[at],
            temperature=self.temperature[at],
            top_k=self.top_k[at],
            top_p=self.top_p[at],
            min_p=self.min_p[at],
        )


def draw(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw a token for each row of the filters: int64 [drawn].

    logits float32 [rows, vocabulary]; those of the drawn rows may be overwritten. uniforms float64 [drawn].
    """
    row_bytes = 9 * logits.shape[-1]
    if filters.top_k_used or filters.top_p_used:
        row_bytes = 20 * logits.shape[-1] + (16 << DIGIT)
    return torch.cat(
        [_draw_piece(logits, filters.part(at), uniforms[at]) for at in pieces(len(uniforms), row_bytes)]
    )


def _draw_piece(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor) -> torch.Tensor:
    count, vocabulary = len(uniforms), logits.shape[-1]
    padded = logits.new_zeros(count, -(-vocabulary // BLOCK) * BLOCK)
    weights = padded[:, :vocabulary]
    torch.div(logits[filters.rows], filters.temperature[:, None], out=weights)
    weights.sub_(weights.amax(-1, keepdim=True)).exp_()
    least = filters.min_p[:, None]
    if filters.top_k_used or filters.top_p_used:
        least = torch.maximum(least, _smallest_kept(padded, vocabulary, filters))
    padded.mul_(padded >= least)
    return _pick(padded, uniforms)


def _pick(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return where the cumulative weight exceeds the uniform number's share of the sum.

    weights float32 [rows, a multiple of BLOCK].
    """
    blocks = weights.view(len(weights), -1, BLOCK)
    # in float64: in float32 a large vocabulary's small weights would vanish beside the sum
    sums = blocks.sum(-1).double()
    passed = sums.cumsum(-1)
    point = uniforms[:, None] * passed[:, -1:]
    block = torch.searchsorted(passed, point, right=True).clamp_(max=blocks.shape[1] - 1)
    before = passed.gather(1, block) - sums.gather(1, block)
    own = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    at = torch.searchsorted(before + own.cumsum(-1, dtype=torch.float64), point, right=True)
    # rounding, or NaN, may leave the sum short: then it is the last one that has weight
    last = torch.arange(BLOCK, device=own.device).mul(own > 0).amax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(at, last))[:, 0]


def _smallest_kept(padded: torch.Tensor, vocabulary: int, filters: Filters) -> torch.Tensor:
    """Return, [rows, 1], the smallest weight that passes top_k and then top_p.

    padded: weights in [0, 1], of which the largest is 1; zeros behind `vocabulary`.
    """
    weights = padded[:, :vocabulary]
    kept, total = torch.zeros_like(padded[:, :1]), _sum(padded)
    if filters.top_k_used:
        top_k = filters.top_k[:, None].double()
        used = (top_k > 0) & (top_k < vocabulary)
        bound, reached = _bound(weights, top_k, counted=True)
        # of several weights equal to the bound, top_p counts only as many as top_k has room for
        within = _sum(padded * (padded >= bound)) - (reached - top_k) * bound
        kept, total = torch.where(used, bound, kept), torch.where(used, within, total)
    if filters.top_p_used:
        top_p = filters.top_p[:, None]
        bound, _ = _bound(weights, top_p * total, counted=False)
        kept = torch.where(top_p < 1, torch.maximum(bound, kept), kept)
    return kept


def _sum(padded: torch.Tensor) -> torch.Tensor:
    """Add up the weights of each row: float64 [rows, 1]."""
    return padded.view(len(padded), -1, BLOCK).sum(-1).double().sum(-1, keepdim=True)


def _bound(weights: torch.Tensor, goal: torch.Tensor, counted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest bound that enough weights reach, and what reaches it: [rows, 1] each.

    Enough: the weights >= bound have a number (counted) or a sum of at least `goal`, float64 [rows, 1].

    This is a radix selection in two digits of the bound's bits. The amounts of each digit are exact in any
    order of addition: weights with the same first digit differ in 15 bits only.
    """
    digits = (_ordinals(weights) >> DIGIT).long()
    amounts = torch.ones_like(goal).expand(weights.shape) if counted else weights.double()
    first, above, _ = _digit(digits, amounts, goal)
    same = digits == first
    del digits, amounts  # the most memory is needed below
    digits = _ordinals(weights).bitwise_and_((1 << DIGIT) - 1).long()
    amounts = same.double() if counted else weights.double().mul_(same)
    second, _, reached = _digit(digits, amounts, goal - above)
    # rounding may leave all weights short of the goal: then they all reach the bound 0
    bits = (BITS_OF_ONE - ((first << DIGIT) | second)).clamp_(min=0)
    return bits.int().view(torch.float32), above + reached


def _ordinals(weights: torch.Tensor) -> torch.Tensor:
    """Number the floats from 1.0 downwards: int32, also for NaN in 0..BITS_OF_ONE."""
    return (BITS_OF_ONE - weights.view(torch.int32)).clamp_(0, BITS_OF_ONE)


def _digit(
    digits: torch.Tensor, amounts: torch.Tensor, goal: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the digit at which the amounts, added up from digit 0, reach the goal.

    digits int64, amounts float64 [rows, vocabulary]. Returns, [rows, 1] each: the digit, int64, and the
    amounts before it and up to it.
    """
    table = amounts.new_zeros(len(digits), 1 << DIGIT).scatter_add_(1, digits, amounts)
    reached = table.cumsum(-1)
    digit = torch.searchsorted(reached, goal).clamp_(max=(1 << DIGIT) - 1)
    up_to = reached.gather(1, digit)
    return digit, up_to - table.gather(1, digit), up_to
