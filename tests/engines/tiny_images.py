"""A tiny untrained Stable Diffusion in diffusers' own format, and a collector of an engine's events."""

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from catalogue import ImageModelEntry
from protocol.events import Event, Failed, ImageReady, is_terminal
from protocol.jobs import ImageJob

SIDE = 32


def write_model(folder: Path) -> Path:
    """Save the pipeline. Its random weights are always the same, its default size is 32 x 32 pixels."""
    make_model(folder).save_pretrained(folder)
    return folder


def write_instruction_model(folder: Path) -> Path:
    """Save an InstructPix2Pix: it edits by text and image, and diffusers' Auto classes do not know it."""
    parts = make_model(folder).components
    parts["unet"] = _unet(in_channels=8)
    StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def write_inpainting_model(folder: Path) -> Path:
    """Save a model made for masks: its U-Net takes the mask and the masked image as extra channels."""
    parts = make_model(folder).components
    parts["unet"] = _unet(in_channels=9)
    StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def make_model(folder: Path) -> StableDiffusionPipeline:
    """Make the pipeline. The files of its tokenizer are written to `folder`."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=_unet(in_channels=4),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _unet(in_channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    source = folder / "letters"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(source, model_max_length=16)
    return tokenizer


def entry(weights: Path, tasks: Sequence[str] = ("generation", "edit"), **engine: object) -> ImageModelEntry:
    """Make a catalogue entry for the folder. torch uses one thread, because the tests' machines are small."""
    return ImageModelEntry.model_validate(
        {"name": "tiny", "tasks": tasks, "weights": str(weights), "engine": {"torch_threads": 1, **engine}}
    )


def job(id: str, **fields: Any) -> ImageJob:
    """Make a job of two steps. It is an edit if it has an image."""
    task: Literal["generation", "edit"] = "edit" if "image" in fields else "generation"
    defaults: dict[str, Any] = {"prompt": "p", "seed": 7, "num_inference_steps": 2}
    return ImageJob(id=id, model="tiny", task=task, **defaults | fields)


def png(image: Image.Image, **options: object) -> bytes:
    """Encode the image as a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


class Collector:
    """An `emit` that records all events. `first` and `until_ended` wait for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.events: dict[str, list[Event]] = defaultdict(list)
        self._reactions: dict[tuple[str, type[Event]], Callable[[], object]] = {}

    def on_first(self, request_id: str, kind: type[Event], reaction: Callable[[], object]) -> None:
        """Call `reaction` in the engine's own thread at the request's first event of this kind."""
        self._reactions[request_id, kind] = reaction

    def __call__(self, events: Sequence[tuple[str, Event]]) -> None:
        with self._changed:
            for request_id, event in events:
                self.events[request_id].append(event)
            self._changed.notify_all()
        for request_id, event in events:
            if reaction := self._reactions.pop((request_id, type(event)), None):
                reaction()

    def first(self, request_id: str, kind: type[Event], timeout: float = 60) -> Event:
        """Wait for the request's first event of this kind."""

        def first() -> Event | None:
            return next((event for event in self.events[request_id] if isinstance(event, kind)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: first() is not None, timeout), self.events[request_id]
            found = first()
            assert found is not None
            return found

    def until_ended(self, request_id: str, timeout: float = 60) -> list[Event]:
        """Wait for the request's terminal event and return all events. The terminal event is the last."""
        with self._changed:
            events = self.events[request_id]
            assert self._changed.wait_for(lambda: any(map(is_terminal, events)), timeout), events
            assert [is_terminal(event) for event in events].index(True) == len(events) - 1
            return list(events)

    def failure(self, request_id: str) -> Failed:
        """Wait for the end of the request, which must be a failure."""
        last = self.until_ended(request_id)[-1]
        assert isinstance(last, Failed), last
        return last

    def images(self, request_id: str) -> list[Image.Image]:
        """Wait for the end of the request and return its images in the order of their index."""
        ready = sorted(
            (e for e in self.until_ended(request_id) if isinstance(e, ImageReady)), key=lambda e: e.index
        )
        return [Image.open(BytesIO(event.png)).convert("RGB") for event in ready]
