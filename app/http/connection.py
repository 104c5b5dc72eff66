"""The client's socket as gunicorn gives it: detects disconnects, and closes on clients that stop reading."""

import socket
from typing import Any

SEND_S = 10.0


class Connection:
    """One request's connection. Without a gunicorn socket (in a test client) it is never disconnected."""

    def __init__(self, environ: dict[str, Any]) -> None:
        wrapped = environ.get("gunicorn.socket")
        # for MSG_DONTWAIT: gevent's socket would wait when the plain socket below it raises EAGAIN
        self._socket: Any = wrapped
        self._plain: socket.socket | None = getattr(wrapped, "_sock", wrapped)
        self._timeout_before: float | None = None

    def disconnected(self) -> bool:
        """Whether the client has closed its side. False while data waits to be read (a pipelined request)."""
        if self._plain is None:
            return False
        try:
            return self._plain.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    def begin_sending(self) -> None:
        """Bound the time of each write of a stream, from now on: it raises TimeoutError after `SEND_S`
        seconds.

        gunicorn_worker.py has the kernel close connections whose client takes nothing; this is for one that
        takes a few bytes now and then.
        """
        if self._socket is None:
            return
        self._timeout_before = self._socket.gettimeout()
        self._socket.settimeout(SEND_S)

    def end_sending(self) -> None:
        """Restore the longer timeout: the same socket waits for the next request."""
        if self._socket is not None:
            self._socket.settimeout(self._timeout_before)
