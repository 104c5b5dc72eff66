"""Request bodies: read with bounds on bytes and time, parsed as a JSON object, unknown fields reported."""

import re
import time
from itertools import islice
from typing import Any

import gevent
import msgspec
from flask import Request
from gunicorn.http.errors import ParseException
from pydantic import BaseModel

from protocol.errors import InvalidRequest, PayloadTooLarge, RequestTimeout

BODY_S = 10.0
BODY_BYTES_PER_S = 64 * 1024
MAX_IGNORED = 20
"""Names in the header X-Ignored-Params."""
MAX_LOOKED_AT = 1000
"""Fields of a body that are searched for unknown names: searching a million would delay other requests."""
_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def read_body(request: Request, limit: int) -> bytes:
    """Read the whole body of a request, at most `limit` bytes.

    A body may take `BODY_S` seconds plus the time that the bytes received so far need at `BODY_BYTES_PER_S`.
    The announced length does not count, so that a client gains no time by announcing much and sending little.

    Raises PayloadTooLarge, RequestTimeout, and InvalidRequest for a body that ends early or is badly chunked.
    """
    length = request.content_length
    if length is not None and length > limit:
        raise PayloadTooLarge(f"the body has {length} bytes; at most {limit} are accepted")
    began = time.monotonic()
    parts: list[bytes] = []
    total = 0
    while True:
        allowed_s = BODY_S + total / BODY_BYTES_PER_S
        too_slow = RequestTimeout(f"the body arrived too slowly: {total} bytes within {allowed_s:.0f} s")
        with gevent.Timeout(max(0.0, began + allowed_s - time.monotonic()), too_slow):
            try:
                part = request.stream.read(BODY_BYTES_PER_S)
            except (OSError, ParseException) as error:
                raise InvalidRequest("the body ended early or its chunks are not well-formed") from error
        if not part:
            return b"".join(parts)
        total += len(part)
        if total > limit:
            raise PayloadTooLarge(f"the body has more than {limit} bytes; at most {limit} are accepted")
        parts.append(part)


def read_json(request: Request, limit: int) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes. Raises InvalidRequest, PayloadTooLarge, RequestTimeout."""
    body = read_body(request, limit)
    if not body:
        raise InvalidRequest("the body is empty; it must be a JSON object")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def ignored_params(model: type[BaseModel], given: dict[str, Any]) -> str:
    """Return the value of the header X-Ignored-Params: the fields of a body that `model` does not have."""
    known = set(model.model_fields)
    names = islice(given, MAX_LOOKED_AT)
    unknown = sorted(name for name in names if name not in known and _HEADER_SAFE.fullmatch(name))
    return ", ".join(unknown[:MAX_IGNORED])
