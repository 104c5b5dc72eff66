"""gunicorn's settings: `gunicorn wsgi:app` finds this file by itself in the working directory."""

import gc
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import gevent
from gunicorn.http import errors
from gunicorn.workers.ggevent import GeventWorker

from config import ConfigurationError, Settings

log = logging.getLogger("web")

try:
    _settings = Settings.from_env()
except ConfigurationError as error:
    print(f"web: {error}", file=sys.stderr)
    sys.exit(78)  # EX_CONFIG: a supervisor doesn't retry it

bind = [_settings.bind]
if _settings.api_keys:
    # A node can't send a key: it has a listener of its own, which offers the standard's POST routes alone.
    bind.append(_settings.node_bind)

# `workers` is left to gunicorn's own WEB_CONCURRENCY (default 1): processes share nothing but the listener and Redis
worker_connections = 4096  # streams held open at once; a gevent connection costs some 15 KiB
preload_app = False  # gevent patches first, then the application is imported
max_requests = 0  # recycling a process would cut its streams
keepalive = 95  # seconds; the node keeps idle connections for 90 s and never retries one that we closed
timeout = 30  # seconds without a sign of life from the event loop until the master replaces the process
graceful_timeout = 27  # seconds after SIGTERM until the master kills: streams have ended by themselves before
control_socket_disable = True  # gunicorn 27 would open one in the home directory
accesslog = None
errorlog = "-"
loglevel = "info"


LINGER_S = 3.0
IDLE_S = 1.0


# Stands here and not in the package: the master loads it, and must not load the application before gevent patches.
class Worker(GeventWorker):
    """gunicorn's gevent worker where it answers, waits or goes on by itself.

    - Its own answers, to what is no HTTP, are this service's one error body instead of HTML.
    - A request whose body is never read to its end gives its connection up after `LINGER_S`, not after `keepalive`.
    - At SIGTERM idle connections are closed at once: the process need not wait for them, nor be killed over them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clients: dict[Any, socket.socket] = {}
        self._idle_since: dict[Any, float] = {}

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        me = gevent.getcurrent()
        self._clients[me] = client
        try:
            super().handle(listener, client, addr)
        finally:
            del self._clients[me]

    @contextmanager
    def timeout_ctx(self) -> Iterator[None]:
        """gunicorn's own, around the wait for a connection's next request."""
        me = gevent.getcurrent()
        self._idle_since[me] = time.monotonic()
        try:
            with super().timeout_ctx():
                yield
        finally:
            del self._idle_since[me]

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        super().handle_request(listener_name, req, sock, addr)
        if not _read_out(req.body):
            raise StopIteration  # gunicorn's word for: close it

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        status, message = _judge(exc)
        if status == 500:
            log.error("a request failed outside of the application", exc_info=exc)
        else:
            # the type alone: the text holds what the caller sent
            log.info("refused with %d: %s", status, type(exc).__name__)
        with gevent.Timeout(LINGER_S, False):
            try:
                client.sendall(_json_answer(status, message))
                # closed with unread bytes, a connection is reset, and the caller may never see the answer
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except OSError:
                return

    def handle_exit(self, sig: Any, frame: Any) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn(self._dismiss_idle)

    def _dismiss_idle(self) -> None:
        """Again and again: new connections come until the listener is closed, others have just had their answer."""
        while True:
            for greenlet, since in list(self._idle_since.items()):
                client = self._clients[greenlet]
                if time.monotonic() - since > IDLE_S and not _has_data(client):
                    # not gevent's own shutdown: it raises in the greenlet that waits, which is logged as an error
                    client._sock.shutdown(socket.SHUT_RD)
            gevent.sleep(IDLE_S / 2)


worker_class = Worker


def _has_data(client: Any) -> bool:
    """A request has come and was not looked at yet. MSG_DONTWAIT works on the plain socket beneath gevent's alone."""
    try:
        return bool(client._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def _read_out(body: Any) -> bool:
    """Read what the application left of a body. False: where the next request would begin is not known."""
    with gevent.Timeout(LINGER_S, False):
        try:
            while body.read(65536):
                pass
            return not body.failed
        except (OSError, errors.ParseException):
            return False
    return False


def _judge(exc: BaseException) -> tuple[int, str]:
    """Status and message for what gunicorn could not take as a request."""
    known: list[tuple[type[BaseException], int, str]] = [
        (errors.LimitRequestLine, 414, "the request line is too long"),
        (errors.LimitRequestHeaders, 431, "the headers are too many or too large"),
        (errors.UnsupportedTransferCoding, 501, "no transfer coding but chunked is taken"),
        (errors.ExpectationFailed, 417, "no expectation but 100-continue is met"),
        (errors.ConfigurationProblem, 500, "something went wrong here; it is not your request's fault"),
        (errors.ParseException, 400, "this is not a well-formed HTTP/1.1 request"),
    ]
    for kind, status, message in known:
        if isinstance(exc, kind):
            return status, message
    return 500, "something went wrong here; it is not your request's fault"


def _json_answer(status: int, message: str) -> bytes:
    # not before gevent has patched: gunicorn's master reads this file too
    from app.http.errors import error_body
    from protocol.errors import InternalError, InvalidRequest

    error = InvalidRequest(message) if status < 500 or status == 501 else InternalError(message)
    error.status = status
    body = json.dumps(error_body(error)).encode()
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def post_fork(server: Any, worker: Any) -> None:
    # until it sets up its own signals, a second of imports later, a worker has the master's: SIGTERM would be lost in it,
    # and the master would wait for it for `graceful_timeout`
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def post_worker_init(worker: Any) -> None:
    """The application learns which gunicorn worker it lives in: its streams end when `worker.alive` goes false."""
    worker.wsgi.extensions["modelservice"].start(worker)
    # what stands in memory now stays: a full collection, between two tokens, would look through all of it
    gc.collect()
    gc.freeze()


def worker_exit(server: Any, worker: Any) -> None:
    """An orderly end gives leases back instead of letting them lapse."""
    if getattr(worker, "wsgi", None) is not None:
        worker.wsgi.extensions["modelservice"].stop()
