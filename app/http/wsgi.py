"""What is done with every request and every response."""

import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, Response, g

_SLASHES = re.compile("/{2,}")


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
    """Name the current request in its response. Called before anything can fail that the log tells by this id."""
    g.request_id = request_id


def add_request_ids(app: Flask) -> None:
    """Give every response, errors too, the header X-Request-Id."""

    @app.after_request
    def add(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.get("request_id") or f"req-{uuid.uuid4().hex}"
        return response
