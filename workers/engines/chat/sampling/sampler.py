"""Chooses the tokens of all rows of a step at once, each row by its own parameters.

The order is that of transformers: penalties and bias, temperature, top_k, top_p, min_p. A token is drawn with
a single uniform number that depends only on the request's seed, the choice and the position in the output, by
inverting the cumulative distribution in the order of the vocabulary. The same seed therefore gives the same
text in any batch.
"""

from collections.abc import Sequence as List
from typing import NamedTuple

import numpy as np
import torch

from workers.engines.chat.sampling.draw import Filters, compiled_draw, draw
from workers.engines.chat.sequence import Sequence

_MASK64 = (1 << 64) - 1


class Sampled(NamedTuple):
    """A row's token. With logprobs: its natural log probability, and the most probable tokens, best first."""

    token: int
    logprob: float | None = None
    top: List[tuple[int, float]] = ()


class Uniforms:
    """Pseudorandom numbers in [0, 1), one for each row: SplitMix64 over seed, choice and position."""

    def __init__(self, seeds: List[int], choices: List[int]) -> None:
        self._state = _mix(_mix(np.zeros(len(seeds), np.uint64), seeds), choices)

    def at(self, positions: List[int]) -> np.ndarray:
        """float64 [rows], with 24 significant bits, so that float32 holds them exactly."""
        return (_mix(self._state, positions) >> np.uint64(40)) / (1 << 24)


