"""A model's sight: its reader and its encoder, and the comparison with the model's own output."""

import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from catalogue import ChatModelEntry
from protocol.errors import InvalidImage
from workers.engines.base import EngineLoadError
from workers.engines.chat.cache.kv_cache import KVCache
from workers.engines.chat.model.runner import Runner
from workers.engines.chat.sequence import Chunk
from workers.engines.chat.vision.encoder import ImageEncoder
from workers.engines.chat.vision.features import PromptImages
from workers.engines.chat.vision.processor import load_processor
from workers.engines.chat.vision.reader import ImageReader
from workers.engines.chat.vision.template import refuse_without_images

log = logging.getLogger(__name__)

SAMPLE_SIZE = (96, 64)
"""Of the image that is compared, in pixels."""
BEFORE, AFTER = "Look at this: ", " What does it show?"
LIMITS = {torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.5}
"""The largest root mean square difference of logits, relative to their standard deviation. Rounding alone
gives up to 0.3 in bfloat16, depending on the model (output_check.py), an image in a wrong place about 1."""


@dataclass(eq=False)
class Vision:
    """What a model that takes images needs besides its language model."""

    encoder: ImageEncoder
    reader: ImageReader
    max_images: int
    prompt: list[int]
    """Of the comparison, with `images`; `expected`, float32 [2, vocabulary], are the model's own last
    logits."""
    images: PromptImages
    expected: torch.Tensor

    def refusal(self, runner: Runner, cache: KVCache) -> str | None:
        """Compare what `runner` computes with the model's own output. Returns why images can't be served."""
        length = len(self.prompt)
        if length > cache.num_pages * cache.page_size:
            return f"the KV cache has no room for an image, which takes {length} tokens"
        try:
            found = self._served(runner, cache)
        except (EngineLoadError, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            return _reason(error)
        difference = float(
            (found - self.expected).square().mean().sqrt() / self.expected.std().clamp(min=1e-6)
        )
        limit = LIMITS.get(self.encoder.dtype, LIMITS[torch.bfloat16])
        if not difference < limit:
            return f"its logits differ by {difference:.2g} of their standard deviation"
        return None

    def compute_largest(self) -> None:
        """Compute an image as large as the largest that the model gets, to see what memory it takes."""
        image = self.reader.largest()
        self.encoder.encode(image.ids, image.inputs)

    @torch.inference_mode()
    def _served(self, runner: Runner, cache: KVCache) -> torch.Tensor:
        """Compute the prompt in two chunks, of which the first ends within the image, and a decode row."""
        slot = cache.take_slot()
        length, middle = len(self.prompt), (self.images.images[0].start + self.images.images[0].end) // 2
        try:
            cache.grow(slot, length)
            rows = []
            for start, end in ((0, middle), (middle, length - 1), (length - 1, length)):
                chunk = Chunk(slot, start, self.prompt[start:end], end >= length - 1, images=self.images)
                logits = runner.forward([chunk])
                if chunk.wants_logits:
                    rows.append(logits[0].clone())
            return torch.stack(rows)
        finally:
            cache.release(slot)


def load_vision(
    model: Any, config: PreTrainedConfig, entry: ChatModelEntry, source: dict[str, Any], tokenizer: Any
) -> Vision | None:
    """Load what a model needs to take images; None, with a warning, if it can't be used.

    `model`: of transformers, not yet changed. `tokenizer`: one that nothing else uses.
    """
    try:
        return _load(model, config, entry, source, tokenizer)
    # of processors and their files: anything
    except Exception as error:
        warn_blind(entry.name, type(model).__name__, _reason(error))
        return None


def _reason(error: BaseException) -> str:
    """The first line of an error, after its type where the text alone may say nothing."""
    # what a client is told about an image says nothing to the operator
    cause = error.__cause__ if isinstance(error, InvalidImage) and error.__cause__ is not None else error
    text = str(cause).strip().partition("\n")[0][:300]
    return text if isinstance(cause, EngineLoadError) else f"{type(cause).__name__}: {text}"


def warn_blind(name: str, architecture: str, reason: str) -> None:
    """Say in the log why a model takes no images."""
    log.warning("%s takes no images: those of %s can't be served: %s", name, architecture, reason)


def _load(
    model: Any, config: PreTrainedConfig, entry: ChatModelEntry, source: dict[str, Any], tokenizer: Any
) -> Vision:
    device = model.get_input_embeddings().weight.device
    encoder = ImageEncoder(model, device)
    processor = load_processor(entry.weights, config, source, tokenizer)
    reader = ImageReader(
        processor, model.model, encoder.input_names, max_pixels=entry.engine.max_image_pixels
    )
    refuse_without_images(tokenizer, reader.placeholder)
    sample = reader.sample(_random_image(*SAMPLE_SIZE))
    # what the engine would be called with, so that a family that needs more is refused with this reason
    encoder.encode(sample.ids, sample.inputs)
    text = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (BEFORE, AFTER)]
    prompt, images = reader.place([*text[0], reader.placeholder_id, *text[1]], [sample])
    return Vision(
        encoder, reader, entry.engine.max_images, prompt, images, _own_logits(model, prompt, images)
    )


@torch.inference_mode()
def _own_logits(model: Any, prompt: list[int], images: PromptImages) -> torch.Tensor:
    """The whole model's logits after the last two tokens of the prompt, float32 [2, vocabulary]."""
    device = model.get_input_embeddings().weight.device
    (image,) = images.images
    inputs = {
        name: tensor.to(device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in image.inputs.items()
    }
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            types = torch.zeros(1, len(prompt), dtype=torch.long, device=device)
            types[:, image.start : image.end] = inputs[name]
            inputs[name] = types
    ids = torch.tensor([prompt], device=device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **inputs).logits[0, -2:].float()
    return logits


def _random_image(width: int, height: int) -> bytes:
    """A PNG file."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
