"""The rows of a step: what they ask for, on the host and on the device."""

from collections.abc import Iterable

import numpy as np
import torch

from workers.engines.chat.model.uploads import Uploads
from workers.engines.chat.sampling.draw import Filters
from workers.engines.chat.sampling.parameters import SlotParameters, uniforms
from workers.engines.chat.sampling.penalties import PenaltyRows
from workers.engines.chat.sequence import Sequence

FILTERS = ("temperature", "top_k", "top_p", "min_p")
PENALTIES = ("slot", "repetition_penalty", "presence_penalty", "frequency_penalty")
BIASES = ("bias_places", "bias_tokens", "bias_values")


class Batch:
    """The rows of a step. Reused while they stay the same.

    "Places" are numbers of rows within the step.
    """

    def __init__(
        self, rows: list[Sequence], slots: list[int], parameters: SlotParameters, uploads: Uploads
    ) -> None:
        """`slots`: those of the rows."""
        self.rows = rows
        self.slots = slots
        values = parameters.of(rows, slots)
        drawn, penalised, biased, with_logprobs, min_tokens = (
            np.flatnonzero(asked)
            for asked in (
                ~values["greedy"],
                values["penalised"],
                values["biased"],
                values["logprobs"] >= 0,
                values["min_tokens"],
            )
        )
        arrays: dict[str, np.ndarray] = {}
        if len(drawn):
            arrays |= {"drawn": drawn} | _columns(values[drawn], FILTERS)
        if len(penalised):
            arrays |= {"penalised": penalised} | _columns(values[penalised], PENALTIES)
        if len(biased):
            arrays |= _biases(rows, biased.tolist())
        if len(with_logprobs):
            arrays["logprobs"] = with_logprobs
        sent = uploads.named(arrays)
        self.plain = not (arrays or len(min_tokens))
        """Whether all rows are greedy and ask for nothing else."""
        self._drawn: list[int] = drawn.tolist()
        self.drawn = [rows[at] for at in drawn]
        self._seed_states = values["seed_state"][drawn]
        self.filters = _filters(values[drawn], sent) if len(drawn) else None
        self.penalised = [rows[at] for at in penalised]
        self.penalties = _penalties(values[penalised], sent) if len(penalised) else None
        self.biases = [sent[name] for name in BIASES] if len(biased) else None
        self.logprobs: list[int] = with_logprobs.tolist()
        self.logprob_places = sent.get("logprobs")
        self.most_logprobs = max(0, int(values["logprobs"].max()))
        self._min_tokens: list[int] = min_tokens.tolist()

    def news(self, ahead: list[int]) -> dict[str, np.ndarray]:
        """Return what changes with each step, for the device.

        ahead: as for Sampler.sample.

        uniforms: float64 [drawn rows]. banned: int64 [2, any number], places and tokens.
        """
        news = {}
        if self.drawn:
            positions = [len(row.output) for row in self.drawn]
            if ahead:
                extra = ahead + [0] * (len(self.rows) - len(ahead))
                positions = [at + extra[place] for at, place in zip(positions, self._drawn, strict=True)]
            news["uniforms"] = uniforms(self._seed_states, positions)
        if self._min_tokens and (banned := list(self._banned(ahead))):
            news["banned"] = np.array(banned).T.copy()
        return news

    def _banned(self, ahead: list[int]) -> Iterable[tuple[int, int]]:
        """Places and stop ids of the rows that have fewer than min_tokens."""
        for at in self._min_tokens:
            row = self.rows[at]
            if len(row.output) + (ahead[at] if at < len(ahead) else 0) < row.sampling.min_tokens:
                yield from ((at, token) for token in row.sampling.stop_token_ids)


def _columns(values: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(values[name]) for name in names}


def _filters(values: np.ndarray, sent: dict[str, torch.Tensor]) -> Filters:
    return Filters(
        sent["drawn"],
        sent["temperature"],
        sent["top_k"],
        sent["top_p"],
        sent["min_p"],
        top_k_used=bool((values["top_k"] > 0).any()),
        top_p_used=bool((values["top_p"] < 1).any()),
    )


def _penalties(values: np.ndarray, sent: dict[str, torch.Tensor]) -> PenaltyRows:
    return PenaltyRows(
        sent["penalised"],
        sent["slot"],
        sent["repetition_penalty"],
        sent["presence_penalty"],
        sent["frequency_penalty"],
        repetition_used=bool((values["repetition_penalty"] != 1).any()),
        others_used=bool(values["presence_penalty"].any() or values["frequency_penalty"].any()),
    )


def _biases(rows: list[Sequence], biased: list[int]) -> dict[str, np.ndarray]:
    """logit_bias of these rows, flat: places and tokens int64, values float32."""
    entries = [(at, token, value) for at in biased for token, value in rows[at].sampling.logit_bias]
    places, tokens, values = zip(*entries, strict=True)
    arrays = (np.array(places), np.array(tokens), np.array(values, np.float32))
    return dict(zip(BIASES, arrays, strict=True))
