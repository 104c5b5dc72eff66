"""The log probabilities of tokens that are given: those of a prompt."""

import torch

from workers.engines.chat.sampling.device import pieces, to_host
from workers.engines.chat.sampling.sampler import Logprobs

MOST_BYTES = 48 << 20
"""Of the logits of scored prompts in one step, as float32."""
LEAST_TOKENS = 16
LEAST = -9999.0
"""Stands for the log probability of a token that can't follow, as in vLLM: JSON has no infinity."""


def max_scored(vocabulary: int) -> int:
    """Return how many tokens of scored prompts a step computes at most."""
    return max(LEAST_TOKENS, MOST_BYTES // (4 * vocabulary))


@torch.inference_mode()
def score_on_device(
    logits: torch.Tensor, tokens: list[int], most: int, sampled_tokens: int
) -> list[torch.Tensor]:
    """Compute what `score` returns, without waiting for the device.

    Returns the tokens' log probabilities, float32 [tokens, 1], and of the most probable ones log
    probabilities, float32, and ids, int64, [tokens, at most `most`].
    """
    given = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    found = []
    for piece in pieces(len(tokens), 4 * logits.shape[-1]):
        logprobs = logits[piece].log_softmax(-1)
        best = logprobs[:, :sampled_tokens].topk(min(most, sampled_tokens))
        own = logprobs.gather(1, given[piece, None])
        found.append((own.clamp_min(LEAST), best.values.clamp_min(LEAST), best.indices))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def score(logits: torch.Tensor, tokens: list[int], most: int, sampled_tokens: int) -> list[Logprobs]:
    """Return the log probability of each token, and the `most` most probable ones in its place.

    logits float32 [len(tokens), vocabulary]: the model's own before each token. They aren't changed. The
    alternatives have ids below `sampled_tokens`: the others are no tokens.
    """
    own_read, values, ids = to_host(score_on_device(logits, tokens, most, sampled_tokens))
    return [
        Logprobs(logprob, list(zip(row_ids, row_values, strict=True)))
        for (logprob,), row_values, row_ids in zip(own_read, values, ids, strict=True)
    ]
