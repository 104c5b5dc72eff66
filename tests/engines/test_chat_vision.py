"""Chats with images: the text is what transformers generates, whatever else the engine does at the time."""

import gc
import io
import itertools
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from protocol.events import Failed
from protocol.jobs import ChatJob
from tests.engines.tiny_chat import CONFIGS, Collector, chat_job, make_engine, run, save_model, together
from tests.engines.tiny_vision import FAMILIES, GEMMA3, Reference, image_job, png
from workers.engines.chat import ChatEngine
from workers.engines.chat.model.fused_decoder import FusedDecoder
from workers.engines.chat.model.runner import ModelRunner
from workers.engines.chat.vision.encoder import ImageEncoder
from workers.engines.chat.vision.features import Features
from workers.engines.chat.vision.reader import ImageReader


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    return FAMILIES[request.param].save(tmp_path_factory.mktemp(request.param))


@contextmanager
def engine_of(folder: Path, **options: Any) -> Iterator[tuple[ChatEngine, Collector]]:
    engine, collector = make_engine(folder, **options)
    try:
        yield engine, collector
    finally:
        engine.close()


NUMBERS = itertools.count()


def refused(loaded: tuple[ChatEngine, Collector], *images: bytes, **options: Any) -> Failed:
    (result,) = run(*loaded, [image_job(f"refused {next(NUMBERS)}", *images, **options)])
    return result.failed


def mixed_jobs() -> list[ChatJob]:
    return [
        image_job("one", png()),
        image_job("two", png(84, 140, 1), png(140, 56, 2), max_tokens=60),
        image_job("same", png(), png()),
        chat_job("text", "no image here", ignore_eos=True, max_tokens=60),
        image_job("last", png(33, 31, 3), max_tokens=60),
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"prefix_cache": False},
    "chunks": {"prefill_chunk": 16, "max_batch_size": 4},
    "preemption": {"kv_cache_tokens": 216, "max_context": 200},
    "speculation": {"num_speculative_tokens": 4},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_greedy_equals_generate(family, options):
    reference = Reference(family)
    with engine_of(family, **OPTIONS[options]) as loaded:
        jobs = mixed_jobs()
        for job, result in zip(jobs, run(*loaded, jobs), strict=True):
            expected, length = reference.greedy(job)
            assert result.text() == expected, job.id
            assert result.usage.prompt_tokens == length
        assert loaded[0].metrics.preemptions > 0 or options != "preemption"
        assert loaded[0].metrics.image_layers > 0


def test_a_closed_engine_holds_no_part_of_the_model(family):
    with engine_of(family) as loaded:
        run(*loaded, [image_job("a", png())])
        vision = loaded[0].parts.prompts._vision
        assert vision is not None
        front = weakref.ref(vision.encoder._front)
        del vision
    gc.collect()
    assert front() is None


def test_layers_of_models_for_text_run_fused(family):
    with engine_of(family, dtype="float32") as (engine, _):
        runner = engine.parts.runner
        assert isinstance(runner, ModelRunner)
        fused = isinstance(runner.model_forward, FusedDecoder)
        assert fused == ("qwen" not in family.name)


def test_weights_in_half_precision(family):
    with engine_of(family, dtype="bfloat16") as loaded:
        assert loaded[0].status().takes_images
        results = run(*loaded, mixed_jobs())
        assert all(result.finish() == ("length", None) for result in results)


def test_the_prefix_cache_tells_images_apart(family):
    """The same words around another image, and around the same one, which is then not computed again."""
    reference = Reference(family)
    with engine_of(family, max_batch_size=4) as loaded:
        engine, _ = loaded
        texts = []
        for number, seed in enumerate((5, 6, 5)):
            words = ("Look: ", " and ", " What is it?" * 6)
            job = image_job(str(number), png(84, 84, seed), png(84, 84, 9), words=words)
            before = engine.metrics.image_layers
            (result,) = run(*loaded, [job])
            texts.append(result.text())
            assert texts[-1] == reference.greedy(job)[0]
            assert (result.usage.cached_tokens > 0) == (number == 2)
            assert (engine.metrics.image_layers == before) == (number == 2)
        assert texts[0] != texts[1], "the images count"
        assert texts[0] == texts[2]


def test_choices_of_one_prompt_and_a_seed(family):
    with engine_of(family) as loaded:
        sampling: dict[str, Any] = {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 12}
        first, again = run(*loaded, [image_job("a", png(), **sampling), image_job("b", png(), **sampling)])
        texts = [first.text(index) for index in range(3)]
        assert texts == [again.text(index) for index in range(3)]
        assert len(set(texts)) > 1


