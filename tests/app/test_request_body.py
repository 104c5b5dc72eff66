"""app.http.request_body: bounds of bodies, encodings, and which unknown fields are reported."""

import gzip
import hashlib
import json
import zlib
from typing import Any

import pytest
from flask import Flask, request
from pydantic import BaseModel

from app.chat.schema import ChatCompletionRequest
from app.http.request_body import (
    MAX_OPENINGS,
    BodyBudget,
    BodyReader,
    ignored_params,
    parse_json,
    wallet_sha256,
)
from app.http.validation import parse
from app.image_input.source import counted
from protocol.errors import InvalidRequest, Overloaded, PayloadTooLarge, UnsupportedMediaType

flask_app = Flask(__name__)
LIMIT = 10_000
TEXT = b'{"a": 1}'


def read(data: bytes, encoding: str | None = None, budget: BodyBudget | None = None) -> bytes:
    headers = {"Content-Encoding": encoding} if encoding else {}
    with flask_app.test_request_context("/", method="POST", data=data, headers=headers):
        with BodyReader(budget or BodyBudget()).read(request, LIMIT) as body:
            return body


def test_a_wallet_is_known_by_its_hash_alone() -> None:
    assert wallet_sha256({"wallet": "w"}) == hashlib.sha256(b"w").hexdigest()
    assert wallet_sha256({"wallet": "\ud800"}) is not None, "whatever it is, the request is served"
    for given in ({}, {"wallet": ""}, {"wallet": None}, {"wallet": ["w"]}, {"wallet": 1}):
        assert wallet_sha256(given) is None


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (TEXT, None),
        (TEXT, "identity"),
        (gzip.compress(TEXT), "gzip"),
        (gzip.compress(TEXT), "X-GZIP"),
        (zlib.compress(TEXT), "deflate"),
    ],
    ids=["no encoding", "identity", "gzip", "x-gzip", "deflate"],
)
def test_compressed_bodies_are_read(data: bytes, encoding: str | None) -> None:
    assert parse_json(read(data, encoding)) == {"a": 1}


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_small_body_that_holds_much_is_refused(encoding: str) -> None:
    large = b"0" * 10_000_000
    data = gzip.compress(large) if encoding == "gzip" else zlib.compress(large)
    assert len(data) <= LIMIT * 2
    with pytest.raises(PayloadTooLarge):
        read(data[:LIMIT], encoding)


@pytest.mark.parametrize("data", [TEXT, gzip.compress(TEXT)[:-4], b""], ids=["plain", "cut", "empty"])
def test_what_is_not_compressed_as_it_says_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(data, "gzip")


def test_another_encoding_is_named_in_a_415() -> None:
    with pytest.raises(UnsupportedMediaType, match="'br'") as error:
        read(TEXT, "br")
    assert error.value.status == 415


def test_a_byte_order_mark_is_no_content() -> None:
    assert parse_json(b"\xef\xbb\xbf" + TEXT) == {"a": 1}


@pytest.mark.parametrize("item", [b"[]", b"{}", b'"["'])
def test_a_body_has_a_bounded_number_of_lists_and_objects(item: bytes) -> None:
    most = b'{"a": [' + b",".join([item] * (MAX_OPENINGS - 2)) + b"]}"
    assert len(parse_json(most)["a"]) == MAX_OPENINGS - 2
    with pytest.raises(InvalidRequest, match="opening brackets and braces"):
        parse_json(most.replace(item, item + b"," + item, 1))


def test_all_bodies_together_have_a_bound_and_give_their_bytes_back() -> None:
    budget = BodyBudget(limit=100)
    with flask_app.test_request_context("/", method="POST", data=b"x" * 60):
        with BodyReader(budget).read(request, LIMIT):
            with pytest.raises(Overloaded):
                read(b"x" * 60, budget=budget)
            assert read(b"x" * 40, budget=budget)
    assert read(b"x" * 100, budget=budget)
    with pytest.raises(Overloaded):
        read(gzip.compress(b"x" * 1000), "gzip", budget)
    assert read(b"x" * 100, budget=budget), "what was refused has given its bytes back"


def ignored(**body: Any) -> str:
    given = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **body}
    return ignored_params(parse(ChatCompletionRequest, given), given)


def test_unknown_fields_are_reported_wherever_they_are() -> None:
    assert ignored() == ""
    assert ignored(user="u", metadata={"a": 1}) == "metadata, user"
    assert ignored(stream_options={"include_usage": True, "x": 1}) == "stream_options.x"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", "x": 1}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1", "mood": "good"},
    ]
    assert ignored(messages=messages) == (
        "messages[0].content[0].cache_control, messages[1].tool_calls[0].function.x, messages[2].mood"
    )


def test_names_that_a_header_can_not_carry_are_left_out() -> None:
    assert ignored(**{"a\r\nb": 1, "é": 1, "x" * 65: 1, "fine": 1}) == "fine"


def test_the_search_for_unknown_fields_is_bounded() -> None:
    class Wide(BaseModel):
        known: int = 0

    many = {f"f{number}": 1 for number in range(100_000)}
    assert len(ignored_params(Wide(), many).split(", ")) == 20
    assert json.dumps(many)


def test_downloaded_images_count_until_the_block_is_left() -> None:
    reader = BodyReader(BodyBudget(10))
    with reader.hold() as take:
        fetch = counted(lambda url, param: b"1234567", take)
        assert fetch("https://h/a.png", "image") == b"1234567"
        with pytest.raises(Overloaded):
            fetch("https://h/a.png", "image")
    with reader.hold() as take:
        take(10)
