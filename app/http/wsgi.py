"""What is done with every request and every response."""

import logging
import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, Response, g, request

log = logging.getLogger(__name__)

_SLASHES = re.compile("/{2,}")
_VALID_ID = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
"""A client's own X-Request-Id: a token of HTTP, which has no space and no line break, so it can be logged."""


class PlainPaths:
    """WSGI middleware: `//v1//models/` is `/v1/models`, as base URLs with a slash too many make clients send it.

    A SCRIPT_NAME, which a peer could set by a header of that name, does not move the endpoints.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if "//" in path or path.endswith("/"):
            environ["PATH_INFO"] = _SLASHES.sub("/", path).rstrip("/") or "/"
        environ["SCRIPT_NAME"] = ""
        return self._app(environ, start_response)


def set_request_id(request_id: str) -> None:
    """Name the current request in its response, unless its client has named it.

    Called before anything can fail that the log tells by this id.
    """
    g.request_id = request_id


def add_request_ids(app: Flask) -> None:
    """Give every response, errors too, the header X-Request-Id: the client's own if it is valid, else ours.

    Jobs, and what workers log, have our id in any case. If a job fails, the log has both.
    """

    @app.after_request
    def add(response: Response) -> Response:
        given, ours = request.headers.get("X-Request-Id", ""), g.get("request_id")
        if not _VALID_ID.fullmatch(given):
            response.headers["X-Request-Id"] = ours or f"req-{uuid.uuid4().hex}"
            return response
        response.headers["X-Request-Id"] = given
        if ours and response.status_code >= 400:
            log.info("request %s, to its client %s, was answered with %d", ours, given, response.status_code)
        return response