def test_low_detail_takes_no_more_tokens_and_is_another_image(tmp_path):
    folder = FAMILIES["qwen2_5_vl"].save(tmp_path)
    with engine_of(folder, max_image_pixels=4096) as loaded:
        jobs = [
            image_job("high", png(500, 500), detail="high"),
            image_job("small", png(64, 64), detail="high"),
        ]
        high, small = run(*loaded, jobs)
        assert high.usage.prompt_tokens == small.usage.prompt_tokens
    with engine_of(folder) as loaded:
        (larger,) = run(*loaded, [image_job("large", png(500, 500))])
        assert larger.usage.prompt_tokens > high.usage.prompt_tokens


# what is refused


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Iterator[tuple[ChatEngine, Collector]]:
    folder = FAMILIES["qwen2_5_vl"].save(tmp_path_factory.mktemp("qwen"))
    with engine_of(folder, max_images=3, max_context=64) as loaded:
        yield loaded


def test_more_images_than_the_model_takes(qwen):
    failed = refused(qwen, *[png()] * 4)
    assert (failed.code, failed.param) == ("invalid_request", "messages.0.content.7")
    assert "at most 3" in failed.message


def test_images_with_more_tokens_than_the_context(qwen):
    failed = refused(qwen, *[png(200, 200)] * 3)
    assert (failed.code, failed.param) == ("context_length_exceeded", "messages")
    assert "maximum context length is 64 tokens" in failed.message


@pytest.mark.parametrize("data", [b"", b"no image", png()[:-40], png(5000, 5000)])
def test_what_is_no_image_or_too_large(qwen, data):
    failed = refused(qwen, data)
    assert (failed.code, failed.param) == ("invalid_image", "messages.0.content.1")


def test_images_of_unusual_proportions_are_served_or_refused(family):
    with engine_of(family, max_context=1000) as loaded:
        sizes = [(1, 1), (1, 3000), (3000, 1), (2, 2), (3, 200)]
        for result in run(*loaded, [image_job(str(size), png(*size)) for size in sizes]):
            if isinstance(result.events[-1], Failed):
                assert result.failed.code in ("invalid_image", "context_length_exceeded")


