"""app.images.schema: the fields of image requests, and their jobs."""

import pytest

from app.http.validation import parse
from app.images.schema import ImageEditRequest, ImageGenerationRequest
from catalogue import ImageModelEntry
from protocol.errors import InvalidRequest
from protocol.jobs import ImageJob


def entry(**engine: object) -> ImageModelEntry:
    return ImageModelEntry.model_validate(
        {
            "name": "painter",
            "tasks": ["generation", "edit"],
            "weights": "w",
            "engine": {"max_side": 1024, "max_pixels": 512 * 1024, "max_n": 4, "max_steps": 50, **engine},
            "defaults": {"num_inference_steps": 20, "strength": 0.6, "guidance_scale": 5.0},
        }
    )


def job(**body: object) -> ImageJob:
    request = parse(ImageGenerationRequest, {"model": "painter", "prompt": "a cat", **body})
    return request.to_job("id", entry())


def refusal(**body: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        job(**body)
    return caught.value


def test_values_that_the_node_sends_for_missing_fields_count_as_absent():
    made = job(n=0, size="", width=0, height=0, step=0, response_format="")
    assert (made.n, made.width, made.height, made.num_inference_steps) == (1, None, None, 20)
    assert (made.guidance_scale, made.strength, made.task) == (5.0, None, "generation")


def test_null_counts_as_absent():
    made = job(n=None, size=None, width=None, seed=None, negative_prompt=None, guidance_scale=None)
    assert made.n == 1 and made.width is None and made.seed is not None


@pytest.mark.parametrize(
    ("body", "sides"),
    [
        ({"size": "512x256"}, (512, 256)),
        ({"size": "512x256", "width": 128}, (128, 256)),
        ({"size": "512x256", "width": 128, "height": 64}, (128, 64)),
        ({"width": 128}, (128, None)),
        ({"size": "auto"}, (None, None)),
    ],
)
def test_width_and_height_win_over_size(body, sides):
    made = job(**body)
    assert (made.width, made.height) == sides


@pytest.mark.parametrize("name", ["step", "steps", "num_inference_steps"])
def test_every_name_of_the_step_count_is_accepted(name):
    assert job(**{name: 7}).num_inference_steps == 7
    assert refusal(**{name: 51}).param == name


def test_a_seed_is_chosen_when_none_is_given():
    seeds = {job().seed for _ in range(5)}
    assert len(seeds) == 5 and all(seed is not None and 0 <= seed < 2**32 for seed in seeds)
    assert job(seed=2**63 - 1).seed == 2**63 - 1
    assert job(seed=0).seed == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"negative_prompt": "\udfff"}, "negative_prompt"),
        ({"model": ""}, "model"),
        ({"model": 1}, "model"),
        ({"n": 10**9}, "n"),
        ({"n": 5}, "n"),
        ({"n": -1}, "n"),
        ({"n": "2"}, "n"),
        ({"n": "0"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 0.0}, "n"),
        ({"n": True}, "n"),
        ({"n": False}, "n"),
        ({"n": 10**40}, "n"),
        ({"size": "0x0"}, "size"),
        ({"size": "99999x1"}, "size"),
        ({"size": "abc"}, "size"),
        ({"size": "512×512"}, "size"),
        ({"size": "512x512 "}, "size"),
        ({"size": "5１２x512"}, "size"),
        ({"size": "-8x8"}, "size"),
        ({"size": "100x100"}, "size"),
        ({"size": "1024x1024"}, "size"),
        ({"size": 512}, "size"),
        ({"width": -8}, "width"),
        ({"width": 1032, "height": 8}, "width"),
        ({"width": 64, "height": 12}, "height"),
        ({"width": 1024, "height": 1024}, "width"),
        ({"height": "64"}, "height"),
        ({"step": -1}, "step"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": "7"}, "guidance_scale"),
        ({"guidance_scale": True}, "guidance_scale"),
        ({"response_format": "png"}, "response_format"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"stream": True, "partial_images": -1}, "partial_images"),
        ({"stream": True, "partial_images": True}, "partial_images"),
        ({"partial_images": 1}, "partial_images"),
        ({"stream": False, "partial_images": 3}, "partial_images"),
    ],
)
def test_an_error_names_the_invalid_field(body, param):
    error = refusal(**body)
    assert error.param == param and error.status == 400
    assert param in error.message and len(error.message) < 200


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_required_fields(missing):
    body = {"model": "painter", "prompt": "a"}
    del body[missing]
    with pytest.raises(InvalidRequest, match=f"^{missing} is required$"):
        parse(ImageGenerationRequest, body)


def test_messages_say_what_is_valid():
    assert refusal(n="2").message == "n must be a whole number, not a string"
    assert refusal(n=-1).message == "n must be at least 1 (it is -1)"
    assert refusal(n=9).message == "n must be at most 4 for this model (it is 9)"
    assert refusal(response_format="x").message == "response_format must be one of 'url' or 'b64_json'"
    assert refusal(size="1x").message == 'size: must be "WIDTHxHEIGHT" in pixels, like "1024x1024"'
    assert refusal(prompt="").message == "prompt: must not be empty"


def test_previews_are_part_of_a_stream():
    assert job(stream=True, partial_images=3, response_format="b64_json").partial_images == 3
    assert job(stream=True, response_format="").partial_images == 0
    for stream in (None, False):
        assert job(stream=stream, partial_images=0, response_format="url").partial_images == 0
    assert job(partial_images=None).partial_images == 0


def test_a_form_has_numbers_as_strings():
    fields = {
        "model": "painter",
        "prompt": "p",
        "n": "2",
        "width": "64",
        "strength": "0.5",
        "seed": "3",
        "extra": "x",
    }
    made = parse(ImageEditRequest, fields, strict=False).to_job("id", entry())
    assert (made.n, made.width, made.strength, made.seed) == (2, 64, 0.5, 3)
    assert made.task == "edit" and made.partial_images == 0
    streamed = parse(ImageEditRequest, fields | {"stream": "true", "partial_images": "2"}, strict=False)
    assert streamed.stream is True and streamed.to_job("id", entry()).partial_images == 2
    with pytest.raises(InvalidRequest, match="n must be a whole number"):
        parse(ImageEditRequest, fields | {"n": "two"}, strict=False)


def test_an_edit_without_strength_uses_the_default_of_the_catalogue():
    made = parse(ImageEditRequest, {"model": "painter", "prompt": "p"}).to_job("id", entry())
    assert made.strength == 0.6
    with pytest.raises(InvalidRequest) as caught:
        parse(ImageEditRequest, {"model": "painter", "prompt": "p", "strength": 0})
    assert caught.value.param == "strength"
