"""Chooses the tokens of all rows of a step at once, each row by its own parameters.

The order is that of transformers: penalties and bias, temperature, top_k, top_p, min_p. A token is drawn with
a single uniform number that depends only on the request's seed, the choice and the position in the output, by
inverting the cumulative distribution in the order of the vocabulary. The same seed therefore gives the same
text in any batch.

On a GPU the host waits once, at the end, when it reads the tokens.
"""

from typing import NamedTuple

import torch

from workers.engines.chat.model.uploads import Uploads
from workers.engines.chat.sampling.batch import Batch
from workers.engines.chat.sampling.choose import choose, compiled_choose
from workers.engines.chat.sampling.device import LaterTokens, pieces, to_host
from workers.engines.chat.sampling.masks import Masks
from workers.engines.chat.sampling.parameters import SlotParameters
from workers.engines.chat.sampling.penalties import Penalties
from workers.engines.chat.sequence import Sequence


class Logprobs(NamedTuple):
    """A token's natural log probability, and the most probable tokens with theirs, best first."""

    own: float
    top: list[tuple[int, float]]


class Samples(NamedTuple):
    """The rows' tokens. Logprobs by place, for the rows that want them."""

    tokens: list[int]
    logprobs: dict[int, Logprobs]


class Sampler:
    """Chooses one token for each row."""

    def __init__(
        self, vocabulary: int, slots: int, device: torch.device, sampled_tokens: int | None = None
    ) -> None:
        """`slots`: the largest number of sequences that run at once.

        `sampled_tokens`: number of ids, from 0, that may be chosen and are reported; None: all.
        """
        self._vocabulary = vocabulary
        self._padding = slice(sampled_tokens or vocabulary, vocabulary)
        """The ids that are rows of the model only, and no tokens."""
        self._uploads = Uploads(device)
        self._parameters = SlotParameters(slots)
        self._penalties = Penalties(vocabulary, slots, device)
        self._batch: Batch | None = None
        self._choose = compiled_choose() if device.type == "cpu" else choose
        self._never = torch.full((), -torch.inf, device=device)

    @torch.inference_mode()
    def sample(
        self,
        logits: torch.Tensor,
        rows: list[Sequence],
        ahead: list[int] | None = None,
        masks: Masks | None = None,
    ) -> Samples:
        """Choose one token for each row. logits float32 [rows, vocabulary]; they are overwritten.

        `ahead`: for each of the first rows, how many tokens its place is after the end of its output.
        `masks`: the tokens that rows with a grammar may have.
        """
        batch = self._batch_of(rows)
        chosen, raw = self._chosen(logits, batch, ahead, masks=masks)
        if raw is None or batch.logprob_places is None:
            return Samples(chosen.tolist(), {})
        return _with_logprobs(chosen, chosen[batch.logprob_places], raw, batch)

    @torch.inference_mode()
    def sample_later(
        self, logits: torch.Tensor, rows: list[Sequence], unread: torch.Tensor | None
    ) -> LaterTokens:
        """Do as `sample`, for rows that are `independent`, without waiting for the device.

        unread, int64 [rows]: the tokens that follow the rows' outputs and are not on the host yet.
        """
        ahead = None if unread is None else [1] * len(rows)
        chosen, _ = self._chosen(logits, self._batch_of(rows), ahead, unread)
        return LaterTokens(chosen)

    def _chosen(
        self,
        logits: torch.Tensor,
        batch: Batch,
        ahead: list[int] | None,
        unread: torch.Tensor | None = None,
        masks: Masks | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rows' tokens, int64 [rows], and the model's logits of the rows that want logprobs."""
        if self._padding.start < self._padding.stop:
            logits[:, self._padding] = -torch.inf
        if batch.plain and masks is None:
            return self._choose(logits, None, {}), None
        news = batch.news(ahead or [])
        if masks is not None:
            news |= masks.arrays()
        if batch.penalised:
            news |= self._penalties.news(batch.penalised)
        sent = self._uploads.named(news)
        raw = logits[batch.logprob_places] if batch.logprob_places is not None else None
        self._adjust(logits, batch, sent, unread)
        late = masks.late if masks is not None else None
        return self._choose(logits, batch.filters, sent, late), raw

    def _batch_of(self, rows: list[Sequence]) -> Batch:
        slots = [row.slot for row in rows]
        if self._batch is None or self._batch.rows != rows or self._batch.slots != slots:
            self._batch = Batch(rows, slots, self._parameters, self._uploads)
        return self._batch

    def _adjust(
        self,
        logits: torch.Tensor,
        batch: Batch,
        sent: dict[str, torch.Tensor],
        unread: torch.Tensor | None,
    ) -> None:
        """Apply penalties, biases and min_tokens, in place."""
        if batch.penalties is not None:
            own = batch.penalties
            counted = None if unread is None else unread[own.rows] + own.slots * self._vocabulary
            self._penalties.update(batch.penalised, sent, counted)
            self._penalties.apply(logits, batch.penalties)
        if batch.biases is not None:
            places, tokens, values = batch.biases
            logits.index_put_((places, tokens), values, accumulate=True)
        if "banned" in sent:
            places, tokens = sent["banned"]
            logits.index_put_((places, tokens), self._never)


def _with_logprobs(
    chosen: torch.Tensor, own_tokens: torch.Tensor, raw: torch.Tensor, batch: Batch
) -> Samples:
    """Read tokens and logprobs.

    chosen: the rows' tokens, int64 [rows]. own_tokens and raw: tokens and the model's own logits of the rows
    that want logprobs, [these rows] and [these rows, vocabulary].
    """
    found = []
    for piece in pieces(len(raw), 8 * raw.shape[-1]):
        logprobs = raw[piece].log_softmax(-1)
        best = logprobs.topk(batch.most_logprobs)
        found.append((logprobs.gather(1, own_tokens[piece, None]), best.values, best.indices))
    own, values, ids = (
        found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    )
    all_tokens, own_read, values_read, ids_read = to_host([chosen, own, values, ids])
    logprobs_of = {}
    for at, (logprob,), row_values, row_ids in zip(
        batch.logprobs, own_read, values_read, ids_read, strict=True
    ):
        wanted = batch.rows[at].sampling.logprobs
        logprobs_of[at] = Logprobs(logprob, list(zip(row_ids[:wanted], row_values[:wanted], strict=True)))
    return Samples(all_tokens, logprobs_of)
