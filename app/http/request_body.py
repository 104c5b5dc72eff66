"""Request bodies: read with bounds on bytes and time, parsed as a JSON object, unknown fields reported."""

import hashlib
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import gevent
import msgspec
from flask import Request
from gunicorn.http.errors import ParseException
from pydantic import BaseModel

from protocol.errors import (
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
)

BODY_S = 10.0
BODY_BYTES_PER_S = 64 * 1024
STALLED_S = 10.0
"""A body of which no further BODY_BYTES_PER_S bytes arrive for so long is refused."""
BYTES_IN_FLIGHT = 256 * 2**20
"""Of all bodies that one process holds: forty large uploads that never end must not fill its memory."""
MAX_IGNORED = 20
"""Paths in the header X-Ignored-Params."""
MAX_LOOKED_AT = 1000
"""Fields of a body that are searched for unknown names: searching a million would delay other requests."""
MAX_OPENINGS = 2**19
"""Brackets and braces that open something in a JSON body, those in strings included. The garbage collector
looks at each list again and again while the body is parsed: 8 MiB of them would stop all requests for
seconds."""
_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BOM = b"\xef\xbb\xbf"


class BodyBudget:
    """The bytes of request bodies, and of images downloaded for them, that this process holds.

    For greenlets: not safe for threads.
    """

    def __init__(self, limit: int = BYTES_IN_FLIGHT) -> None:
        self._free = limit

    def take(self, count: int) -> None:
        """Raises Overloaded when no more fit."""
        if count > self._free:
            raise Overloaded("too many large bodies are being received; try again soon", retry_after_s=5)
        self._free -= count

    def give_back(self, count: int) -> None:
        self._free += count


class BodyReader:
    """Reads the bodies of requests within the process's budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget

    @contextmanager
    def read(self, request: Request, limit: int) -> Iterator[bytes]:
        """The whole body of a request, decompressed, at most `limit` bytes.

        It counts until the block is left.

        A body may take `BODY_S` seconds plus the time that the bytes received so far need at
        `BODY_BYTES_PER_S`. The announced length does not count, so that a client gains no time by announcing
        much and sending little.

        Raises PayloadTooLarge, RequestTimeout, UnsupportedMediaType, Overloaded, and InvalidRequest for a
        body that ends early, is badly chunked or can't be decompressed.
        """
        with self.hold() as take:
            body = _receive(request, limit, take)
            if encoding := request.headers.get("Content-Encoding", "identity").strip().lower():
                body = _decompress(body, encoding, limit, take)
            yield body

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that takes bytes of the budget, which are given back when the block is left.

        It raises Overloaded when no more fit.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            self._budget.take(count)
            taken += count

        try:
            yield take
        finally:
            self._budget.give_back(taken)


def _receive(request: Request, limit: int, take: Callable[[int], None]) -> bytes:
    length = request.content_length
    if length is not None and length > limit:
        raise PayloadTooLarge(f"the body has {length} bytes; at most {limit} are accepted")
    began = time.monotonic()
    parts: list[bytes] = []
    total = 0
    while True:
        allowed_s = BODY_S + total / BODY_BYTES_PER_S
        left_s = max(0.0, min(STALLED_S, began + allowed_s - time.monotonic()))
        too_slow = RequestTimeout(
            f"the body arrived too slowly: {total} bytes in {time.monotonic() - began:.0f} s"
        )
        with gevent.Timeout(left_s, too_slow):
            try:
                part = request.stream.read(BODY_BYTES_PER_S)
            except (OSError, ParseException) as error:
                raise InvalidRequest("the body ended early or its chunks are not well-formed") from error
        if not part:
            return b"".join(parts)
        total += len(part)
        if total > limit:
            raise PayloadTooLarge(f"the body has more than {limit} bytes; at most {limit} are accepted")
        take(len(part))
        parts.append(part)
        if total == length:
            return b"".join(parts)


def _decompress(body: bytes, encoding: str, limit: int, take: Callable[[int], None]) -> bytes:
    """Decompress at most `limit` bytes: a small body may hold gigabytes."""
    if encoding == "identity":
        return body
    window = {"gzip": 31, "x-gzip": 31, "deflate": 15}.get(encoding)
    if window is None:
        raise UnsupportedMediaType(
            f"Content-Encoding {encoding[:20]!r} is not supported; send the body as it is, or with gzip or deflate"
        )
    parts: list[bytes] = []
    total = 0
    stream = zlib.decompressobj(window)
    try:
        while not stream.eof:
            part = stream.decompress(body, BODY_BYTES_PER_S)
            body = stream.unconsumed_tail
            if not part and not body:
                break
            total += len(part)
            if total > limit:
                raise PayloadTooLarge(
                    f"the decompressed body has more than {limit} bytes; at most {limit} are accepted"
                )
            take(len(part))
            parts.append(part)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not {encoding} as its Content-Encoding says") from error
    if not stream.eof:
        raise InvalidRequest(f"the {encoding} body ends early")
    return b"".join(parts)


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object, with or without a byte order mark. Raises InvalidRequest."""
    body = body.removeprefix(_BOM)
    if not body:
        raise InvalidRequest("the body is empty; it must be a JSON object")
    if (openings := body.count(b"[") + body.count(b"{")) > MAX_OPENINGS:
        raise InvalidRequest(
            f"the body has {openings} opening brackets and braces; at most {MAX_OPENINGS} are accepted"
        )
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def wallet_sha256(given: Mapping[str, Any]) -> str | None:
    """Return the hash of the field `wallet`, which the node sends for its user, for receipts; None without
    one.

    The wallet itself is not kept.
    """
    wallet = given.get("wallet")
    if not isinstance(wallet, str) or not wallet:
        return None
    return hashlib.sha256(wallet.encode(errors="surrogatepass")).hexdigest()


def ignored_params(body: BaseModel, given: Mapping[str, Any]) -> str:
    """Return the value of the header X-Ignored-Params: the fields that were sent and that the models of
    `body` do not have, as paths ("messages[1].mood")."""
    paths = sorted(islice(_unknown(body, given, ""), MAX_IGNORED))
    return ", ".join(paths)


def _unknown(model: BaseModel, given: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The paths of unknown fields. Looks at no more than MAX_LOOKED_AT fields of each object or list."""
    known = {field.alias or name: name for name, field in type(model).model_fields.items()}
    for name in islice(given, MAX_LOOKED_AT):
        if name not in known and _HEADER_SAFE.fullmatch(name):
            yield prefix + name
    for name, attribute in known.items():
        value, raw = getattr(model, attribute), given.get(name)
        if isinstance(value, BaseModel) and isinstance(raw, Mapping):
            yield from _unknown(value, raw, f"{prefix}{name}.")
        elif isinstance(value, list) and isinstance(raw, list):
            for place, (item, of_item) in enumerate(islice(zip(value, raw, strict=False), MAX_LOOKED_AT)):
                if isinstance(item, BaseModel) and isinstance(of_item, Mapping):
                    yield from _unknown(item, of_item, f"{prefix}{name}[{place}].")
