"""Every example call of docs/standard.md, and the same calls as the node sends them (docs/node.md)."""

import json
import re
import urllib.request
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.check import dominant_colour
from tests.deployment import Deployment, wait_until
from tests.e2e.conftest import CHAT, PROJECT, SHAPES
from tests.stand_in_caller import Stream
from tests.stand_in_node import StandInNode

HELLO = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello!"},
]


def download(url: str) -> Image.Image:
    """Fetch the PNG at a link; the response must say that it is one and nothing else."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        return Image.open(BytesIO(answer.read())).convert("RGB")


def png(colour: str, side: int = 64) -> bytes:
    data = BytesIO()
    Image.new("RGB", (side, side), colour).save(data, "PNG")
    return data.getvalue()


def test_chat_plain(demo: Deployment) -> None:
    status, answer = demo.post("/v1/chat/completions", {"model": CHAT, "messages": HELLO, "stream": False})
    assert status == 200
    assert answer["code"] == 0
    assert answer["message"] == "success"
    assert type(answer["created"]) is int
    assert answer["model"] == CHAT
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant"
    assert "hello" in choice["message"]["content"].lower()
    usage = answer["usage"]
    assert usage["prompt_tokens"] > 0 < usage["completion_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chat_streamed_chunk_by_chunk(demo: Deployment) -> None:
    body = {"model": CHAT, "messages": HELLO, "stream": True, "temperature": 0}
    response, connection = demo.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    lines = response.read().decode().split("\n\n")
    connection.close()
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks: list[dict[str, Any]] = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", chunks[0]["id"])
    for chunk in chunks:
        assert {name: chunk[name] for name in ("id", "object", "created", "model")} == {
            "id": chunks[0]["id"],
            "object": "chat.completion.chunk",
            "created": chunks[0]["created"],
            "model": CHAT,
        }
    first, *middle, last = chunks
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant"}, "logprobs": None, "finish_reason": None}
    ]
    for chunk in middle:
        (choice,) = chunk["choices"]
        assert choice.keys() == {"index", "delta", "logprobs", "finish_reason"}
        assert choice["delta"].keys() == {"content"}
        assert "usage" not in chunk
    (choice,) = last["choices"]
    assert choice["delta"] == {"content": ""}
    assert choice["finish_reason"] == "stop"
    assert type(choice["stop_reason"]) is int
    assert (
        last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    )
    joined = "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle)
    plain = demo.post("/v1/chat/completions", {"model": CHAT, "messages": HELLO, "temperature": 0})[1]
    assert joined == plain["choices"][0]["message"]["content"], (
        "the plain answer and the joined stream must be equal"
    )


@pytest.mark.parametrize("how", ["size", "width and height", "nothing"])
def test_generations(demo: Deployment, how: str) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "size": {"size": "64x96"},
        "width and height": {"size": "1024x1024", "width": 64, "height": 96},
        "nothing": {"size": "", "width": 0, "height": 0, "n": 0, "step": 0, "response_format": ""},
    }
    body = {"model": SHAPES, "prompt": "a red circle", "n": 2, "seed": 1, **sizes[how]}
    status, answer = demo.post("/v1/images/generations", body)
    assert status == 200, answer
    assert answer["code"] == 0
    assert answer["message"] == "success"
    assert type(answer["created"]) is int
    assert len(answer["data"]) == (1 if how == "nothing" else 2)
    for row in answer["data"]:
        assert row["b64_json"] == ""
        assert download(row["url"]).size == ((64, 64) if how == "nothing" else (64, 96))


def test_edits_as_json_with_a_link_to_a_generated_image(demo: Deployment) -> None:
    generated = demo.post("/v1/images/generations", {"model": SHAPES, "prompt": "a red circle", "seed": 3})[1]
    body = {
        "model": SHAPES,
        "image": generated["data"][0]["url"],
        "prompt": "a blue circle",
        "n": 2,
        "seed": 3,
    }
    status, answer = demo.post("/v1/images/edits", body)
    assert status == 200, answer
    assert len(answer["data"]) == 2
    assert dominant_colour(download(answer["data"][0]["url"])) == "blue"


def test_models(demo: Deployment) -> None:
    status, answer = demo.get("/v1/models")
    assert status == 200
    assert answer["project"] == PROJECT
    assert answer["object"] == "list"
    rows = {(row["model"], row["url"].removeprefix(demo.url)) for row in answer["data"]}
    assert rows == {
        (CHAT, "/v1/chat/completions"),
        (SHAPES, "/v1/images/generations"),
    }
    shapes = next(row for row in answer["data"] if row["id"] == SHAPES)
    assert shapes["endpoints"]["edit"] == demo.url + "/v1/images/edits"
    assert all(row["object"] == "model" and row["id"] == row["model"] for row in answer["data"])
    assert [row["id"] for row in answer["data"]] == [CHAT, SHAPES], (
        "each model has one row, however many workers"
    )
    for row in answer["data"]:
        assert row["max_model_len"] == (4096 if row["id"] == CHAT else None)
        assert demo.get(f"/v1/models/{row['id']}") == (200, {"code": 0, "message": "success", **row})


# ----- calls of the node


def test_the_node_knows_three_workers(demo: Deployment, node: StandInNode) -> None:
    entries = node.entries(PROJECT)
    registered = sorted(
        (entry["model"], entry["type"], entry["api"].removeprefix(demo.url)) for entry in entries
    )
    assert registered == [
        (CHAT, 0, "/v1/chat/completions"),
        (CHAT, 0, "/v1/chat/completions"),
        (SHAPES, 1, "/v1/images/generations"),
    ]
    assert len({entry["cid"] for entry in entries}) == 3
    # What a worker told the node shows once the web process has looked at the leases again.
    wait_until(
        lambda: all(row["registered"] and not row["last_error"] for row in demo.worker_rows()),
        timeout_s=10,
        what="all three show as registered",
    )


def test_the_node_chats(demo: Deployment, node: StandInNode) -> None:
    answer = node.call_chat(PROJECT, CHAT, HELLO, wallet="0x1", signature="s", hash="h")
    assert answer.code == 0
    assert "hello" in answer.text.lower()
    stream = node.call_stream(PROJECT, CHAT, HELLO)
    assert isinstance(stream, Stream)
    assert stream.done
    assert "hello" in stream.text.lower()


def test_the_node_sees_errors_as_errors(demo: Deployment, node: StandInNode) -> None:
    assert node.call_chat(PROJECT, CHAT, None).code == 400
    refused = node.call_stream(PROJECT, CHAT, [])
    assert not isinstance(refused, Stream)
    assert refused.code == 400
    assert node.call_image(PROJECT, SHAPES, "a red circle", n=10**9).code == 400
    assert node.call_image(PROJECT, SHAPES, "a red circle", width=-5).code == 400


def test_the_node_generates_and_edits_at_one_url(demo: Deployment, node: StandInNode) -> None:
    generated = node.call_image(PROJECT, SHAPES, "a green square")
    assert generated.code == 0
    assert download(generated.body["data"][0]["url"]).size == (64, 64)
    edited = node.call_edit(PROJECT, SHAPES, png("white"), prompt="a blue square")
    assert edited.code == 0
    assert download(edited.body["data"][0]["url"]).size == (64, 64)


def test_the_node_edits_under_a_mask(demo: Deployment, node: StandInNode) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (16, 16, 48, 48))
    data = BytesIO()
    mask.save(data, "PNG")
    edited = node.call_edit(PROJECT, SHAPES, png("white"), mask=data.getvalue(), prompt="a red square")
    assert edited.code == 0
    result = download(edited.body["data"][0]["url"])
    corners = [np.asarray(result)[y, x] for x, y in ((2, 2), (61, 2), (2, 61), (61, 61))]
    assert np.min(corners) > 240, "nothing may change outside the mask"
