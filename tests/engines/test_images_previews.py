"""Previews of images while they are made, with a tiny untrained Stable Diffusion."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor

from protocol.events import Event, Finished, ImagePreview, ImageReady, Progress
from tests.engines.tiny_images import SIDE, Collector, entry, job, png, write_model
from workers.engines.images import ImageEngine, decoding, unfinished
from workers.engines.images.pipeline import ImagePipeline
from workers.engines.images.request import preview_steps

Loaded = tuple[ImageEngine, Collector]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


def load(weights: Path) -> Iterator[Loaded]:
    collector = Collector()
    engine = ImageEngine(entry(weights, max_batch_size=3, default_size=SIDE))
    engine.load(collector)
    yield engine, collector
    engine.close()


@pytest.fixture(scope="module")
def loaded(weights: Path) -> Iterator[Loaded]:
    yield from load(weights)


@pytest.fixture
def fresh(weights: Path) -> Iterator[Loaded]:
    """An engine for one test, which may change its pipelines."""
    yield from load(weights)


def pipe_of(engine: ImageEngine) -> Any:
    assert engine._pipelines is not None and engine._pipelines.text2image is not None
    return engine._pipelines.text2image._pipe


def previews(events: list[Event]) -> list[ImagePreview]:
    return [event for event in events if isinstance(event, ImagePreview)]


def files(events: list[Event]) -> list[bytes]:
    return [event.png for event in events if isinstance(event, ImageReady)]


@pytest.mark.parametrize(
    ("count", "total", "steps"),
    [
        (0, 30, []),
        (1, 30, [15]),
        (2, 30, [10, 20]),
        (3, 30, [8, 15, 23]),
        (3, 4, [1, 2, 3]),
        (3, 3, [1, 2]),
        (3, 2, [1]),
        (3, 1, []),
    ],
)
def test_previews_are_evenly_spaced_and_none_is_at_the_end(count: int, total: int, steps: list[int]) -> None:
    assert preview_steps(count, total) == steps


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def right_half_mask() -> bytes:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    return png(mask)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 5},
        {"image": png(noise()), "strength": 1.0},
        {"image": png(noise()), "mask": right_half_mask(), "strength": 1.0},
    ],
    ids=["generation", "several calls", "edit", "masked edit"],
)
def test_an_image_is_the_same_with_previews(loaded: Loaded, fields: dict[str, Any]) -> None:
    engine, collector = loaded
    name = f"same {len(fields)} {fields.get('n')}"
    ended: list[list[Event]] = []
    for partial_images in (0, 3):
        # one after the other, so that both have calls of their own
        request = f"{name} {partial_images}"
        engine.submit(job(request, num_inference_steps=8, partial_images=partial_images, **fields))
        ended.append(collector.until_ended(request))
    without, with_them = ended
    assert previews(without) == []
    assert len(previews(with_them)) == 3 * fields.get("n", 1)
    assert files(without) == files(with_them)


def test_previews_come_in_order_between_their_steps_and_before_the_image(loaded: Loaded) -> None:
    engine, collector = loaded
    engine.submit(job("order", num_inference_steps=8, partial_images=3, width=48))
    events = collector.until_ended("order")
    found = previews(events)
    assert [(each.index, each.number, each.width, each.height) for each in found] == [
        (0, 0, 48, SIDE),
        (0, 1, 48, SIDE),
        (0, 2, 48, SIDE),
    ]
    for each in found:
        image = Image.open(BytesIO(each.jpeg))
        assert (image.format, image.size) == ("JPEG", (48, SIDE))
    assert [type(event) for event in events[-2:]] == [ImageReady, Finished]
    # another thread encodes them, so that steps may pass meanwhile, but none before it is due
    for each, step in zip(found, (2, 4, 6), strict=True):
        assert events.index(each) > events.index(Progress(step, 8))


def test_the_preview_of_a_masked_edit_keeps_the_rest(loaded: Loaded) -> None:
    engine, collector = loaded
    source = Image.new("RGB", (SIDE, SIDE), "orange")
    fields = {"image": png(source), "mask": right_half_mask(), "strength": 1.0}
    engine.submit(job("masked", num_inference_steps=6, partial_images=1, **fields))
    (preview,) = previews(collector.until_ended("masked"))
    pixels = np.asarray(Image.open(BytesIO(preview.jpeg))).astype(int)
    original = np.asarray(source).astype(int)
    assert np.abs(pixels - original)[:, : SIDE // 2 - 8].max() < 8
    assert np.abs(pixels - original)[:, SIDE // 2 + 8 :].mean() > 20


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The latents that were decoded for previews."""
    seen: list[torch.Tensor] = []
    real = decoding.decode_latents

    def decode(pipe: Any, latents: torch.Tensor, width: int, height: int) -> Image.Image | None:
        seen.append(latents)
        return real(pipe, latents, width, height)

    monkeypatch.setattr(unfinished, "decode_latents", decode)
    return seen


def together(engine: ImageEngine, collector: Collector, *jobs: Any) -> list[list[Event]]:
    """Let jobs wait together behind another one, and return the events of each."""
    name = f"holder-{len(collector.events)}"
    engine.submit(job(name, num_inference_steps=900, width=16, height=16))
    collector.first(name, Progress)
    for each in jobs:
        engine.submit(each)
    with engine._work:
        assert engine._work.wait_for(lambda: len(engine._queue) == len(jobs), timeout=30)
    engine.cancel(name, "cancelled")
    return [collector.until_ended(each.id) for each in jobs]


