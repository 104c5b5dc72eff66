"""app.embeddings.response: OpenAI's list from the vectors that workers send, in any order."""

import base64
import struct

import msgspec
import pytest

from app.embeddings.response import NUMBERS_AT_ONCE, collect_vectors, embeddings_body
from protocol import events
from protocol.errors import InternalError
from protocol.events import Envelope, Event, Finished, Started, Usage, Vectors

ROWS = [struct.pack("<2f", 0.5, -1.25), struct.pack("<2f", 0.1, 2), struct.pack("<2f", 3, 4)]
USAGE = Usage(7, 0)


def arriving() -> list[list[Event]]:
    return [[Started("w"), Vectors([2, 0], ROWS[2] + ROWS[0])], [], [Vectors([1], ROWS[1]), Finished(USAGE)]]


def test_vectors_are_collected_in_the_order_of_the_inputs() -> None:
    assert collect_vectors(arriving(), 3) == (ROWS, USAGE)


def test_a_missing_vector_is_an_error() -> None:
    with pytest.raises(InternalError):
        collect_vectors(arriving(), 4)


def test_the_bytes_of_vectors_pass_through_an_event() -> None:
    event = Vectors([3], bytes(range(256)))
    envelope = Envelope("r", 1, event)
    assert events.decode_readable([events.encode(envelope)]) == [envelope]
    # four characters for three bytes; as numbers they would take four times as many
    assert len(events.encode(envelope)) < 256 * 4 / 3 + 40
    assert not events.has_tokens(event) and not events.is_terminal(event)


@pytest.mark.parametrize("as_base64", [False, True], ids=["numbers", "base64"])
def test_the_body(as_base64: bool) -> None:
    answer = msgspec.json.decode(b"".join(embeddings_body("embd-1", "m", ROWS, USAGE, base64=as_base64)))
    assert answer.pop("created") > 0
    vectors = [item.pop("embedding") for item in answer["data"]]
    assert answer == {
        "code": 0,
        "message": "success",
        "id": "embd-1",
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": index} for index in range(3)],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    if as_base64:
        assert [base64.b64decode(vector) for vector in vectors] == ROWS
    else:
        assert vectors[0] == [0.5, -1.25]
        assert [struct.pack("<2f", *vector) for vector in vectors] == ROWS


@pytest.mark.parametrize("count", [1, 64, 193])
def test_a_large_body_is_made_in_parts(count: int) -> None:
    """2,048 vectors of 4,096 numbers have 170 MB as JSON."""
    row = bytes(4 * 1024)
    parts = list(embeddings_body("id", "m", [row] * count, USAGE, base64=True))
    assert len(parts) == count * 1024 // NUMBERS_AT_ONCE + 1
    assert max(map(len, parts)) < 1.5 * 4 * NUMBERS_AT_ONCE
    assert len(msgspec.json.decode(b"".join(parts))["data"]) == count
