"""Everything that can go wrong for a caller, as one tree. Each class is one HTTP status and one stable word.

ServiceError
├─ InvalidRequest 400 (ContextLengthExceeded, InvalidImage, UnsupportedParameter)
├─ Unauthorized 401 · ModelNotFound 404 · NotFound 404 · MethodNotAllowed 405 · RequestTimeout 408 · PayloadTooLarge 413
├─ RateLimited 429 · InternalError 500 (EngineError, OutOfMemory)
├─ Unavailable 503 (NoWorker, Overloaded, QueueUnavailable, WorkerLost, ShuttingDown)
└─ DeadlineExceeded 504
Cancelled: nobody waits for the answer any more.

A message says what was wrong and what would be right; it never holds a stack trace, a path or a prompt.
"""


class ServiceError(Exception):
    """Base. `retry_after_s` becomes the Retry-After header when set."""

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    status, code, type = 400, "invalid_request", "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class InvalidImage(InvalidRequest):
    code = "invalid_image"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class Unauthorized(ServiceError):
    status, code, type = 401, "invalid_api_key", "authentication_error"


class NotFound(ServiceError):
    status, code, type = 404, "not_found", "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ServiceError):
    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class RequestTimeout(ServiceError):
    status, code, type = 408, "request_timeout", "invalid_request_error"


class PayloadTooLarge(ServiceError):
    status, code, type = 413, "payload_too_large", "invalid_request_error"


class RateLimited(ServiceError):
    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"


class InternalError(ServiceError):
    pass


class EngineError(InternalError):
    code = "engine_error"


class OutOfMemory(InternalError):
    code = "out_of_memory"


class Unavailable(ServiceError):
    status, code = 503, "unavailable"


class NoWorker(Unavailable):
    code = "no_worker"


class Overloaded(Unavailable):
    code = "overloaded"


class QueueUnavailable(Unavailable):
    code = "queue_unavailable"


class WorkerLost(Unavailable):
    code = "worker_lost"


class ShuttingDown(Unavailable):
    code = "shutting_down"


class DeadlineExceeded(ServiceError):
    status, code, type = 504, "deadline_exceeded", "timeout_error"


class Cancelled(ServiceError):
    """The caller left. Never seen by anybody but logs and counters; 499 is nginx's word for it."""

    status, code, type = 499, "cancelled", "invalid_request_error"


def _tree(cls: type[ServiceError]) -> list[type[ServiceError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


_by_code = {cls.code: cls for cls in _tree(ServiceError)}


def from_code(code: str, message: str, param: str | None = None) -> ServiceError:
    """The error that a worker's `Failed` event stands for. An unknown word (a newer worker) is an InternalError."""
    return _by_code.get(code, InternalError)(message, param=param)
