"""app.images.response: the standard's body for finished images."""

import pytest

from app.images.response import collect_images, images_response, images_response_base64
from protocol.errors import Unavailable
from protocol.events import Finished, ImageReady, Progress
from protocol.jobs import ImageJob

JOB = ImageJob(id="id", model="painter", task="generation", prompt="a cat", seed=5)
FIRST = ImageReady(0, 5, 8, 8, name="first")
SECOND = ImageReady(1, 6, 8, 8, name="second")


def test_images_are_collected_in_the_order_of_their_index() -> None:
    assert collect_images([[Progress(1, 1), SECOND], [], [FIRST, Finished()]]) == [FIRST, SECOND]


def test_the_body_with_links() -> None:
    assert images_response(12, JOB, [FIRST, SECOND], link=lambda name: f"http://h/{name}") == {
        "code": 0,
        "message": "success",
        "created": 12,
        "data": [
            {"b64_json": "", "url": "http://h/first", "revised_prompt": "a cat", "seed": 5},
            {"b64_json": "", "url": "http://h/second", "revised_prompt": "a cat", "seed": 6},
        ],
    }


def test_the_body_with_files() -> None:
    stored = {"first": b"\x00\x01", "second": b"\x02"}
    body = images_response_base64(12, JOB, [FIRST, SECOND], load=stored.get)
    assert [(row["b64_json"], row["url"]) for row in body["data"]] == [("AAE=", ""), ("Ag==", "")]


def test_an_evicted_image_is_an_error() -> None:
    with pytest.raises(Unavailable, match="evicted"):
        images_response_base64(12, JOB, [FIRST, SECOND], load={"first": b"\x00"}.get)
