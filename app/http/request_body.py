"""Reading a request's body: bounded in bytes and time, strict JSON, and which of its fields nobody knows."""

import re
from itertools import islice
from typing import Any

import msgspec
from flask import Request
from pydantic import BaseModel

from app.http.connection import read_body
from protocol.errors import InvalidRequest

_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_IGNORED = 20
MAX_LOOKED_AT = 1000
"""Fields of a body that are looked at for names to report: a body of a million fields shall not cost its sender's neighbours."""


def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The body as a JSON object. Raises InvalidRequest, PayloadTooLarge, RequestTimeout."""
    body = read_body(request.stream, request.content_length, limit)
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
    """Value of the header X-Ignored-Params: fields of the body that this end point doesn't know. Empty: all known."""
    known = set(model.model_fields)
    names = islice(given, MAX_LOOKED_AT)
    unknown = sorted(name for name in names if name not in known and _HEADER_SAFE.fullmatch(name))
    return ", ".join(unknown[:MAX_IGNORED])
