"""The image engine with a tiny untrained Stable Diffusion: batches, cancellation, failures, masks."""

import logging
import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from catalogue import ImageDefaults
from protocol.events import Failed, Finished, ImageReady, Progress
from tests.engines.tiny_images import (
    SIDE,
    Collector,
    entry,
    job,
    png,
    write_inpainting_model,
    write_instruction_model,
    write_model,
)
from workers.engines.base import EngineLoadError
from workers.engines.images import ImageEngine
from workers.engines.images.pipeline import CallParams, ImageParams, ImagePipeline


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(weights: Path) -> Iterator[tuple[ImageEngine, Collector]]:
    collector = Collector()
    engine = ImageEngine(entry(weights, max_batch_size=3, default_size=SIDE))
    engine.load(collector)
    yield engine, collector
    engine.close()


@pytest.fixture
def fresh(weights: Path) -> Iterator[tuple[ImageEngine, Collector]]:
    """An engine for one test, which may break or close it."""
    collector = Collector()
    engine = ImageEngine(entry(weights, max_batch_size=3, default_size=SIDE))
    engine.load(collector)
    yield engine, collector
    engine.close()


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_generation_reports_each_step_and_one_image(loaded):
    engine, collector = loaded
    engine.submit(job("one", num_inference_steps=3))
    events = collector.until_ended("one")
    assert [e for e in events if isinstance(e, Progress)] == [Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    ready = [e for e in events if isinstance(e, ImageReady)]
    assert [(e.index, e.seed, e.width, e.height) for e in ready] == [(0, 7, SIDE, SIDE)]
    assert events[-1] == Finished()
    assert collector.images("one")[0].size == (SIDE, SIDE)


def test_a_seed_gives_the_same_image_alone_or_in_a_batch(loaded):
    engine, collector = loaded
    engine.submit(job("batch", seed=7, n=3))
    engine.submit(job("alone", seed=9))
    third, alone = collector.images("batch")[2], collector.images("alone")[0]
    assert np.abs(as_array(third) - as_array(alone)).max() <= 1
    first = collector.images("batch")[0]
    assert np.abs(as_array(first) - as_array(alone)).max() > 10


@contextmanager
def held(engine: ImageEngine, collector: Collector) -> Iterator[None]:
    """Keep the engine busy with an incompatible call, so that requests submitted meanwhile wait together."""
    name = f"holder-{len(collector.events)}"
    engine.submit(job(name, num_inference_steps=900, width=16, height=16))
    collector.first(name, Progress)
    yield
    engine.cancel(name, "cancelled")


def wait_until_waiting(engine: ImageEngine, count: int) -> None:
    """Wait until `count` requests are prepared and wait for a call."""
    with engine._work:
        assert engine._work.wait_for(lambda: len(engine._queue) == count, timeout=30)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kind and the number of images of each call that is made."""
    made: list[tuple[str, int]] = []
    real = ImagePipeline.__call__

    def call(self, shared, images, *callbacks):
        made.append((shared.kind, len(images)))
        return real(self, shared, images, *callbacks)

    monkeypatch.setattr(ImagePipeline, "__call__", call)
    return made


def test_n_above_the_batch_size_is_split_over_calls(loaded, calls):
    engine, collector = loaded
    engine.submit(job("many", n=7))
    assert len(collector.images("many")) == 7
    assert [e.seed for e in collector.until_ended("many") if isinstance(e, ImageReady)] == list(range(7, 14))
    progress = [e for e in collector.until_ended("many") if isinstance(e, Progress)]
    assert progress == [Progress(done, 14) for done in (3, 6, 9, 12, 13, 14)]
    assert calls == [("text2image", 3), ("text2image", 3), ("text2image", 1)]


def test_compatible_requests_share_calls(loaded, calls):
    engine, collector = loaded
    with held(engine, collector):
        calls.clear()
        for number in range(4):
            engine.submit(job(f"share-{number}", prompt=f"prompt {number}"))
        engine.submit(job("share-edit", image=png(noise())))
        wait_until_waiting(engine, 5)
    for number in range(4):
        assert len(collector.images(f"share-{number}")) == 1
    assert len(collector.images("share-edit")) == 1
    assert calls == [("text2image", 3), ("text2image", 1), ("image2image", 1)]


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae.encoder", "vae.decoder"])
def test_the_engine_shows_progress_inside_a_step(loaded, part):
    engine, collector = loaded
    module = operator.attrgetter(part)(engine._pipelines.text2image._pipe)
    seen: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: seen.append(engine.status().steps)),
        module.register_forward_hook(lambda *_: seen.append(engine.status().steps)),
    ]
    engine.submit(job(f"slow {part}", num_inference_steps=1, image=png(noise()), strength=1.0))
    collector.images(f"slow {part}")
    for hook in hooks:
        hook.remove()
    assert seen[1] - seen[0] > 5


def test_a_call_that_nobody_waits_for_ends_inside_its_step(loaded):
    engine, collector = loaded
    unet = engine._pipelines.text2image._pipe.unet
    reached: list[str] = []

    def cancel(*_: object) -> None:
        reached.append("middle")
        engine.cancel("abandoned", "cancelled")

    hooks = [
        unet.mid_block.register_forward_hook(cancel),
        unet.conv_out.register_forward_hook(lambda *_: reached.append("end")),
    ]
    engine.submit(job("abandoned"))
    assert collector.failure("abandoned").code == "cancelled"
    hooks[0].remove()
    engine.submit(job("after abandoned", num_inference_steps=1))
    collector.images("after abandoned")
    hooks[1].remove()
    assert reached == ["middle", "end"]


@pytest.mark.parametrize(
    "fields",
    [{"width": 48}, {"num_inference_steps": 1}, {"guidance_scale": 1.5}, {"negative_prompt": "x"}],
    ids=lambda fields: next(iter(fields)),
)
def test_requests_that_differ_are_not_mixed(loaded, calls, fields):
    engine, collector = loaded
    name = f"differs {fields}"
    with held(engine, collector):
        calls.clear()
        engine.submit(job(f"plain {name}"))
        engine.submit(job(name, **fields))
    assert collector.images(name)[0].size == (fields.get("width", SIDE), SIDE)
    assert collector.images(f"plain {name}")[0].size == (SIDE, SIDE)
    assert calls == [("text2image", 1), ("text2image", 1)]


@pytest.mark.parametrize(("reason", "code"), [("cancelled", "cancelled"), ("deadline", "deadline_exceeded")])
def test_a_running_request_ends_within_two_steps(loaded, reason, code):
    engine, collector = loaded
    passes: list[None] = []
    unet = engine._pipelines.text2image._pipe.unet
    counter = unet.register_forward_hook(lambda *_: passes.append(None))
    collector.on_first(reason, Progress, lambda: engine.cancel(reason, reason))
    engine.submit(job(reason, num_inference_steps=500))
    assert collector.failure(reason).code == code
    engine.submit(job(f"after {reason}", num_inference_steps=1))
    collector.until_ended(f"after {reason}")
    counter.remove()
    # the step of the cancelled call, at most another one, and the step of the next request
    assert len(passes) <= 3


def test_a_cancelled_request_does_not_disturb_the_others_of_its_batch(loaded, calls):
    engine, collector = loaded
    collector.on_first("leaver", Progress, lambda: engine.cancel("leaver", "cancelled"))
    with held(engine, collector):
        calls.clear()
        engine.submit(job("leaver"))
        engine.submit(job("stayer", seed=9))
    engine.cancel("unknown", "cancelled")
    assert [type(e) for e in collector.until_ended("leaver")] == [Progress, Failed]
    assert collector.failure("leaver").code == "cancelled"
    engine.submit(job("stayer alone", seed=9))
    stayer, alone = collector.images("stayer")[0], collector.images("stayer alone")[0]
    assert np.abs(as_array(stayer) - as_array(alone)).max() <= 1
    assert calls == [("text2image", 2), ("text2image", 1)]


def test_a_waiting_request_can_be_cancelled(loaded, calls):
    engine, collector = loaded
    with held(engine, collector):
        engine.submit(job("waits"))
        assert engine.status()[:3] == (True, 1, 1)
        engine.cancel("waits", "cancelled")
        assert engine.status()[:3] == (True, 1, 0)
    engine.submit(job("last", width=48))
    collector.until_ended("last")
    assert [type(e) for e in collector.until_ended("waits")] == [Failed]
    assert len(calls) == 2
    assert engine.status()[:3] == (True, 0, 0)


def test_the_thread_sleeps_after_a_cancel_while_a_call_gathers(fresh, monkeypatch):
    engine, _ = fresh
    cancelled, sleeps = threading.Event(), threading.Event()
    wait = engine._work.wait

    def watched_wait(timeout: float | None = None) -> bool:
        if timeout is not None and not cancelled.is_set():
            engine.cancel("early", "cancelled")
            cancelled.set()
        elif timeout is None and cancelled.is_set():
            sleeps.set()
        return wait(timeout)

    monkeypatch.setattr(engine._work, "wait", watched_wait)
    engine.submit(job("early"))
    assert cancelled.wait(30) and sleeps.wait(30)


def test_a_second_job_with_the_id_of_an_open_one_is_ignored(loaded):
    engine, collector = loaded
    with held(engine, collector):
        engine.submit(job("twice"))
        engine.submit(job("twice", n=5))
    assert len(collector.images("twice")) == 1


def test_an_edit_keeps_the_proportions_of_its_source(loaded):
    engine, collector = loaded
    engine.submit(job("edit", image=png(Image.new("RGB", (200, 50), "red"))))
    width, height = collector.images("edit")[0].size
    assert (width, height) == (64, 16)


@pytest.mark.parametrize(
    ("size", "fields"), [((1, 500), {"width": 64}), ((500, 1), {"height": 64, "n": 2})], ids=["high", "wide"]
)
def test_a_derived_side_beyond_the_limits_is_refused(loaded, calls, size, fields):
    engine, collector = loaded
    name = f"thin {size}"
    engine.submit(job(name, image=png(Image.new("RGB", size)), **fields))
    failure = collector.failure(name)
    assert (failure.code, failure.param) == ("invalid_request", next(iter(fields)))
    assert "32000" in failure.message and calls == []


def test_an_edit_has_the_requested_size(loaded):
    engine, collector = loaded
    engine.submit(job("sized", image=png(Image.new("RGB", (50, 50), "red")), width=48, height=40))
    assert collector.images("sized")[0].size == (48, 40)


def test_a_strength_too_low_for_one_step_still_runs_one(loaded):
    engine, collector = loaded
    engine.submit(
        job("weak", image=png(Image.new("RGB", (SIDE, SIDE))), strength=0.01, num_inference_steps=49)
    )
    assert len(collector.images("weak")) == 1


def left_half_mask(inverted: bool = False) -> bytes:
    mask = Image.new("L", (SIDE, SIDE), 255 if inverted else 0)
    mask.paste(0 if inverted else 255, (0, 0, SIDE // 2, SIDE))
    return png(mask)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def transparent_left(image: Image.Image) -> bytes:
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, SIDE // 2, SIDE))
    with_alpha = image.copy()
    with_alpha.putalpha(alpha)
    return png(with_alpha)


@pytest.mark.parametrize("how", ["white mask", "transparent mask", "transparent image"])
def test_inpainting_changes_the_marked_part_only(loaded, how):
    engine, collector = loaded
    source = noise()
    fields = {
        "white mask": {"image": png(source), "mask": left_half_mask()},
        "transparent mask": {
            "image": png(source),
            "mask": transparent_left(Image.new("RGB", (SIDE, SIDE), "white")),
        },
        "transparent image": {"image": transparent_left(source)},
    }[how]
    engine.submit(job(how, strength=1.0, **fields))
    result, original = as_array(collector.images(how)[0]), as_array(source)
    half = SIDE // 2
    assert (result[:, half:] == original[:, half:]).all()
    assert np.abs(result[:, :half] - original[:, :half]).mean() > 20


def test_masked_edits_of_two_requests_share_a_call_and_keep_their_own_masks(loaded, calls):
    engine, collector = loaded
    source = noise()
    with held(engine, collector):
        calls.clear()
        engine.submit(job("left", image=png(source), mask=left_half_mask()))
        engine.submit(job("right", image=png(source), mask=left_half_mask(inverted=True)))
        # Sources are decoded in another thread: both requests must wait before the engine goes on.
        wait_until_waiting(engine, 2)
    left, right, original = (
        as_array(collector.images("left")[0]),
        as_array(collector.images("right")[0]),
        as_array(source),
    )
    half = SIDE // 2
    assert (left[:, half:] == original[:, half:]).all() and (right[:, :half] == original[:, :half]).all()
    assert calls == [("inpaint", 2)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"image": b"not an image"}, "image"),
        ({"image": png(Image.new("RGB", (64, 64)))[:60]}, "image"),
        ({"image": png(noise()), "mask": b"not an image"}, "mask"),
        ({"image": png(noise()), "mask": png(Image.new("L", (SIDE, SIDE + 1), 255))}, "mask"),
        ({"image": png(noise()), "mask": png(Image.new("L", (SIDE, SIDE), 0))}, "mask"),
    ],
)
def test_a_bad_file_fails_with_the_name_of_its_field(loaded, fields, param):
    engine, collector = loaded
    identity = f"bad {param} {sum(map(len, fields.values()))}"
    engine.submit(job(identity, **fields))
    failure = collector.failure(identity)
    assert (failure.code, failure.param) == ("invalid_image", param)


def test_a_batch_that_runs_out_of_memory_is_generated_one_by_one(fresh, monkeypatch):
    engine, collector = fresh
    pipe = engine._pipelines.text2image._pipe
    decode, sizes = pipe.unet.forward, []

    def forward(sample, *args, **kwargs):
        sizes.append(len(sample) // 2)  # guidance runs each image with and without the prompt
        if len(sample) > 2:
            raise torch.OutOfMemoryError("simulated")
        return decode(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    engine.submit(job("oom", n=3))
    assert len(collector.images("oom")) == 3
    assert sizes == [3, 1, 1, 1, 1, 1, 1]
    steps = [e.step for e in collector.events["oom"] if isinstance(e, Progress)]
    assert steps == sorted(set(steps))


def test_an_image_that_runs_out_of_memory_alone_fails_and_the_engine_goes_on(fresh, monkeypatch):
    engine, collector = fresh
    pipe = engine._pipelines.text2image._pipe
    with monkeypatch.context() as patch:
        patch.setattr(
            pipe.unet, "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("simulated"))
        )
        engine.submit(job("oom"))
        assert collector.failure("oom").code == "out_of_memory"
    engine.submit(job("next"))
    assert len(collector.images("next")) == 1


def test_a_request_whose_image_is_lost_fails_and_the_engine_goes_on(fresh, monkeypatch):
    engine, collector = fresh

    def emit(events):
        if any(isinstance(event, ImageReady) for _, event in events):
            raise ConnectionError("lost")
        collector(events)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_emit", emit)
        engine.submit(job("lost"))
        assert collector.failure("lost").code == "engine_error"
    engine.submit(job("next"))
    assert len(collector.images("next")) == 1


def test_a_broken_pipeline_fails_the_request_and_its_prompt_is_not_logged(fresh, monkeypatch, caplog):
    engine, collector = fresh
    pipe = engine._pipelines.text2image._pipe

    def broken(prompt, *_, **__):
        raise ValueError(f"can't read {prompt}")

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "encode_prompt", broken)
        engine.submit(job("broken", prompt="MARKER"))
        failure = collector.failure("broken")
    assert failure.code == "engine_error" and "MARKER" not in failure.message
    assert "ValueError" in caplog.text and "MARKER" not in caplog.text
    engine.submit(job("next"))
    assert len(collector.images("next")) == 1


def test_a_request_that_makes_its_batch_fail_fails_alone(fresh, monkeypatch):
    engine, collector = fresh
    pipe = engine._pipelines.text2image._pipe
    encode = pipe.encode_prompt

    def picky(prompt, *args, **kwargs):
        if "poison" in prompt:
            raise ValueError("poison")
        return encode(prompt, *args, **kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", picky)
    with held(engine, collector):
        engine.submit(job("good"))
        engine.submit(job("bad", prompt="poison"))
    assert collector.failure("bad").code == "engine_error"
    assert len(collector.images("good")) == 1


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("files", [{}, {"image": b"not an image"}], ids=["generation", "edit"])
def test_a_prompt_that_the_text_encoder_would_truncate_is_refused_and_not_logged(
    loaded, calls, caplog, param, files
):
    engine, collector = loaded
    for library in ("diffusers", "transformers"):  # loggers that do not propagate
        logging.getLogger(library).addHandler(caplog.handler)
    name = f"long {param} {list(files)}"
    engine.submit(job(name, **{param: "MARKER " * 50}, **files))
    failure = collector.failure(name)
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).removeHandler(caplog.handler)
    assert (failure.code, failure.param) == ("context_length_exceeded", param)
    assert failure.message == f"{param} has 302 tokens; this model reads at most 16, so shorten it"
    assert "marker" not in caplog.text.lower() and calls == []


def test_a_prompt_is_read_to_its_last_token(loaded):
    engine, collector = loaded
    for name, prompt in (("longest", "a" * 14), ("other end", "a" * 13 + "b")):
        engine.submit(job(name, prompt=prompt))
    longest, other = collector.images("longest")[0], collector.images("other end")[0]
    assert np.abs(as_array(longest) - as_array(other)).max() > 0
    engine.submit(job("one more", prompt="a" * 15))
    assert collector.failure("one more").message.startswith("prompt has 17 tokens")


def test_a_job_that_ended_before_its_turn_is_not_decoded(loaded, monkeypatch):
    engine, collector = loaded
    monkeypatch.setattr("workers.engines.images.engine.prepare", lambda *_: pytest.fail("prepared"))
    blocked, go_on = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        go_on.wait(30)

    engine._pixels.submit(block)
    assert blocked.wait(30)
    engine.submit(job("left early", image=png(noise())))
    engine.cancel("left early", "cancelled")
    go_on.set()
    engine._pixels.submit(lambda: None).result(30)
    assert [type(event) for event in collector.until_ended("left early")] == [Failed]


def test_a_default_negative_prompt_that_is_too_long_is_a_load_error(weights):
    model = entry(weights, default_size=SIDE)
    model = model.model_copy(update={"defaults": ImageDefaults(negative_prompt="blurry " * 9)})
    with pytest.raises(EngineLoadError, match="negative_prompt has 56 tokens"):
        ImageEngine(model).load(Collector())


def test_close_fails_all_open_requests(fresh):
    engine, collector = fresh
    with held(engine, collector):
        holder = next(iter(collector.events))
        engine.submit(job("waits"))
        engine.close()
    assert collector.failure(holder).code == collector.failure("waits").code == "shutting_down"
    engine.submit(job("late"))
    assert collector.failure("late").code == "shutting_down"
    assert not engine.status().alive


def test_all_tasks_share_the_weights(loaded):
    engine, _ = loaded
    pipelines = engine._pipelines
    unets = {id(p._pipe.unet) for p in (pipelines.text2image, pipelines.image2image, pipelines.inpaint)}
    assert len(unets) == 1


def engine_of(weights: Path, *tasks: str) -> Iterator[tuple[ImageEngine, Collector]]:
    collector = Collector()
    engine = ImageEngine(entry(weights, tasks, max_batch_size=3, default_size=SIDE))
    engine.load(collector)
    yield engine, collector
    engine.close()


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ImageEngine, Collector]]:
    yield from engine_of(write_instruction_model(tmp_path_factory.mktemp("instructed")), "edit")


def test_an_instruction_model_edits_one_image_in_a_call(instructed, calls):
    engine, collector = instructed
    engine.submit(job("instructed", image=png(noise()), n=2))
    assert len(collector.images("instructed")) == 2
    assert calls == [("image2image", 1), ("image2image", 1)]


def test_a_mask_is_refused_when_the_model_can_not_use_one(instructed):
    engine, collector = instructed
    engine.submit(job("masked", image=png(noise()), mask=left_half_mask()))
    failure = collector.failure("masked")
    assert (failure.code, failure.param) == ("unsupported_parameter", "mask")
    engine.submit(job("transparent", image=transparent_left(noise())))
    assert len(collector.images("transparent")) == 1


def test_a_task_that_the_model_does_not_serve_fails(instructed):
    engine, collector = instructed
    engine.submit(job("generated"))
    assert collector.failure("generated").code == "unsupported_parameter"


def test_an_inpainting_model_edits_with_a_mask_and_without(tmp_path, calls):
    for engine, collector in engine_of(write_inpainting_model(tmp_path / "inpainting"), "edit"):
        calls.clear()
        source = noise()
        engine.submit(job("masked", image=png(source), mask=left_half_mask()))
        half = SIDE // 2
        assert (as_array(collector.images("masked")[0])[:, half:] == as_array(source)[:, half:]).all()
        engine.submit(job("whole", image=png(source)))
        assert (as_array(collector.images("whole")[0])[:, half:] != as_array(source)[:, half:]).any()
        assert calls == [("inpaint", 1), ("inpaint", 1)]


def test_a_model_that_needs_an_image_can_not_serve_generations(tmp_path):
    folder = write_instruction_model(tmp_path / "instructed")
    with pytest.raises(EngineLoadError, match="tiny: "):
        ImageEngine(entry(folder, ["generation"])).load(Collector())


def test_steps_of_a_pipeline_without_callback_are_counted_at_its_denoiser(loaded):
    engine, _ = loaded
    pipe = engine._pipelines.text2image._pipe

    class Silent(StableDiffusionPipeline):
        def __call__(self, prompt, height, width, num_inference_steps, generator, output_type="pil"):
            return super().__call__(
                prompt, height, width, num_inference_steps, generator=generator, output_type=output_type
            )

    silent = ImagePipeline(Silent(**pipe.components, requires_safety_checker=False), "text2image")
    shared = CallParams("text2image", SIDE, SIDE, 3, None, None, False)
    steps: list[tuple[int, int]] = []
    silent(shared, [ImageParams("p", "", 7)], lambda *step: steps.append(step), lambda: None)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    silent(shared, [ImageParams("p", "", 7)], lambda *step: None, lambda: None)
    assert len(steps) == 3 and not pipe.unet._forward_hooks


def test_a_default_size_that_clients_could_not_request_is_a_load_error(weights):
    for limit, value in (("size_multiple", 24), ("max_side", 16), ("max_pixels", 1000)):
        options: dict[str, Any] = {"default_size": SIDE, limit: value}
        with pytest.raises(EngineLoadError, match="set default_size"):
            ImageEngine(entry(weights, **options)).load(Collector())


def test_the_native_size_of_the_model_is_the_default(weights):
    collector = Collector()
    engine = ImageEngine(entry(weights, ["generation"]))
    engine.load(collector)
    engine.submit(job("own size"))
    assert collector.images("own size")[0].size == (SIDE, SIDE)
    engine.close()


def test_missing_weights_are_a_load_error(tmp_path):
    with pytest.raises(EngineLoadError, match="tiny"):
        ImageEngine(entry(tmp_path / "nothing")).load(Collector())


def test_pickled_weights_are_refused(weights, tmp_path):
    StableDiffusionPipeline.from_pretrained(weights, safety_checker=None).save_pretrained(
        tmp_path / "pickled", safe_serialization=False
    )
    with pytest.raises(EngineLoadError):
        ImageEngine(entry(tmp_path / "pickled")).load(Collector())
