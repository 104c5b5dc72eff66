"""Every error as the one body of the design, framework pages included.

`Content-Type` is exactly `application/json` and `code` a non-zero integer: the node ignores the status and reads those.
"""

import logging
import traceback
from typing import Any

import msgspec
from flask import Flask, Response
from redis.exceptions import RedisError
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WrongMethod

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
    """The one error body (design, Errors)."""
    return {
        "code": error.status,
        "message": error.message,
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
    }


def json_response(body: Any, status: int = 200) -> Response:
    """A JSON answer whose type the node recognises: no charset parameter."""
    return Response(msgspec.json.encode(body), status=status, content_type="application/json")


def error_response(error: ServiceError) -> Response:
    response = json_response(error_body(error), error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def log_unexpected(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log where an exception came from, without its text: that may hold what a caller sent."""
    places = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s\n%s", what, type(error).__name__, places)


def register_error_handlers(app: Flask) -> None:
    """Turn whatever leaves a route into the one body."""
    # "//v1/models" is unknown, like any other path: a redirect would be a page of the framework's own
    app.url_map.merge_slashes = False

    def service_error(error: ServiceError) -> Response:
        return error_response(error)

    def http_exception(error: HTTPException) -> Response:
        response = error_response(_translate(error))
        if isinstance(error, WrongMethod) and error.valid_methods:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return response

    def redis_error(error: RedisError) -> Response:
        return error_response(QueueUnavailable("the queue can't be reached; try again soon", retry_after_s=5))

    def unexpected(error: Exception) -> Response:
        log_unexpected(log, "unexpected", error)
        return error_response(InternalError("something went wrong here; it is not your request's fault"))

    app.register_error_handler(ServiceError, service_error)
    app.register_error_handler(HTTPException, http_exception)
    app.register_error_handler(RedisError, redis_error)
    app.register_error_handler(Exception, unexpected)


def _translate(error: HTTPException) -> ServiceError:
    status = error.code or 500
    known: dict[int, ServiceError] = {
        404: NotFound("no such end point; GET /openapi.json lists them"),
        405: MethodNotAllowed(
            "this end point does not take that method; GET /openapi.json lists which it takes"
        ),
        413: PayloadTooLarge("the body is larger than this end point takes"),
    }
    if status in known:
        return known[status]
    translated = ServiceError(error.description or error.name)
    translated.status = status
    if status < 500:
        translated.type, translated.code = "invalid_request_error", "invalid_request"
    return translated
