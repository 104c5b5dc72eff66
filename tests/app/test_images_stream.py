"""app.images.stream: the events of a streamed image request, and how the stream ends. No socket, no Redis."""

import json
from base64 import b64decode
from typing import Any

import pytest
import redis

from app.http.sse import COMMENT, COMMENT_AFTER_S, EventStream
from app.images.stream import ImageEncoder, ImageStream
from protocol.errors import DeadlineExceeded, InvalidImage, WorkerLost
from protocol.events import Event, Finished, ImagePreview, ImageReady, Progress, Started
from protocol.jobs import ImageJob
from tests.app.test_chat_response import Batches

JOB = ImageJob(id="img-1", model="painter", task="generation", prompt="a cat", seed=5, partial_images=2)
PREVIEW = ImagePreview(0, 0, 64, 32, name="preview")
IMAGE = ImageReady(0, 5, 64, 32, name="image")
STORED = {"preview": b"JPEG", "image": b"PNG", "other": b"PNG2"}


def stream(*batches: list[Event] | Exception, job: ImageJob = JOB, load: Any = STORED.get) -> list[bytes]:
    encoder = ImageEncoder(job, load=load, timings=lambda: {"total_ms": 9}, clock=lambda: 1767225600.5)
    images = ImageStream(Batches(batches), encoder)
    return list(EventStream(images.next_frames, lambda: None, lambda error: None, lambda: 0.0, typed=True))


def events(parts: list[bytes]) -> list[tuple[str, Any]]:
    """The events as (type, data), without comments."""
    found = []
    for part in b"".join(parts).split(b"\n\n")[:-1]:
        if not part.startswith(b":"):
            name, data = part.split(b"\n")
            found.append((name.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))))
    return found


USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@pytest.mark.parametrize(("task", "kind"), [("generation", "image_generation"), ("edit", "image_edit")])
def test_a_stream_has_openais_events(task: Any, kind: str) -> None:
    job = ImageJob(id="img-1", model="painter", task=task, prompt="a cat", partial_images=1)
    batches: list[list[Event]] = [[Started("g:1")], [Progress(1, 2), PREVIEW], [], [IMAGE, Finished()]]
    parts = stream(*batches, job=job)
    assert parts[0] == b": step 1 of 2\n\n"
    common = {
        "created_at": 1767225600,
        "size": "64x32",
        "quality": "auto",
        "background": "opaque",
        "image_index": 0,
    }
    assert [(name, data | {"b64_json": b64decode(data["b64_json"])}) for name, data in events(parts)] == [
        (
            f"{kind}.partial_image",
            {
                "type": f"{kind}.partial_image",
                "b64_json": b"JPEG",
                "output_format": "jpeg",
                "partial_image_index": 0,
                **common,
            },
        ),
        (
            f"{kind}.completed",
            {
                "type": f"{kind}.completed",
                "b64_json": b"PNG",
                "output_format": "png",
                "seed": 5,
                "usage": USAGE,
                "timings": {"total_ms": 9},
                **common,
            },
        ),
    ]
    assert not any(b"[DONE]" in part for part in parts)


def test_several_images_say_which_they_are_and_the_last_has_the_timings() -> None:
    job = ImageJob(id="img-1", model="painter", task="generation", prompt="a cat", n=2)
    other = ImageReady(1, 6, 64, 32, name="other")
    found = [data for _, data in events(stream([other], [IMAGE, Finished()], job=job))]
    assert [(data["image_index"], data["seed"], "timings" in data) for data in found] == [
        (1, 6, False),
        (0, 5, True),
    ]


def test_large_images_are_sent_one_by_one() -> None:
    job = ImageJob(id="img-1", model="painter", task="generation", prompt="a cat", n=2)
    parts = stream([IMAGE, ImageReady(1, 6, 64, 32, name="other"), Finished()], job=job)
    assert [part.count(b"event:") for part in parts] == [1, 1]


def test_an_error_before_the_first_step_is_none_of_the_stream() -> None:
    with pytest.raises(InvalidImage):
        stream([Started("g:1")], [], InvalidImage("image is damaged", param="image"))


@pytest.mark.parametrize("error", [WorkerLost(), DeadlineExceeded()])
def test_an_error_after_the_first_step_is_an_event_and_the_last(error: Any) -> None:
    found = events(stream([Progress(1, 9)], [PREVIEW], error))
    assert [name for name, _ in found] == ["image_generation.partial_image", "error"]
    last = found[-1][1]
    assert last["code"] == error.status and last["error"]["code"] == error.code


def fails(name: str) -> bytes | None:
    raise redis.ConnectionError


def lost(name: str) -> bytes | None:
    return None


@pytest.mark.parametrize("load", [fails, lost])
def test_a_preview_that_is_lost_is_left_out(load: Any) -> None:
    def only_images(name: str) -> bytes | None:
        return load(name) if name == "preview" else STORED[name]

    parts = stream([PREVIEW, ImagePreview(0, 1, 64, 32)], [IMAGE, Finished()], load=only_images)
    assert [name for name, _ in events(parts)] == ["image_generation.completed"]


@pytest.mark.parametrize(("load", "code"), [(fails, "queue_unavailable"), (lost, "unavailable")])
def test_an_image_that_is_lost_is_an_error(load: Any, code: str) -> None:
    ((name, data),) = events(stream([Progress(1, 1)], [IMAGE, Finished()], load=load))
    assert (name, data["error"]["code"]) == ("error", code)


def test_a_silent_stream_is_kept_alive() -> None:
    encoder = ImageEncoder(JOB, load=STORED.get, timings=dict)
    batches: list[list[Event]] = [[Progress(1, 9)], *([[]] * 20), [IMAGE, Finished()]]
    images = ImageStream(Batches(batches), encoder)
    seconds = iter(range(1000))
    body = EventStream(
        images.next_frames, lambda: None, lambda error: None, lambda: float(next(seconds)), typed=True
    )
    parts = list(body)
    assert 20 / (COMMENT_AFTER_S + 1) - 1 <= parts.count(COMMENT) <= 20 / COMMENT_AFTER_S