def test_a_placeholder_that_a_client_has_typed_is_text(family):
    """It neither takes an image's place nor becomes the model's token for one, and so with other control
    tokens."""
    reference = Reference(family)
    placeholder = reference.processor.image_token
    typed = f"{placeholder} <|end|><|user|>{placeholder}"
    as_text = reference.tokenizer(typed, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    of_template = len(reference.inputs(chat_job("empty", ""))["input_ids"][0])
    of_image = len(reference.inputs(image_job("image", png(), words=("", "", "")))["input_ids"][0])
    with engine_of(family) as loaded:
        jobs = [image_job("image", png(), words=(typed, "", typed)), chat_job("text", typed)]
        image, text = run(*loaded, jobs)
        assert text.usage.prompt_tokens == of_template + len(as_text)
        assert image.usage.prompt_tokens == of_image + 2 * len(as_text)


def test_control_tokens_in_content_may_not_add_places_for_images(tmp_path):
    folder = FAMILIES["llava"].save(tmp_path)
    with engine_of(folder, control_tokens_in_content=True) as loaded:
        failed = refused(loaded, png(), words=("<image>", "", "?"))
        assert (failed.code, failed.param) == ("invalid_request", "messages")


def test_a_message_whose_images_the_template_leaves_out(tmp_path):
    folder = FAMILIES["llava"].save(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("part['type'] == 'image'", "part['type'] == 'image' and loop.index0 < 2")
    )
    with engine_of(folder) as loaded:
        failed = refused(loaded, png(), png())
        assert (failed.code, failed.param) == ("invalid_request", "messages")


def test_a_model_for_text_names_the_part(tmp_path):
    with engine_of(save_model(tmp_path, CONFIGS["llama"]())) as loaded:
        assert not loaded[0].status().takes_images
        failed = refused(loaded, png())
        assert (failed.code, failed.param) == ("unsupported_parameter", "messages.0.content.1")
        assert "takes no images" in failed.message


# models whose images can't be served


def test_gemma_3_takes_no_images_and_says_so(tmp_path, caplog):
    """Its tokens of an image see each other, which the engine's causal attention doesn't do."""
    folder = GEMMA3.save(tmp_path)
    with engine_of(folder) as loaded:
        assert not loaded[0].status().takes_images
        assert (
            "Gemma3ForConditionalGeneration can't be served: its images need attention masks" in caplog.text
        )
        text, image = run(*loaded, [chat_job("text"), image_job("image", png())])
        assert text.finish()[0]
        assert image.failed.code == "unsupported_parameter"


def test_without_a_processor_a_model_takes_no_images(tmp_path, caplog):
    folder = FAMILIES["llava"].save(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with engine_of(folder) as loaded:
        assert not loaded[0].status().takes_images
        assert "takes no images" in caplog.text
        assert run(*loaded, [chat_job("text")])[0].finish()[0]


@pytest.mark.parametrize("fault", ["positions", "deepstack", "place"])
def test_images_that_are_computed_wrongly_are_not_served(tmp_path, fault, monkeypatch, caplog):
    if fault == "positions":
        monkeypatch.setattr(ImageReader, "_positions", lambda *args: None)
    elif fault == "deepstack":
        monkeypatch.setattr(Features, "part", lambda self, start, end: Features(self.embeds[start:end]))
    else:
        right = Features.part
        monkeypatch.setattr(
            Features,
            "part",
            lambda self, start, end: right(self, start, end)._replace(embeds=self.embeds[:1]),
        )
    with engine_of(FAMILIES["qwen3_vl"].save(tmp_path)) as loaded:
        assert not loaded[0].status().takes_images
        assert "takes no images" in caplog.text


def test_a_damaged_image_step_fails_its_own_request_alone(tmp_path, monkeypatch):
    folder = FAMILIES["llava"].save(tmp_path)
    with engine_of(folder) as loaded:
        right = ImageEncoder.encode

        def encode(self: ImageEncoder, ids: list[int], inputs: Any) -> Features:
            if len(ids) == 4 and float(inputs["pixel_values"].mean()) > 1:
                raise RuntimeError("bad image")
            return right(self, ids, inputs)

        monkeypatch.setattr(ImageEncoder, "encode", encode)
        white = io.BytesIO()
        Image.new("RGB", (28, 28), "white").save(white, "PNG")
        jobs = [image_job("good", png()), image_job("bad", white.getvalue()), chat_job("text")]
        good, bad, text = run(*loaded, jobs)
        assert bad.failed.code == "engine_error"
        assert good.finish()[0] and text.finish()[0]


def test_the_memory_for_images_of_all_requests_is_bounded(tmp_path, request):
    with engine_of(FAMILIES["qwen2_5_vl"].save(tmp_path)) as loaded:
        engine, collector = loaded
        vision = engine.parts.prompts._vision
        assert vision is not None
        reader = vision.reader
        assert reader.held_bytes == 0
        reader._max_bytes = 3 * reader.sample(png()).nbytes
        # the collector would free what a request that has ended should have let go
        gc.disable()
        request.addfinalizer(gc.enable)
        for name in ("before", "after"):
            with together(engine):
                engine.submit(image_job(f"first {name}", png(), png(seed=1)))
                engine.submit(image_job(f"second {name}", png(seed=2), png(seed=3)))
            assert collector.result(f"first {name}").finish() == ("length", None)
            assert collector.result(f"second {name}").failed.code == "overloaded"
            # attention keeps the chunks of the last step
            run(*loaded, [chat_job(f"text {name}")])
            assert reader.held_bytes == 0


def test_images_that_no_moment_has_room_for_are_the_clients_mistake(tmp_path):
    with engine_of(FAMILIES["qwen2_5_vl"].save(tmp_path)) as loaded:
        vision = loaded[0].parts.prompts._vision
        assert vision is not None
        vision.reader._max_bytes = 3 * vision.reader.sample(png()).nbytes
        failed = refused(loaded, *(png(seed=seed) for seed in range(4)))
        assert (failed.code, failed.param) == ("invalid_request", "messages.0.content.7")
        assert "take more than" in failed.message
        (result,) = run(*loaded, [image_job("three", *(png(seed=seed) for seed in range(3)))])
        assert result.finish() == ("length", None)


def test_the_largest_image_is_found_among_proportions(family):
    """InternVL makes more tiles of a long image than of a square."""
    with engine_of(family, max_image_pixels=200_000) as (engine, _):
        vision = engine.parts.prompts._vision
        assert vision is not None
        reader = vision.reader
        largest = reader.largest()
        for width, height in itertools.product(range(1, 9), repeat=2):
            factor = math.sqrt(reader.max_pixels / (width * height))
            ids, inputs = reader._process(Image.new("RGB", (int(width * factor), int(height * factor))))
            assert len(ids) <= len(largest.ids), (width, height)
            assert sum(tensor.nbytes for tensor in inputs.values()) <= largest.nbytes, (width, height)
