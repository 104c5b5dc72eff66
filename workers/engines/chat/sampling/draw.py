"""Draws tokens with temperature, top_k, top_p and min_p, each from one uniform number.

There are two implementations, in torch and compiled for a CPU. Both invert the cumulative distribution in the
order of the vocabulary, so a seed gives the same text with either.
"""

from collections.abc import Callable, Sequence

import torch

from workers.engines.chat.sequence import Sampling

CANDIDATES = 128
"""Number of best tokens examined first for top_k and top_p. A row that needs more is sorted whole."""


class Filters:
    """The rows' parameters as float32 tensors [rows, 1]."""

    def __init__(self, params: Sequence[Sampling], device: torch.device) -> None:
        def numbers(name: str) -> torch.Tensor:
            return torch.tensor([float(getattr(own, name)) for own in params], device=device)[:, None]

        self.temperature = numbers("temperature")
        self.top_k = numbers("top_k")
        self.top_p = numbers("top_p")
        self.min_p = numbers("min_p")
        self.most_top_k = max((own.top_k for own in params), default=0)
        self.limited = any(own.top_k > 0 or own.top_p < 1 for own in params)
        self.min_p_used = any(own.min_p > 0 for own in params)
        self.wide = False
        """Whether CANDIDATES weren't enough to find a row's cutoff in an earlier step of these rows."""


Draw = Callable[[torch.Tensor, Filters, torch.Tensor], torch.Tensor]
"""(logits float32 [rows, vocabulary], filters, uniforms float64 [rows]) -> tokens int64 [rows].

The logits may be overwritten.
"""


def draw(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor) -> torch.Tensor:
    """`Draw` with torch's operations, on any device."""
    scaled = logits / filters.temperature
    weights = scaled.softmax(-1)
    if filters.limited:
        weights.mul_(scaled >= _cutoff(scaled, filters))
    if filters.min_p_used:
        weights.mul_(weights >= filters.min_p * weights.amax(-1, keepdim=True))
    # float64: in float32 a large vocabulary's small weights would vanish beside the sum
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    point = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def compiled_draw() -> Draw:
    """Return the `Draw` for a CPU."""
    # imported here, so that a worker on a GPU doesn't load a compiler
    from workers.engines.chat.kernels.cpu import draw_tokens

    def draw(logits: torch.Tensor, filters: Filters, uniforms: torch.Tensor) -> torch.Tensor:
        tokens = torch.zeros(len(logits), dtype=torch.int64)
        parameters = (filters.temperature, filters.top_k, filters.top_p, filters.min_p)
        columns = (parameter[:, 0].numpy() for parameter in parameters)
        draw_tokens(logits.contiguous().numpy(), *columns, uniforms.numpy(), tokens.numpy())
        return tokens

    return draw


def _cutoff(scaled: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return, [rows, 1], the smallest logit that passes top_k and then top_p."""
    vocabulary = scaled.shape[-1]
    width = vocabulary if filters.wide else min(vocabulary, max(CANDIDATES, filters.most_top_k))
    cut, enough = _cutoff_within(scaled, scaled.topk(width).values, filters)
    if width < vocabulary and not bool(enough.all()):
        # flat distributions stay flat: the next steps of these rows sort all tokens at once
        filters.wide = True
        cut, _ = _cutoff_within(scaled, scaled.topk(vocabulary).values, filters)
    return cut


def _cutoff_within(
    scaled: torch.Tensor, best: torch.Tensor, filters: Filters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the cutoffs among each row's `best` logits, in descending order.

    Returns them, and whether `best` was enough.
    """
    width, top_k, top_p = best.shape[-1], filters.top_k, filters.top_p
    limit = torch.where(top_k > 0, top_k, torch.full_like(top_k, scaled.shape[-1]))
    in_top_k = torch.arange(width, device=scaled.device) < limit
    share = (best - scaled.logsumexp(-1, keepdim=True)).exp() * in_top_k
    # top_p counts within the tokens that passed top_k
    share /= torch.where(limit > width, 1.0, share.sum(-1, keepdim=True))
    before = share.cumsum(-1) - share
    kept = in_top_k & ((before < top_p) | (top_p >= 1))
    kept[:, 0] = True
    last = kept.sum(-1, keepdim=True) - 1
    unlimited = (limit > width) & (top_p >= 1)
    cut = best.gather(1, last).masked_fill_(unlimited, -torch.inf)
    enough = unlimited | (last < width - 1) | (limit <= width)
    return cut, enough
