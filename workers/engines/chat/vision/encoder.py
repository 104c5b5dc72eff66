"""Runs a model's own front part over an image, up to the call of its language model."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from workers.engines.base import EngineLoadError
from workers.engines.chat.sequence import Chunk
from workers.engines.chat.vision.features import Features, ReadImage
from workers.engines.chat.vision.language_model import text_layers
from workers.engines.progress import call_after_layers

KNOWN = frozenset(
    {"inputs_embeds", "input_ids", "position_ids", "past_key_values", "use_cache", "cache_position"}
    | {"return_dict", "visual_pos_masks", "deepstack_visual_embeds", "logits_to_keep"}
)
"""Arguments of language models that are computed, or that change nothing. `output_...` don't either."""


class _Recorded(Exception):
    """Ends the front part's run."""


class ImageInput(NamedTuple):
    """The input of a step in which tokens stand for images, instead of ids and positions."""

    embeds: torch.Tensor
    """[tokens, hidden size]"""
    positions: torch.Tensor
    """int64 [3, tokens], in time, height and width; [tokens] for a model with one position for each token."""
    extra: dict[str, Any]
    """More arguments of the language model."""


class ImageEncoder:
    """Computes the features of images. Used by the engine thread only."""

    def __init__(self, model: Any, device: torch.device) -> None:
        """`model`: of transformers, for images and text."""
        self._front = model.model
        self._layers = text_layers(model)
        self._device = device
        self.dtype: torch.dtype = model.dtype
        """Of the weights."""
        self.has_grid = hasattr(self._front, "get_rope_index")
        """Whether tokens have positions in time, height and width."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called after each layer of the vision tower."""
        own = set(self._layers.modules())
        others = [module for module in self._front.modules() if module not in own]
        call_after_layers(others, lambda: self.on_progress())

    @property
    def input_names(self) -> frozenset[str]:
        """The names of the front part's arguments."""
        return frozenset(inspect.signature(self._front.forward).parameters)

    @torch.inference_mode()
    def encode(self, ids: list[int], inputs: dict[str, torch.Tensor]) -> Features:
        """Compute the features of one image, on the device.

        Raises EngineLoadError for another kind of model.
        """
        recorded: dict[str, Any] = {}

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            recorded.update(kwargs)
            raise _Recorded

        tensors = {
            name: tensor.to(self._device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }
        hook = self._layers.register_forward_pre_hook(record, with_kwargs=True)
        try:
            self._front(input_ids=torch.tensor([ids], device=self._device), use_cache=False, **tensors)
        except _Recorded:
            pass
        finally:
            hook.remove()
        return _features(recorded)

    def inputs(self, chunks: list[Chunk], ids: torch.Tensor) -> ImageInput | None:
        """Return the input of a step; None if no token of it stands for an image.

        `ids`: int64 [tokens] on the device. Computes the features of images that have none yet.
        """
        if not any(_shows(chunk) for chunk in chunks):
            return None
        embeds = self._front.get_input_embeddings()(ids)
        mask = torch.zeros(len(ids), dtype=torch.bool, device=self._device)
        positions, deepstack, at = [], [], 0
        for chunk in chunks:
            if chunk.images is None:
                positions.append(np.broadcast_to(np.arange(chunk.start, chunk.end), (3, len(chunk.tokens))))
            else:
                positions.append(chunk.images.positions(chunk.start, chunk.end))
                for image in chunk.images.within(chunk.start, chunk.end) if _shows(chunk) else ():
                    first, last = max(chunk.start, image.start), min(chunk.end, image.end)
                    part = self._features_of(image).part(first - image.start, last - image.start)
                    place = slice(at + first - chunk.start, at + last - chunk.start)
                    embeds[place] = part.embeds.to(self._device)
                    if part.mask is not None:
                        mask[place] = part.mask.to(self._device)
                        deepstack.append([layer.to(self._device) for layer in part.deepstack])
            at += len(chunk.tokens)
        numbers = torch.from_numpy(np.concatenate(positions, 1)).to(self._device)
        extra: dict[str, Any] = {}
        if deepstack:
            layers = [torch.cat(parts) for parts in zip(*deepstack, strict=True)]
            extra = {"visual_pos_masks": mask[None], "deepstack_visual_embeds": layers}
        return ImageInput(embeds, numbers if self.has_grid else numbers[0], extra)

    def _features_of(self, image: ReadImage) -> Features:
        if image.features is None:
            features = self.encode(image.ids, image.inputs)
            # on the host: a preempted sequence needs them again, and the device's memory is the cache's
            image.features = Features(
                features.embeds.cpu(),
                None if features.mask is None else features.mask.cpu(),
                tuple(layer.cpu() for layer in features.deepstack),
            )
            image.inputs = {}
        return image.features


def _shows(chunk: Chunk) -> bool:
    """Whether any token of a chunk stands for an image. A single one never does: a prompt ends with text."""
    return (
        chunk.images is not None
        and len(chunk.tokens) > 1
        and bool(chunk.images.within(chunk.start, chunk.end))
    )


def _features(recorded: dict[str, Any]) -> Features:
    """Return what a language model was called with. Raises EngineLoadError for what isn't computed."""
    mask = recorded.pop("attention_mask", None)
    unknown = [
        name
        for name, value in recorded.items()
        if value is not None and name not in KNOWN and not name.startswith("output_")
    ]
    if mask is not None:
        unknown.append("attention masks of their own")
    if unknown:
        raise EngineLoadError(f"its images need {', '.join(unknown)}")
    if recorded.get("inputs_embeds") is None:
        raise EngineLoadError("its images do not become rows of the language model's input")
    embeds = recorded["inputs_embeds"][0]
    if recorded.get("deepstack_visual_embeds") is None:
        return Features(embeds)
    return Features(embeds, recorded["visual_pos_masks"][0], tuple(recorded["deepstack_visual_embeds"]))
