"""The response of the embeddings endpoint: OpenAI's list, with vectors as numbers or as base64."""

import sys
import time
from array import array
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence

from app.http.json import encode_json
from protocol.errors import InternalError
from protocol.events import Event, Finished, Usage, Vectors

NUMBERS_AT_ONCE = 2**16
"""Vectors are written as JSON in parts of so many numbers. Other requests are served in between."""


def collect_vectors(batches: Iterable[list[Event]], count: int) -> tuple[list[bytes], Usage]:
    """Read all events of a request: the vectors of its `count` inputs (float32, little endian), and usage.

    Raises what `batches` raises, and InternalError if a vector is missing.
    """
    rows: dict[int, bytes] = {}
    usage = Usage(0, 0)
    for batch in batches:
        for event in batch:
            if isinstance(event, Vectors):
                size = len(event.data) // len(event.indices)
                for place, index in enumerate(event.indices):
                    rows[index] = event.data[place * size : (place + 1) * size]
            elif isinstance(event, Finished):
                usage = event.usage or usage
    if sorted(rows) != list(range(count)):
        raise InternalError
    return [rows[index] for index in range(count)], usage


def embeddings_body(
    request_id: str, model: str, rows: Sequence[bytes], usage: Usage, *, base64: bool
) -> Iterator[bytes]:
    """Yield the body in parts, each made when it is sent: as a whole it has five times the bytes of its
    vectors."""
    write = _base64 if base64 else _numbers
    head = {
        "code": 0,
        "message": "success",
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
    }
    part = [encode_json(head)[:-1], b',"data":[']
    numbers = 0
    for index, row in enumerate(rows):
        item = encode_json({"object": "embedding", "index": index, "embedding": write(row)})
        part += (b",", item) if index else (item,)
        numbers += len(row) // 4
        if numbers >= NUMBERS_AT_ONCE:
            yield b"".join(part)
            part, numbers = [], 0
    yield b"".join([*part, b"]}"])


def _base64(row: bytes) -> str:
    return b64encode(row).decode()


def _numbers(row: bytes) -> list[float]:
    numbers = array("f", row)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
