"""Everything that can go wrong for a client, as one tree. Each class is one HTTP status and one stable code.

ServiceError
├─ InvalidRequest 400 (ContextLengthExceeded, InvalidImage, UnsupportedParameter)
├─ Unauthorized 401 · Forbidden 403 · NotFound 404 (ModelNotFound) · MethodNotAllowed 405
├─ RequestTimeout 408 · TakenOver 409 · PayloadTooLarge 413 · UnsupportedMediaType 415 · RateLimited 429
├─ Cancelled 499
├─ InternalError 500 (EngineError, OutOfMemory, EngineStopped)
├─ Unavailable 503 (NoWorker, Overloaded, QueueUnavailable, WorkerLost, Interrupted, CancelledByOperator,
│                   ShuttingDown)
└─ DeadlineExceeded 504

A message says what was wrong and what would be right; it never holds a stack trace, a path or a prompt.
Workers send these errors as `protocol.events.Failed`, the web process makes them of it again.
"""

from typing import ClassVar


class ServiceError(Exception):
    """Base. Raised itself only for HTTP errors of the framework that have no class here.

    `message` may be left out where the class has a default one. `param` names the field of the request at
    fault; `retry_after_s` becomes the Retry-After header.
    """

    status = 500
    code = "internal_error"
    type = "server_error"
    default_message: ClassVar[str] = ""
    default_retry_after_s: ClassVar[float | None] = None
    may_retry: ClassVar[bool] = True
    """False tells OpenAI's clients not to send the request again, which they do by themselves after a 5xx."""

    def __init__(
        self, message: str = "", *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        self.message = message or self.default_message
        if not self.message:
            raise TypeError(f"{type(self).__name__} has no default message: say what was wrong")
        super().__init__(self.message)
        self.param = param
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s


class InvalidRequest(ServiceError):
    """Raised by the web process, or by an engine, for a body or a field that can't be served."""

    status, code, type = 400, "invalid_request", "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Raised by an engine when a prompt, or a chat with its answer, is longer than the model can process."""

    code = "context_length_exceeded"


class InvalidImage(InvalidRequest):
    """Raised by both sides for an image that can't be fetched, read or decoded, or that is too large."""

    code = "invalid_image"


class UnsupportedParameter(InvalidRequest):
    """Raised by both sides for a field that is understood and not supported by this model or service."""

    code = "unsupported_parameter"


class Unauthorized(ServiceError):
    """Raised by the web process when API_KEYS is set and the request carries none of them."""

    status, code, type = 401, "invalid_api_key", "authentication_error"


class NotFound(ServiceError):
    """Raised by the web process for an unknown path, and for an image that isn't in the store any more."""

    status, code, type = 404, "not_found", "invalid_request_error"


class ModelNotFound(NotFound):
    """Raised by the web process for a model that isn't in the catalogue."""

    code = "model_not_found"


class MethodNotAllowed(ServiceError):
    """Raised by the web process for a known path with another method."""

    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class RequestTimeout(ServiceError):
    """Raised by the web process when a request's body arrives too slowly."""

    status, code, type = 408, "request_timeout", "invalid_request_error"


class TakenOver(ServiceError):
    """Made by the web process for a connection whose stream another one resumes."""

    status, code, type = 409, "taken_over", "invalid_request_error"
    default_message = "another connection has resumed this stream"
    may_retry = False


class PayloadTooLarge(ServiceError):
    """Raised by the web process for a body or an image file with too many bytes."""

    status, code, type = 413, "payload_too_large", "invalid_request_error"


class UnsupportedMediaType(ServiceError):
    """Raised by the web process for a body in an encoding that it can't read."""

    status, code, type = 415, "unsupported_media_type", "invalid_request_error"


class Forbidden(ServiceError):
    """Raised by the web process for a request that a page of another site may have made a browser send, and
    for one that only an operator may send.
    """

    status, code, type = 403, "forbidden", "permission_error"


class RateLimited(ServiceError):
    """Raised by the web process when a key has sent more requests than RATE_LIMIT allows."""

    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"


class Cancelled(ServiceError):
    """Raised when the client has disconnected, so only logs and counters see it. The status is nginx's."""

    status, code, type = 499, "cancelled", "invalid_request_error"
    default_message = "the client disconnected"


class InternalError(ServiceError):
    """Made by the web process for an unexpected exception, and for a failure with an unknown code."""

    default_message = "an unexpected error occurred in this server; try again later"


class EngineError(InternalError):
    """Made by a worker when its engine fails on one request."""

    code = "engine_error"
    default_message = "the model failed on this request"


class OutOfMemory(InternalError):
    """Made by a worker when the device has too little memory for one request."""

    code = "out_of_memory"
    default_message = "the model ran out of memory on this request; send a smaller one"
    may_retry = False


class EngineStopped(InternalError):
    """Made by a worker that ends because its engine hung or died: this request may be the reason."""

    code = "engine_stopped"
    default_message = "the model stopped responding while it worked on this request, and is being restarted"
    may_retry = False


class Unavailable(ServiceError):
    """Raised by the web process when something else than the cases below is missing for a moment."""

    status, code = 503, "unavailable"


class NoWorker(Unavailable):
    """Raised by the web process when no ready worker serves the model."""

    code = "no_worker"
    default_retry_after_s = 10


class Overloaded(Unavailable):
    """Raised by the web process when too many requests wait, or too many images are being fetched."""

    code = "overloaded"


class QueueUnavailable(Unavailable):
    """Raised by the web process when Redis can't be reached, or has lost a request's data."""

    code = "queue_unavailable"
    default_message = "the queue can't be reached; try again soon"
    default_retry_after_s = 5


class WorkerLost(Unavailable):
    """Made when a worker ends during a request: by that worker if it still can, else by the web process."""

    code = "worker_lost"
    default_message = "the worker that was generating this response was lost; send the request again"


class Interrupted(Unavailable):
    """Raised by the web process after a pause in which a worker cancelled a request whose client is still
    there."""

    code = "interrupted"
    default_message = "the request was interrupted; send it again"


class CancelledByOperator(Unavailable):
    """Raised by the web process for a request that an operator has cancelled."""

    code = "cancelled_by_operator"
    default_message = "an operator of this server cancelled the request"
    may_retry = False


class ShuttingDown(Unavailable):
    """Raised by the web process or made by a worker that stops before the request is complete."""

    code = "shutting_down"
    default_message = "this server is shutting down; send the request again"
    default_retry_after_s = 5


class DeadlineExceeded(ServiceError):
    """Made by a worker at a request's deadline, and raised by the web process for a worker that doesn't."""

    status, code, type = 504, "deadline_exceeded", "timeout_error"
    default_message = "the response was not complete before the deadline; request less or try again later"


def _tree(cls: type[ServiceError]) -> list[type[ServiceError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


_by_code = {cls.code: cls for cls in _tree(ServiceError)}


def from_code(code: str, message: str, param: str | None = None) -> ServiceError:
    """Make the error that a worker's `Failed` event carries: an InternalError if the code is unknown."""
    return _by_code.get(code, InternalError)(message, param=param)
