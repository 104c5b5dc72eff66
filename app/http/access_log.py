"""The access log: one line for each request, when its response has ended.

It has no prompts, keys or query strings.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from flask import request

from app.http.connection import Connection
from logs import Entry
from protocol.errors import Cancelled, InternalError, ServiceError
from protocol.events import Usage

log = logging.getLogger("access")

QUIET_ROUTES = frozenset(
    {
        "/healthz",
        "/readyz",
        "/health",
        "/ping",
        "/metrics",
        "/v1/workers",
        "/v1/activity",
        "/static/<path:filename>",
    }
)
"""What health checks, scrapes, scripts/run and the console ask for again and again: their lines have the
level DEBUG."""
COMPLETED = "completed"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_KEY = "modelservice.access"

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class JobTimings(Protocol):
    """What is known of a job's times and outcome (app.dispatch.timings.Timings)."""

    incarnation_id: str | None
    usage: Usage | None
    images: int

    @property
    def queued_s(self) -> float | None: ...

    @property
    def first_token_s(self) -> float | None: ...

    def milliseconds(self) -> dict[str, int]: ...


class Access:
    """What the line of one request will tell. Whoever learns of something sets it here."""

    __slots__ = (
        "began_at",
        "client_id",
        "code",
        "method",
        "model",
        "request_id",
        "route",
        "span",
        "status",
        "times",
        "traceparent",
    )

    def __init__(self, method: str) -> None:
        self.began_at = time.monotonic()
        self.method = method if method in _METHODS else "(other)"
        self.route = "(none)"
        """The rule that matched, not the path: that may hold anything."""
        self.status = 0
        self.request_id = ""
        self.client_id: str | None = None
        """The client's own id of the request."""
        self.model: str | None = None
        """Of a job; a model that isn't in the catalogue may hold anything."""
        self.code: str | None = None
        """The code of the error (protocol.errors) that ended it."""
        self.times: JobTimings | None = None
        self.span: Any = None
        """OpenTelemetry's, where traces are wanted (app.http.request_trace)."""
        self.traceparent: str | None = None
        """What makes the spans of its jobs children of `span`."""

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.began_at

    @property
    def outcome(self) -> str:
        """COMPLETED, or the code of the error that ended the request."""
        return self.code or COMPLETED

    def fail(self, error: ServiceError) -> None:
        """Note the error that has ended the request."""
        self.code = error.code

    def write(self) -> None:
        """Write the line."""
        level = logging.DEBUG if self.route in QUIET_ROUTES else logging.INFO
        if not log.isEnabledFor(level):
            return
        times = self.times
        entry = Entry(
            "request",
            method=self.method,
            route=self.route,
            status=self.status,
            outcome=self.outcome,
            seconds=round(self.seconds, 3),
            queued_s=times and times.queued_s,
            first_token_s=times and times.first_token_s,
            model=self.model,
            request_id=self.request_id,
            client_request_id=self.client_id,
        )
        log.log(level, entry)


def current_access() -> Access:
    """Return what the current request's line will tell."""
    access: Access = request.environ.get(_KEY) or request.environ.setdefault(_KEY, Access(request.method))
    return access


def log_accesses(app: Application, on_end: Callable[[Access], None]) -> Application:
    """WSGI middleware that writes the lines, and calls `on_end` after that of a job.

    A function and not an object that is called: a call through C keeps more of the stack for each open stream
    (docs/adr/0007-open-streams.md).
    """

    def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        access = environ[_KEY] = Access(environ["REQUEST_METHOD"])
        body = app(environ, start_response)
        # the last look: a response that fits into the kernel's buffers is written without an error
        if access.model is not None and access.code is None and Connection(environ).disconnected():
            access.code = Cancelled.code
        return _LoggedBody(body, access, on_end)

    return serve


class _LoggedBody:
    """A response's body, whose end is logged.

    The server iterates over the body itself, and then closes this.
    """

    __slots__ = ("_access", "_body", "_on_end")

    def __init__(self, body: Iterable[bytes], access: Access, on_end: Callable[[Access], None]) -> None:
        self._body = body
        self._access = access
        self._on_end = on_end

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        failure = sys.exc_info()[1]  # the server calls this also when writing to the client has failed
        try:
            if close := getattr(self._body, "close", None):
                close()
        finally:
            access = self._access
            if failure is not None and access.code is None:
                access.code = Cancelled.code if isinstance(failure, OSError) else InternalError.code
            access.write()
            if access.model is not None:
                self._on_end(access)