def test_only_images_whose_requests_ask_are_decoded(
    loaded: Loaded, decoded: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, collector = loaded
    sizes: list[int] = []
    call = ImagePipeline.__call__

    def counting(self: ImagePipeline, shared: Any, images: Any, *others: Any) -> Any:
        sizes.append(len(images))
        return call(self, shared, images, *others)

    monkeypatch.setattr(ImagePipeline, "__call__", counting)
    plain, asking = together(
        engine,
        collector,
        job("plain", num_inference_steps=6, seed=1),
        job("asking", num_inference_steps=6, seed=2, partial_images=2),
    )
    assert sizes[-1] == 2, "they share a call"
    assert previews(plain) == [] and len(previews(asking)) == 2
    assert [latents.shape[0] for latents in decoded] == [1, 1]
    engine.submit(job("alone", num_inference_steps=6, seed=2, partial_images=2))
    alone = collector.until_ended("alone")
    for one, other in zip(previews(alone), previews(asking), strict=True):
        pair = [np.asarray(Image.open(BytesIO(each.jpeg))).astype(int) for each in (one, other)]
        assert np.abs(pair[0] - pair[1]).mean() < 1, "each gets its own image of the call"


def test_without_a_request_for_previews_the_scheduler_is_not_touched(
    loaded: Loaded, decoded: list[torch.Tensor]
) -> None:
    engine, collector = loaded
    scheduler = pipe_of(engine).scheduler
    touched: list[bool] = []
    hook = pipe_of(engine).unet.register_forward_hook(lambda *_: touched.append("step" in vars(scheduler)))
    engine.submit(job("untouched", partial_images=0))
    engine.submit(job("touched", partial_images=1, num_inference_steps=3))
    collector.until_ended("untouched")
    collector.until_ended("touched")
    hook.remove()
    assert touched == [False, False, True, True, True]
    assert "step" not in vars(scheduler)
    assert len(decoded) == 1


def test_a_preview_that_fails_does_not_fail_the_request(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, collector = loaded
    asked: list[None] = []

    def no_memory(*_: Any) -> None:
        asked.append(None)
        raise torch.OutOfMemoryError("simulated, of MARKER")

    monkeypatch.setattr(unfinished, "decode_latents", no_memory)
    engine.submit(job("no memory", num_inference_steps=8, partial_images=3, n=2))
    events = collector.until_ended("no memory")
    assert previews(events) == [] and len(files(events)) == 2
    assert len(asked) == 1, "the rest of the call goes on without previews"
    assert "OutOfMemoryError" in caplog.text and "MARKER" not in caplog.text
    monkeypatch.undo()
    engine.submit(job("next", num_inference_steps=8, partial_images=3))
    assert len(previews(collector.until_ended("next"))) == 3


def test_a_request_can_be_cancelled_while_its_preview_is_decoded(
    loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    engine, collector = loaded
    decoder = pipe_of(engine).vae.decoder
    reached: list[str] = []

    def cancel(*_: object) -> None:
        reached.append("begin")
        engine.cancel("leaves", "cancelled")

    hooks = [
        decoder.conv_in.register_forward_hook(cancel),
        decoder.conv_out.register_forward_hook(lambda *_: reached.append("end")),
    ]
    engine.submit(job("leaves", num_inference_steps=50, partial_images=1))
    assert collector.failure("leaves").code == "cancelled"
    hooks[0].remove()
    engine.submit(job("comes", num_inference_steps=1))
    collector.images("comes")
    hooks[1].remove()
    assert reached == ["begin", "end"]
    assert "preview" not in caplog.text, "none has failed"


def test_an_image_that_starts_again_does_not_repeat_its_previews(
    fresh: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, collector = fresh
    unet = pipe_of(engine).unet
    forward = unet.forward
    passes: list[None] = []

    def failing(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 2:  # guidance runs each image with and without the prompt
            passes.append(None)
            if len(passes) == 5:
                raise torch.OutOfMemoryError("simulated")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(unet, "forward", failing)
    engine.submit(job("again", num_inference_steps=8, partial_images=3, n=2))
    events = collector.until_ended("again")
    assert len(files(events)) == 2
    for index in range(2):
        assert [each.number for each in previews(events) if each.index == index] == [0, 1, 2]


class Flagging(nn.Module):
    """A safety checker that finds fault with every image."""

    device = torch.device("cpu")
    dtype = torch.float32

    def forward(self, images: torch.Tensor, clip_input: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        return torch.zeros_like(images), [True] * len(images)


def test_what_the_safety_checker_refuses_is_not_sent_as_a_preview(fresh: Loaded) -> None:
    engine, collector = fresh
    pipe = pipe_of(engine)
    pipe.safety_checker, pipe.feature_extractor = Flagging(), CLIPImageProcessor()
    engine.submit(job("unsafe", num_inference_steps=8, partial_images=3))
    events = collector.until_ended("unsafe")
    assert previews(events) == []
    (image,) = collector.images("unsafe")
    assert image.getextrema() == ((0, 0),) * 3


def test_a_pipeline_whose_latents_are_not_understood_has_no_previews(
    weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here: our decoding differs from the pipeline's."""
    real = decoding.decode_latents

    def differently(pipe: Any, latents: torch.Tensor, width: int, height: int) -> Image.Image | None:
        return real(pipe, latents * 3 + 1, width, height)

    def fails(*_: Any) -> None:
        raise RuntimeError("shapes")

    for decode in (differently, fails):
        check: Callable[..., Any] = decode
        with monkeypatch.context() as patch, caplog.at_level("INFO"):
            patch.setattr(unfinished, "decode_latents", check)
            caplog.clear()
            for engine, collector in load(weights):
                engine.submit(job("plain", num_inference_steps=6, partial_images=3))
                events = collector.until_ended("plain")
                assert previews(events) == [] and len(files(events)) == 1
            assert "no previews" in caplog.text