def _mix(state: np.ndarray, parts: List[int]) -> np.ndarray:
    state = state + np.array([part & _MASK64 for part in parts], np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class _Batch:
    """The parameters of a step's rows as tensors. Reused while the rows stay the same."""

    def __init__(self, rows: list[Sequence], device: torch.device) -> None:
        params = [row.sampling for row in rows]
        self.rows = rows
        self.drawn = [at for at, own in enumerate(params) if not own.greedy]
        self.all_drawn = len(self.drawn) == len(rows)
        self.drawn_index = torch.tensor(self.drawn, dtype=torch.int64, device=device)
        self.filters = Filters([params[at] for at in self.drawn], device)
        self.uniforms = Uniforms(
            [params[at].seed for at in self.drawn], [rows[at].index for at in self.drawn]
        )
        self.penalised = [at for at, own in enumerate(params) if own.penalised]
        self.logprobs = [at for at, own in enumerate(params) if own.logprobs is not None]
        self.most_logprobs = max((params[at].logprobs or 0 for at in self.logprobs), default=0)
        self.min_tokens = [at for at, own in enumerate(params) if own.min_tokens > 0 and own.stop_token_ids]
        self.masked = [at for at, row in enumerate(rows) if row.mask is not None]
        bias = [(at, token, value) for at, own in enumerate(params) for token, value in own.logit_bias]
        self.bias = (
            (
                torch.tensor([at for at, _, _ in bias], device=device),
                torch.tensor([token for _, token, _ in bias], device=device),
                torch.tensor([value for _, _, value in bias], device=device),
            )
            if bias
            else None
        )
        self.adjusts = bool(self.penalised or bias or self.min_tokens or self.masked)


class Sampler:
    """Chooses one token for each row."""

    def __init__(
        self, vocabulary: int, slots: int, device: torch.device, sampled_tokens: int | None = None
    ) -> None:
        """`slots`: the largest number of sequences that run at once.

        `sampled_tokens`: number of ids, from 0, that may be chosen and are reported; None: all.
        """
        self._device = device
        self._padding = slice(sampled_tokens or vocabulary, vocabulary)
        """The ids that are rows of the model only, and no tokens."""
        self._batch: _Batch | None = None
        self._penalties = Penalties(vocabulary, slots, device)
        self._draw = compiled_draw() if device.type == "cpu" else draw

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: list[Sequence]) -> list[Sampled]:
        """Choose one token for each row. logits float32 [rows, vocabulary]; they are overwritten."""
        if self._batch is None or self._batch.rows != rows:
            self._batch = _Batch(rows, self._device)
        batch = self._batch
        if self._padding.start < self._padding.stop:
            logits[:, self._padding] = -torch.inf
        raw = logits[batch.logprobs].log_softmax(-1) if batch.logprobs else None
        if batch.adjusts:
            self._adjust(logits, batch)
        if batch.all_drawn:
            chosen = self._drawn(logits, batch)
        else:
            chosen = _argmax(logits)
            if batch.drawn:
                chosen[batch.drawn_index] = self._drawn(logits[batch.drawn_index], batch)
        tokens: list[int] = chosen.tolist()  # waits for the device
        if raw is None:
            return [Sampled(token) for token in tokens]
        return self._with_logprobs(tokens, raw, batch)

    def _adjust(self, logits: torch.Tensor, batch: _Batch) -> None:
        """Apply everything that comes before temperature, in place."""
        if batch.penalised:
            rows = [batch.rows[at] for at in batch.penalised]
            logits[batch.penalised] = self._penalties.apply(logits[batch.penalised], rows)
        if batch.bias is not None:
            row, token, value = batch.bias
            logits.index_put_((row, token), value, accumulate=True)
        for at in batch.min_tokens:
            if len(batch.rows[at].output) < batch.rows[at].sampling.min_tokens:
                logits[at, list(batch.rows[at].sampling.stop_token_ids)] = -torch.inf
        for at in batch.masked:
            row_mask = batch.rows[at].mask
            allowed = row_mask.allowed(batch.rows[at].output) if row_mask else None
            if allowed is not None:
                kept = logits[at, allowed]
                logits[at] = -torch.inf
                logits[at, allowed] = kept

    def _drawn(self, logits: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """Draw tokens for the rows that aren't greedy. Their logits [rows, vocabulary] -> int64 [rows]."""
        uniforms = batch.uniforms.at([len(batch.rows[at].output) for at in batch.drawn])
        return self._draw(logits, batch.filters, torch.from_numpy(uniforms).to(self._device))

    def _with_logprobs(self, tokens: list[int], raw: torch.Tensor, batch: _Batch) -> list[Sampled]:
        """Add logprobs to the tokens. raw [rows with logprobs, vocabulary]: the model's log probabilities."""
        own = raw.gather(1, torch.tensor([[tokens[at]] for at in batch.logprobs], device=self._device))[
            :, 0
        ].tolist()
        best = raw.topk(batch.most_logprobs)
        values, ids = best.values.tolist(), best.indices.tolist()
        sampled = [Sampled(token) for token in tokens]
        for at, logprob, row_ids, row_values in zip(batch.logprobs, own, ids, values, strict=True):
            count = batch.rows[at].sampling.logprobs or 0
            top = list(zip(row_ids[:count], row_values[:count], strict=True))
            sampled[at] = Sampled(tokens[at], logprob, top)
        return sampled


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    # numpy uses vector instructions here and takes a tenth of torch's time
    return torch.from_numpy(logits.numpy().argmax(-1))


class Penalties:
    """The tokens of each running sequence, for the penalties that depend on them.

    Kept by slot. A slot's counts are built when first needed, and rebuilt for another sequence or after a
    preemption.
    """

    def __init__(self, vocabulary: int, slots: int, device: torch.device) -> None:
        self._shape = (slots, vocabulary)
        self._device = device
        self._counts: torch.Tensor | None = None
        """float32 [slots, vocabulary]: how often each token occurs in the output."""
        self._seen: torch.Tensor | None = None
        """bool [slots, vocabulary]: whether it occurs in prompt or output."""
        self._owner: dict[int, tuple[Sequence, int]] = {}
        """By slot, the sequence that was counted and the number of its output tokens included."""

    def apply(self, logits: torch.Tensor, rows: list[Sequence]) -> torch.Tensor:
        """Return the logits [rows, vocabulary] with penalties applied.

        The repetition penalty is that of transformers, the others are those of OpenAI's API.
        """
        counts, seen = self._update(rows)

        def column(name: str) -> torch.Tensor:
            values = [getattr(row.sampling, name) for row in rows]
            return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]

        if any(row.sampling.repetition_penalty != 1.0 for row in rows):
            repetition = column("repetition_penalty")
            penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(seen, penalised, logits)
        return logits - column("frequency_penalty") * counts - column("presence_penalty") * (counts > 0)

    def _update(self, rows: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the rows' newest tokens. Returns counts and seen of these rows, [rows, vocabulary] each."""
        if self._counts is None or self._seen is None:
            self._counts = torch.zeros(self._shape, device=self._device)
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        new: list[tuple[int, int]] = []
        for row in rows:
            owner, counted = self._owner.get(row.slot, (None, 0))
            if owner is not row or counted > len(row.output):
                self._counts[row.slot] = 0
                self._seen[row.slot] = False
                self._seen[row.slot, row.request.prompt] = True
                counted = 0
            new += [(row.slot, token) for token in row.output[counted:]]
            self._owner[row.slot] = (row, len(row.output))
        if new:
            slot, token = torch.tensor(new, device=self._device).T
            self._counts.index_put_((slot, token), torch.ones(len(new), device=self._device), accumulate=True)
            self._seen[slot, token] = True
        slots = torch.tensor([row.slot for row in rows], device=self._device)
        return self._counts[slots], self._seen[slots]
