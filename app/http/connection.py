"""The client's socket as gunicorn gives it: detects disconnects, and closes on clients that stop reading."""

import socket
from typing import Any

SEND_S = 10.0
UNREAD_S = 15.0


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
        """Bound the time for which the client may stop reading, from now on.

        The kernel closes the connection when bytes stay unsent or unacknowledged for `UNREAD_S` seconds; a
        single write raises TimeoutError after `SEND_S` seconds. Both are needed: the kernel's buffers hold
        minutes of text before a write blocks, and only the kernel sees that the client takes nothing.
        """
        if self._socket is None:
            return
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_S * 1000))
        self._timeout_before = self._socket.gettimeout()
        self._socket.settimeout(SEND_S)

    def end_sending(self) -> None:
        """Restore the longer timeout: the same socket waits for the next request."""
        if self._socket is not None:
            self._socket.settimeout(self._timeout_before)
