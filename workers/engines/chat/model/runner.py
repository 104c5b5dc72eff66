"""Runs one forward pass over the chunks that the scheduler picked."""

import inspect
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from workers.engines.chat.attention.base import ModelAttention, to_device
from workers.engines.chat.sequence import Chunk


class Runner(Protocol):
    """Computes a step's chunks: a ModelRunner, or one behind CUDA graphs."""

    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Logits float32 [chunks that want them, vocabulary], in the order of the chunks.

        Chunks of one token are decode rows and come before longer ones. The caller may overwrite the result,
        which is valid until the next call.
        """


class Forward(Protocol):
    """A model's forward pass over the tokens of a step, all as one row."""

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the logits [outputs, vocabulary] of the tokens `outputs`, int64; None: of all tokens.

        ids, positions int64 [tokens].
        """


class ModelForward:
    """`Forward` through transformers' own layers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None
    ) -> torch.Tensor:
        keep = {"logits_to_keep": outputs} if self._keeps_logits and outputs is not None else {}
        out = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep)
        logits: torch.Tensor = out.logits[0]
        return logits if outputs is None or self._keeps_logits else logits[outputs]


class ModelInput(NamedTuple):
    """The arguments of `Forward`, on the model's device."""

    ids: torch.Tensor
    positions: torch.Tensor
    outputs: torch.Tensor | None


class ModelRunner:
    """Turns chunks into the model's input, lets attention prepare for them, and calls `model_forward`."""

    def __init__(self, model_forward: Forward, attention: ModelAttention, device: torch.device) -> None:
        self.model_forward = model_forward
        self._attention = attention
        self._device = device

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Implements Runner.forward."""
        return self.run(self.prepare(chunks))

    def prepare(self, chunks: list[Chunk]) -> ModelInput:
        """Build everything that the forward pass over these chunks reads."""
        self._attention.prepare(chunks)
        ids: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        for chunk in chunks:
            ids += chunk.tokens
            positions += range(chunk.start, chunk.end)
            if chunk.wants_logits:
                outputs.append(len(ids) - 1)
        packed = to_device(np.array([ids, positions], np.int64), self._device)
        if len(outputs) == len(ids):
            return ModelInput(packed[0], packed[1], None)
        return ModelInput(packed[0], packed[1], to_device(np.array(outputs, np.int64), self._device))

    def run(self, inputs: ModelInput) -> torch.Tensor:
        """Run the forward pass that was prepared last. Returns float32 logits."""
        return self.model_forward(*inputs).float()
