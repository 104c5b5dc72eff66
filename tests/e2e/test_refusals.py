"""Invalid requests: each gets a 4xx that names the fault, in the one error body."""

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from tests.deployment import Deployment
from tests.e2e.conftest import CHAT, SHAPES

HI = [{"role": "user", "content": "Hi"}]


def check_error(status: int, answer: Any, expected: int, *words: str) -> None:
    assert status == expected, answer
    assert answer["code"] == expected
    assert answer["error"]["message"] == answer["message"]
    assert {"message", "type", "param", "code"} == answer["error"].keys()
    for word in words:
        assert word in answer["message"], answer["message"]


CHATS: list[tuple[str, dict[str, Any], int, str]] = [
    ("unknown model", {"model": "x", "messages": HI}, 404, "demo-chat"),
    ("image model", {"model": SHAPES, "messages": HI}, 400, "chat"),
    ("no model", {"messages": HI}, 400, "model"),
    ("no messages", {"model": CHAT}, 400, "messages"),
    ("null messages", {"model": CHAT, "messages": None}, 400, "messages"),
    ("empty messages", {"model": CHAT, "messages": []}, 400, "messages"),
    ("messages of a wrong type", {"model": CHAT, "messages": "Hi"}, 400, "messages"),
    ("a message of a wrong type", {"model": CHAT, "messages": ["Hi"]}, 400, "messages.0"),
    ("unknown role", {"model": CHAT, "messages": [{"role": "narrator", "content": "Hi"}]}, 400, "role"),
    ("no content", {"model": CHAT, "messages": [{"role": "user"}]}, 400, "content"),
    ("an image part", {"model": CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    ("an image", {"model": CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]}, 400, "takes no images"),
    ("stream of a wrong type", {"model": CHAT, "messages": HI, "stream": "yes"}, 400, "stream"),
    ("max_tokens 0", {"model": CHAT, "messages": HI, "max_tokens": 0}, 400, "max_tokens"),
    ("temperature below 0", {"model": CHAT, "messages": HI, "temperature": -0.1}, 400, "temperature"),
    ("temperature as text", {"model": CHAT, "messages": HI, "temperature": "1"}, 400, "temperature"),
    ("top_p below 0", {"model": CHAT, "messages": HI, "top_p": -0.1}, 400, "top_p"),
    ("n 0", {"model": CHAT, "messages": HI, "n": 0}, 400, "n"),
    ("an empty stop", {"model": CHAT, "messages": HI, "stop": ""}, 400, "stop"),
    ("bias for no token", {"model": CHAT, "messages": HI, "logit_bias": {"a": 1}}, 400, "logit_bias"),
    ("too long a prompt", {"model": CHAT, "messages": [{"role": "user", "content": "word " * 9000}]}, 400, "4096"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "word"), [case[1:] for case in CHATS], ids=[c[0] for c in CHATS])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_chat(demo: Deployment, body: dict[str, Any], status: int, word: str, stream: bool) -> None:
    check_error(*demo.post("/v1/chat/completions", {"stream": stream, **body}), status, word)


IMAGES: list[tuple[str, dict[str, Any], int, str]] = [
    ("unknown model", {"model": "x"}, 404, SHAPES),
    ("chat model", {"model": CHAT}, 400, "generation"),
    ("n of a billion", {"n": 10**9}, 400, "n"),
    ("n below 0", {"n": -1}, 400, "n"),
    ("size 0x0", {"size": "0x0"}, 400, "size"),
    ("size 99999x1", {"size": "99999x1"}, 400, "size"),
    ("size abc", {"size": "abc"}, 400, "size"),
    ("width below 0", {"width": -64}, 400, "width"),
    ("more pixels than it can generate", {"size": "1792x1024"}, 400, "512"),
    ("a prompt that would be cut off", {"prompt": "a red circle " * 20}, 400, "62 tokens"),
    ("a million steps", {"step": 10**6}, 400, "step"),
    ("no prompt", {"prompt": None}, 400, "prompt"),
    ("an empty prompt", {"prompt": ""}, 400, "prompt"),
    ("unknown response_format", {"response_format": "gif"}, 400, "response_format"),
]


@pytest.mark.parametrize(
    ("change", "status", "word"), [case[1:] for case in IMAGES], ids=[c[0] for c in IMAGES]
)
def test_generations(demo: Deployment, change: dict[str, Any], status: int, word: str) -> None:
    body = {"model": SHAPES, "prompt": "a red circle", **change}
    check_error(*demo.post("/v1/images/generations", body), status, word)


@pytest.mark.parametrize(
    ("image", "word"),
    [
        ("bm8gcGljdHVyZQ==", "PNG"),
        ("data:image/png;base64,AAAA", "PNG"),
        ("%%%", "image"),
        ("http://127.0.0.1:1/x.png", "image"),
        ("file:///etc/passwd", "image"),
        (None, "image"),
        (7, "image"),
    ],
)
def test_edits_without_a_valid_image(demo: Deployment, image: Any, word: str) -> None:
    body = {"model": SHAPES, "prompt": "a red circle", "image": image}
    check_error(*demo.post("/v1/images/edits", body), 400, word)


def test_an_edit_whose_derived_side_is_too_long(demo: Deployment) -> None:
    png = io.BytesIO()
    Image.new("RGB", (1, 500)).save(png, "PNG")
    image = base64.b64encode(png.getvalue()).decode()
    body = {"model": SHAPES, "prompt": "a red circle", "image": image, "width": 64}
    check_error(*demo.post("/v1/images/edits", body), 400, "64x32000")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b'{"model": NaN}', b"\xff\xfe", b'{"a":' * 5000],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_not_a_json_object(demo: Deployment, path: str, body: bytes) -> None:
    check_error(*demo.post(path, body), 400)


def test_a_body_too_large(demo: Deployment) -> None:
    body = json.dumps(
        {"model": CHAT, "messages": [{"role": "user", "content": "x" * (8 * 2**20 + 1)}]}
    ).encode()
    check_error(*demo.post("/v1/chat/completions", body), 413, "bytes")


def test_errors_of_the_framework_have_the_same_body(demo: Deployment) -> None:
    check_error(*demo.get("/nothing/here"), 404)
    check_error(*demo.get("/v1/chat/completions"), 405)
    check_error(*demo.post("/v1/models", {}), 405)
    check_error(*demo.get("/v1/images/files/unknown"), 404)


def test_unknown_fields_are_named_and_ignored(demo: Deployment) -> None:
    body = {"model": CHAT, "messages": HI, "max_tokens": 1, "wallet": "0x1", "hash": "h"}
    response, connection = demo.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert response.status == 200
    assert response.headers["X-Ignored-Params"] == "hash, wallet"
    connection.close()
