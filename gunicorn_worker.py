"""The gunicorn worker class of the web process.

gunicorn's master imports this module, so nothing here may import the application before gevent has patched
the standard library. That happens in each worker, after the fork.
"""

import json
import logging
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import gevent
from gunicorn.glogging import Logger
from gunicorn.http import errors
from gunicorn.workers.ggevent import GeventWorker

from logs import Entry, use_json

log = logging.getLogger("web")
access = logging.getLogger("access")

LINGER_S = 3.0
"""How long an error response waits for the client to take it, and an unread body to end."""
UNREAD_S = 15.0
"""A connection on which the client takes nothing for this long is closed by the kernel, during any
response."""
IDLE_S = 1.0
"""At a stop, a connection without a request for this long is closed."""

_MESSAGES: list[tuple[type[Exception], int, str]] = [
    (errors.LimitRequestLine, 414, "the request line is too long"),
    (errors.LimitRequestHeaders, 431, "there are too many headers, or they are too large"),
    (errors.UnsupportedTransferCoding, 501, "unsupported Transfer-Encoding; only chunked is supported"),
    (errors.ExpectationFailed, 417, "unsupported Expect; only 100-continue is supported"),
    (errors.ConfigurationProblem, 500, ""),
    (errors.ParseException, 400, "this is not a well-formed HTTP/1.1 request"),
]
"""Status and message for gunicorn's parser errors, subclasses before their bases. "": the default message."""


class JsonLogger(Logger):
    """gunicorn's own log lines as JSON objects, for LOG_FORMAT=json."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        use_json("web", [self.error_log])


class Worker(GeventWorker):
    """gunicorn's gevent worker, changed where gunicorn answers or waits without the application.

    - Requests that are not valid HTTP get this service's JSON error body instead of HTML.
    - A connection whose request body never ends is closed after `LINGER_S` instead of after `keepalive`.
    - At SIGTERM idle connections are closed at once, so that the process need not wait for them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clients: dict[Any, Any] = {}
        self._idle_since: dict[Any, float] = {}

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve one connection, in a greenlet of its own."""
        greenlet = gevent.getcurrent()
        self._clients[greenlet] = client
        if client.family in (socket.AF_INET, socket.AF_INET6):
            # The kernel's buffers hold minutes of text before a write blocks: only it sees that nobody reads.
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_S * 1000))
        try:
            super().handle(listener, client, addr)
        finally:
            del self._clients[greenlet]

    @contextmanager
    def timeout_ctx(self) -> Iterator[None]:
        """gunicorn's context manager around the wait for a connection's next request."""
        greenlet = gevent.getcurrent()
        self._idle_since[greenlet] = time.monotonic()
        try:
            with super().timeout_ctx():
                yield
        finally:
            del self._idle_since[greenlet]

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """Serve one request. Raises StopIteration, which gunicorn takes as: close the connection."""
        try:
            super().handle_request(listener_name, req, sock, addr)
        except TimeoutError:
            # gunicorn would log a traceback for each client that stops reading
            log.info("closed a connection whose client stopped reading")
            raise StopIteration from None
        if not _read_to_end(req.body):
            raise StopIteration

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer a request that gunicorn could not parse, or that failed outside of the application."""
        status, message = _status_and_message(exc)
        request_id = f"req-{uuid.uuid4().hex}"
        if status == 500:
            log.error("a request failed outside of the application", exc_info=exc)
        # the exception's text may quote the request
        reason = type(exc).__name__
        outcome = "invalid_request" if status < 500 else "internal_error"
        access.info(Entry("request", status=status, outcome=outcome, reason=reason, request_id=request_id))
        with gevent.Timeout(LINGER_S, False):  # type: ignore[arg-type]  # False: ends the block silently
            try:
                client.sendall(_json_response(status, message, request_id))
                # A socket closed with unread bytes is reset, and the client may lose the response.
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except OSError:
                return

    def handle_exit(self, sig: Any, frame: Any) -> None:
        """SIGTERM: stop accepting and finish what runs."""
        super().handle_exit(sig, frame)
        gevent.spawn(self._close_idle)

    def _close_idle(self) -> None:
        """Close idle connections until the process ends; more become idle when their response is complete."""
        while True:
            for greenlet, since in list(self._idle_since.items()):
                client = self._clients[greenlet]
                if time.monotonic() - since > IDLE_S and not _has_data(client):
                    # gevent's own shutdown would raise in the waiting greenlet, which is logged as an error.
                    client._sock.shutdown(socket.SHUT_RD)
            gevent.sleep(IDLE_S / 2)


def _has_data(client: Any) -> bool:
    """Whether a request has arrived that no greenlet has read yet.

    MSG_DONTWAIT has no effect through gevent's socket, only on the plain one below it.
    """
    try:
        return bool(client._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def _read_to_end(body: Any) -> bool:
    """Read the rest of a body. Returns False if it has no end, so that the next request can't be found."""
    if getattr(body.reader, "length", None) == 0:
        return True  # the usual case: the application has read all of it
    with gevent.Timeout(LINGER_S, False):  # type: ignore[arg-type]  # False: ends the block silently
        try:
            while body.read(65536):
                pass
            return not body.failed
        except (OSError, errors.ParseException):
            return False
    return False


def _status_and_message(exc: BaseException) -> tuple[int, str]:
    return next(
        ((status, message) for kind, status, message in _MESSAGES if isinstance(exc, kind)), (500, "")
    )


def _json_response(status: int, message: str, request_id: str) -> bytes:
    # imported here: the master must not load the application
    from app.http.errors import error_body
    from protocol.errors import InternalError, InvalidRequest

    error = InvalidRequest(message) if message else InternalError()
    error.status = status
    body = json.dumps(error_body(error)).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        "Connection: close\r\n"
        "Content-Type: application/json\r\n"
        f"X-Request-Id: {request_id}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
