"""What is done with every request and every response."""

import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, Response, request

from app.http.access_log import current_access
from app.http.request_body import wallet_sha256

_SLASHES = re.compile("/{2,}")
_VALID_ID = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
"""A client's own X-Request-Id: a token of HTTP, which has no space and no line break, so it can be logged."""


class PlainPaths:
    """WSGI middleware: `//v1//models/` is `/v1/models`, as base URLs with a slash too many make clients send
    it.

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


def name_request(request_id: str, model: str) -> None:
    """Name the current request, in the log and in its response, by its job and that job's model.

    Called before anything can fail that the log tells by this id.
    """
    access = current_access()
    access.request_id, access.model = request_id, model


def job_origin(given: dict[str, Any]) -> dict[str, str | None]:
    """Return the fields of a job that are none of the API: the node's `wallet`, hashed, and the request's
    span.

    `given`: the fields of the current request's body.
    """
    return {"wallet_sha256": wallet_sha256(given), "traceparent": current_access().traceparent}


def add_job_headers(response: Response, milliseconds: dict[str, int], ignored: str) -> None:
    """Tell the client the times of its job, and the fields of its body that have no effect.

    `milliseconds`: queued_ms becomes the header X-Queued-Ms. `ignored`: the value of X-Ignored-Params, "" for
    none (app.http.request_body.ignored_params).
    """
    for name, value in milliseconds.items():
        response.headers["X-" + name.replace("_", "-").title()] = str(value)
    if ignored:
        response.headers["X-Ignored-Params"] = ignored


def add_request_ids(app: Flask) -> None:
    """Give every response, errors too, the header X-Request-Id: the client's own if it is valid, else ours.

    Jobs, and what workers log, have our id in any case. The access log has both, and the route and status.
    """

    @app.after_request
    def add(response: Response) -> Response:
        access = current_access()
        access.request_id = access.request_id or f"req-{uuid.uuid4().hex}"
        access.status = response.status_code
        if request.url_rule is not None:
            access.route = request.url_rule.rule
        given = request.headers.get("X-Request-Id", "")
        if _VALID_ID.fullmatch(given):
            access.client_id = given
        response.headers["X-Request-Id"] = access.client_id or access.request_id
        return response
