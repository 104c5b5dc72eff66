"""JSON responses and the body that every error has, Flask's own error pages included.

`Content-Type` is exactly `application/json` and `code` is a non-zero integer, because the node reads these
and ignores the HTTP status.
"""

import logging
import traceback
from typing import Any

from flask import Flask, Response
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WrongMethod

from app.http.access_log import current_access
from app.http.json import encode_json
from protocol.connections import QUEUE_ERRORS
from protocol.errors import (
    InternalError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    QueueUnavailable,
    ServiceError,
)

log = logging.getLogger(__name__)


def error_body(error: ServiceError) -> dict[str, Any]:
    """Return the body of an error: the standard's `code` (HTTP status) and `message`, OpenAI's `error`."""
    return {
        "code": error.status,
        "message": error.message,
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
    }


def json_response(body: Any, status: int = 200) -> Response:
    """Make a JSON response. Its Content-Type has no charset parameter, which the node would not recognise."""
    return Response(encode_json(body), status=status, content_type="application/json")


def error_response(error: ServiceError) -> Response:
    """Make the response for an error, with its status and the headers that belong to it."""
    response = json_response(error_body(error), error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if not error.may_retry:
        response.headers["X-Should-Retry"] = "false"
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def log_unexpected(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log an exception's type and traceback, without its text, which may contain a prompt."""
    places = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s\n%s", what, type(error).__name__, places)


def register_error_handlers(app: Flask) -> None:
    """Answer every exception that leaves a route with an error body."""

    def service_error(error: ServiceError) -> Response:
        current_access().fail(error)
        return error_response(error)

    def http_exception(error: HTTPException) -> Response:
        response = service_error(_translate(error))
        if isinstance(error, WrongMethod) and error.valid_methods:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return response

    def queue_error(error: Exception) -> Response:
        return service_error(QueueUnavailable())

    def unexpected(error: Exception) -> Response:
        log_unexpected(log, "unexpected error", error)
        return service_error(InternalError())

    app.register_error_handler(ServiceError, service_error)
    app.register_error_handler(HTTPException, http_exception)
    for kind in QUEUE_ERRORS:
        app.register_error_handler(kind, queue_error)
    app.register_error_handler(Exception, unexpected)


def _translate(error: HTTPException) -> ServiceError:
    status = error.code or 500
    known: dict[int, ServiceError] = {
        404: NotFound("no such endpoint; GET /openapi.json lists them"),
        405: MethodNotAllowed(
            "this endpoint does not support that method; GET /openapi.json lists those it supports"
        ),
        413: PayloadTooLarge("the body is larger than this endpoint accepts"),
    }
    if status in known:
        return known[status]
    translated = ServiceError(error.description or error.name)
    translated.status = status
    if status < 500:
        translated.type, translated.code = "invalid_request_error", "invalid_request"
    return translated
