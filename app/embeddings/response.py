"""The response of the embeddings endpoint: OpenAI's list, with vectors as numbers or as base64."""

import sys
import time
from array import array
from base64 import b64encode
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

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


def embeddings_response(
    request_id: str,
    model: str,
    rows: list[bytes],
    usage: Usage,
    *,
    base64: bool,
    give_way: Callable[[], None],
) -> dict[str, Any]:
    """Return the body. `give_way` is called again and again, to let others run."""
    write = _base64 if base64 else _numbers
    data: list[msgspec.Raw] = []
    written = 0
    for index, row in enumerate(rows):
        item = {"object": "embedding", "index": index, "embedding": write(row)}
        data.append(msgspec.Raw(encode_json(item)))
        written += len(row) // 4
        if written >= NUMBERS_AT_ONCE:
            written = 0
            give_way()
    return {
        "code": 0,
        "message": "success",
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
    }


def _base64(row: bytes) -> str:
    return b64encode(row).decode()


def _numbers(row: bytes) -> list[float]:
    numbers = array("f", row)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
