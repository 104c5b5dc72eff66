"""Runs one forward pass over the chunks that the scheduler picked."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from workers.engines.chat.attention.base import ModelAttention, count_rows
from workers.engines.chat.model.uploads import Uploads
from workers.engines.chat.sequence import Chunk

if TYPE_CHECKING:
    from workers.engines.chat.vision.encoder import ImageEncoder, ImageInput


class DecodeStep(NamedTuple):
    """A kind of decode step that is computed in a way of its own."""

    name: str
    """For messages: the size, and what else distinguishes it."""
    rows: int
    forward: Callable[[list[Chunk]], torch.Tensor]
    """Takes `rows` decode rows, of which several may be equal. Returns what Runner.forward does."""


class Runner(Protocol):
    """Computes a step's chunks: a ModelRunner, or one behind CUDA graphs."""

    def forward(self, chunks: list[Chunk], ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 [rows, vocabulary], in the order of the chunks: a row for each chunk that wants
        logits, and one for each token of a scored chunk.

        Chunks of one token are decode rows and come before longer ones. `ids`, int64 [chunks] on the device,
        replaces their tokens if all chunks are decode rows. The caller may overwrite the result, which is
        valid until the next call.
        """

    def decode_steps(self) -> list[DecodeStep]:
        """The kinds of decode steps that may differ in their results, if anything is wrong."""


class Forward(Protocol):
    """A model's forward pass over the tokens of a step, all as one row."""

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        outputs: torch.Tensor | None,
        images: "ImageInput | None" = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the logits [outputs, vocabulary] of the tokens `outputs`, int64; None: of all tokens.

        ids, positions int64 [tokens]. `images` replaces both. `out`: where the logits go; without it they are
        valid until the next call.
        """


class ModelForward:
    """`Forward` through transformers' own layers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        outputs: torch.Tensor | None,
        images: "ImageInput | None" = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keep = {"logits_to_keep": outputs} if self._keeps_logits and outputs is not None else {}
        if images is None:
            result = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep)
        else:
            result = self._model(
                inputs_embeds=images.embeds[None],
                # [1, tokens] or [3, 1, tokens]
                position_ids=images.positions.unsqueeze(-2),
                use_cache=False,
                **images.extra,
                **keep,
            )
        logits: torch.Tensor = result.logits[0]
        if outputs is not None and not self._keeps_logits:
            logits = logits[outputs]
        return logits if out is None else out.copy_(logits)


class ModelRunner:
    """Turns chunks into the model's input, lets attention prepare for them, and calls `model_forward`."""

    def __init__(
        self,
        model_forward: Forward,
        attention: ModelAttention,
        device: torch.device,
        encoder: "ImageEncoder | None" = None,
    ) -> None:
        """`encoder`: of a model that takes images."""
        self.model_forward = model_forward
        self._encoder = encoder
        self.attention = attention
        self.uploads = Uploads(device)

    @torch.inference_mode()
    def forward(
        self, chunks: list[Chunk], ids: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Implements Runner.forward. `out`: where the logits go."""
        inputs = self.uploads.tensors([*model_input(chunks), *self.attention.prepare(chunks)])
        if ids is not None:
            inputs[0][0].copy_(ids)
        images = None if self._encoder is None else self._encoder.inputs(chunks, inputs[0][0])
        return self.run(inputs, images, out).float()

    def decode_steps(self) -> list[DecodeStep]:
        """Implements Runner.decode_steps: kernels divide few rows among the multiprocessors in other ways."""
        return [DecodeStep(f"rows: {rows}", rows, self.forward) for rows in (1, 2, 4, 8)]

    def run(
        self,
        inputs: list[torch.Tensor],
        images: "ImageInput | None" = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the forward pass that attention was prepared for last. Returns logits in the model's dtype.

        `inputs`: `model_input` and attention's own, on the device. `images`: of a step that computes any.
        """
        (ids, positions), outputs, *others = inputs
        self.attention.bind(others)
        return self.model_forward(ids, positions, None if len(outputs) == len(ids) else outputs, images, out)


def model_input(chunks: list[Chunk]) -> tuple[np.ndarray, np.ndarray]:
    """The model's own input.

    int64 [2, tokens]: id and position of each token; int64 [outputs]: the tokens whose logits are wanted.
    """
    rows = count_rows(chunks)
    ids = [chunk.tokens[0] for chunk in chunks[:rows]]
    positions = [
        chunk.start if chunk.images is None else chunk.images.position(chunk.start) for chunk in chunks[:rows]
    ]
    outputs = [at for at, chunk in enumerate(chunks[:rows]) if chunk.wants_logits or chunk.scored]
    for chunk in chunks[rows:]:
        ids += chunk.tokens
        if chunk.images is None:
            positions += range(chunk.start, chunk.end)
        else:
            positions += chunk.images.positions(chunk.start, chunk.end)[0].tolist()
        if chunk.scored:
            outputs += range(len(ids) - len(chunk.tokens), len(ids))
        elif chunk.wants_logits:
            outputs.append(len(ids) - 1)
    return np.array([ids, positions], np.int64), np.array(outputs, np.int64)
