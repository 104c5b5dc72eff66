"""Repetition, presence and frequency penalties, from the tokens of each running sequence."""

from typing import NamedTuple

import numpy as np
import torch

from workers.engines.chat.sampling.device import pieces
from workers.engines.chat.sequence import Sequence


class PenaltyRows(NamedTuple):
    """A step's rows with penalties: tensors [penalised rows], on the logits' device."""

    rows: torch.Tensor
    """int64, their places among the step's rows."""
    slots: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition_used: bool
    """Whether any row uses it, known without a look at the tensors."""
    others_used: bool

    def part(self, at: slice) -> "PenaltyRows":
        return self._replace(
            rows=self.rows[at],
            slots=self.slots[at],
            repetition=self.repetition[at],
            presence=self.presence[at],
            frequency=self.frequency[at],
        )


class Penalties:
    """Which tokens each running sequence has, by slot.

    A slot's counts are built when first needed, and rebuilt for another sequence or after a preemption.
    """

    def __init__(self, vocabulary: int, slots: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._slots = slots
        self._device = device
        self._state: torch.Tensor | None = None
        """int32 [slots, vocabulary]: twice the number of times that a token occurs in the output, plus one if
        it occurs in the prompt."""
        self._counted: dict[int, tuple[Sequence, int]] = {}
        """By slot, the sequence that was counted and the number of its output tokens included."""

    def news(self, rows: list[Sequence]) -> dict[str, np.ndarray]:
        """Return what `update` needs of these rows: arrays that are to be copied to the device."""
        slots: list[int] = []
        prompts: list[np.ndarray] = []
        output: list[int] = []
        for row in rows:
            start = row.slot * self._vocabulary
            owner, counted = self._counted.get(row.slot, (None, 0))
            if owner is not row or counted > len(row.output):
                slots.append(row.slot)
                prompts.append(np.array(row.request.prompt, np.int64) + start)
                counted = 0
            output += [token + start for token in row.output[counted:]]
        news = {"output_tokens": np.array(output, np.int64)} if output else {}
        if slots:
            news |= {"new_slots": np.array(slots), "prompt_tokens": np.concatenate(prompts)}
        return news

    def update(
        self, rows: list[Sequence], news: dict[str, torch.Tensor], unread: torch.Tensor | None = None
    ) -> None:
        """Count the rows' newest tokens.

        news: what `news` returned for them, on the device. unread, int64 [rows]: the token that follows each
        row's output and is not on the host yet, plus the slot times the size of the vocabulary.
        """
        if self._state is None:
            shape = (self._slots, self._vocabulary)
            self._state = torch.zeros(shape, dtype=torch.int32, device=self._device)
        flat = self._state.view(-1)
        if "new_slots" in news:
            self._state.index_fill_(0, news["new_slots"], 0)
            flat.index_fill_(0, news["prompt_tokens"], 1)
        if "output_tokens" in news:
            tokens = news["output_tokens"]
            flat.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32), alpha=2)
        if unread is not None:
            flat.index_add_(0, unread, torch.ones_like(unread, dtype=torch.int32), alpha=2)
        more = 0 if unread is None else 1
        self._counted.update((row.slot, (row, len(row.output) + more)) for row in rows)

    def apply(self, logits: torch.Tensor, rows: PenaltyRows) -> None:
        """Change the rows' logits in place. logits float32 [rows of the step, vocabulary].

        The repetition penalty is that of transformers, the others are those of OpenAI's API.
        """
        assert self._state is not None, "update() comes first"
        for at in pieces(len(rows.rows), 22 * self._vocabulary):
            part = rows.part(at)
            logits[part.rows] = _penalised(logits[part.rows], self._state[part.slots], part)


def _penalised(logits: torch.Tensor, state: torch.Tensor, rows: PenaltyRows) -> torch.Tensor:
    if rows.repetition_used:
        repetition = rows.repetition[:, None]
        changed = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(state > 0, changed, logits)
    if rows.others_used:
        counts = state >> 1
        logits -= rows.frequency[:, None] * counts
        logits -= rows.presence[:, None] * (counts > 0)
    return logits
