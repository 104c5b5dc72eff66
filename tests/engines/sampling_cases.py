"""Rows for tests of sampling: one set of parameters for each thing that a request can ask for."""

from typing import Any

import numpy as np
import torch

from workers.engines.chat.detokenizer import Detokenizer, WindowStream
from workers.engines.chat.sampling.masks import Masks
from workers.engines.chat.sampling.parameters import seed_states, uniforms
from workers.engines.chat.sequence import Request, Sampling, Sequence

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 7},
    {"top_p": 0.8},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_p": {"temperature": 0.7, "top_p": 0.8},
    "top_k": {"top_k": 20},
    "min_p": {"min_p": 0.1},
    "all filters": {"temperature": 1.3, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
    "repetition penalty": {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3},
    "presence and frequency penalty": {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    "logprobs": {"temperature": 0.0, "logprobs": 0},
    "logprobs of 20": {"top_p": 0.9, "logprobs": 20},
    "min_tokens": {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": frozenset(range(500))},
    "logit_bias": {"logit_bias": ((3, 2.0), (9, -100.0)), "top_p": 0.9},
    "mask": {"temperature": 1.0},
    "mask, greedy": {"temperature": 0.0},
    "mask, all filters": {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
}


class OnlyEvery:
    """A grammar that allows multiples of a number that changes with the output, and in between everything.

    So some masks allow half of the tokens, and some a few.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def allowed(self, output: list[int]) -> list[int]:
        return list(range(0, self._vocabulary, 1 if len(output) % 3 == 1 else 2 + 11 * len(output)))


def masks_of(rows: list[Sequence], vocabulary: int) -> Masks | None:
    """The masks of a step's rows that have an OnlyEvery."""
    grammars: list[Any] = [row.grammar for row in rows]
    places = [at for at, grammar in enumerate(grammars) if grammar is not None]
    bits = np.zeros((len(places), -(-vocabulary // 32) * 32), np.bool_)
    for own, at in zip(bits, places, strict=True):
        own[grammars[at].allowed(rows[at].output)] = True
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    return Masks(np.array(places), words) if places else None


def row(
    slot: int = 0, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **params: Any
) -> Sequence:
    request = Request("r", list(prompt), Sampling(max_tokens=100, **params))
    sequence = Sequence(request, slot, Detokenizer(WindowStream(lambda tokens: "")), list(output))
    sequence.slot = slot
    return sequence


def row_of(kind: str, slot: int, vocabulary: int) -> Sequence:
    """A row of KINDS with a prompt and a seed of its own."""
    made = row(slot, (slot, slot, slot + 1, 90 + slot), seed=slot, **KINDS[kind])
    if kind.startswith("mask"):
        made.grammar = OnlyEvery(vocabulary)  # type: ignore[assignment]
    return made


def expected_token(logits: torch.Tensor, row: Sequence) -> int:
    """Compute a row's next token in float64, from a sorted vocabulary, as slowly as it is defined."""
    own, scores = row.sampling, logits.double().numpy().copy()
    seen, counts = sorted({*row.request.prompt, *row.output}), np.zeros(len(scores))
    np.add.at(counts, row.output, 1)
    repeated = scores[seen]
    scores[seen] = np.where(
        repeated > 0, repeated / own.repetition_penalty, repeated * own.repetition_penalty
    )
    scores -= own.frequency_penalty * counts + own.presence_penalty * (counts > 0)
    for token, bias in own.logit_bias:
        scores[token] += bias
    if len(row.output) < own.min_tokens:
        scores[list(own.stop_token_ids)] = -np.inf
    grammar: Any = row.grammar
    if grammar is not None:
        scores[np.setdiff1d(np.arange(len(scores)), grammar.allowed(row.output))] = -np.inf
    if own.greedy:
        return int(scores.argmax())
    weights = np.exp((scores - scores.max()) / own.temperature)
    order = np.argsort(-weights, kind="stable")
    if own.top_k:
        weights[order[own.top_k :]] = 0
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= max(own.top_p, 1e-12) * weights.sum()]] = 0
    weights[weights < own.min_p * weights.max()] = 0
    cumulative = np.cumsum(weights)
    (uniform,) = uniforms(seed_states([own.seed], [row.index]), [len(row.output)])
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
