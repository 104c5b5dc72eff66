"""The caller's socket, as far as gunicorn shows it: has he left, does he still read, how long may his body take."""

import socket
import time
from typing import Any

import gevent
from gunicorn.http.errors import ParseException

from protocol.errors import InvalidRequest, PayloadTooLarge, RequestTimeout

BODY_S = 10.0
BODY_BYTES_PER_S = 64 * 1024
SEND_S = 10.0
UNREAD_S = 15.0


class Connection:
    """One request's connection. Without a gunicorn socket (a test client) the caller never leaves."""

    def __init__(self, environ: dict[str, Any]) -> None:
        wrapped = environ.get("gunicorn.socket")
        # gevent's socket refuses MSG_DONTWAIT semantics: ask the plain one beneath it
        self._socket: Any = wrapped
        self._plain: socket.socket | None = getattr(wrapped, "_sock", wrapped)
        self._timeout_before: float | None = None

    def gone(self) -> bool:
        """The caller has closed his side. A pipelined next request counts as still there."""
        if self._plain is None:
            return False
        try:
            return self._plain.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    def begin_sending(self) -> None:
        """From now on a caller who doesn't read for `UNREAD_S` seconds is cut off, or who, with all buffers full, takes
        longer than `SEND_S` for one piece.

        The kernel's buffers hold minutes of text before a write blocks: that nobody takes it the kernel alone sees.
        """
        if self._socket is None:
            return
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_S * 1000))
        self._timeout_before = self._socket.gettimeout()
        self._socket.settimeout(SEND_S)

    def end_sending(self) -> None:
        """The same socket waits for the next request, for much longer."""
        if self._socket is not None:
            self._socket.settimeout(self._timeout_before)


def read_body(stream: Any, length: int | None, limit: int) -> bytes:
    """The whole request body. Raises PayloadTooLarge beyond `limit` bytes, RequestTimeout for one that drips,
    InvalidRequest for one that is cut or not chunked as it should be.

    A body has `BODY_S` seconds plus what the part that has come needed at `BODY_BYTES_PER_S`: whoever announces much
    and sends little gains no time by it.
    """
    if length is not None and length > limit:
        raise PayloadTooLarge(f"the body has {length} bytes; at most {limit} are taken")
    began = time.monotonic()
    parts: list[bytes] = []
    total = 0
    while True:
        allowed_s = BODY_S + total / BODY_BYTES_PER_S
        too_slow = RequestTimeout(f"the body came too slowly: {total} bytes within {allowed_s:.0f} s")
        with gevent.Timeout(max(0.0, began + allowed_s - time.monotonic()), too_slow):
            try:
                part = stream.read(BODY_BYTES_PER_S)
            except (OSError, ParseException) as error:
                raise InvalidRequest("the body ended early or its chunks are not well-formed") from error
        if not part:
            return b"".join(parts)
        total += len(part)
        if total > limit:
            raise PayloadTooLarge(f"the body has more than {limit} bytes; at most {limit} are taken")
        parts.append(part)
