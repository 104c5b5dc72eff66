"""Server-Sent Events: frames, the comment that keeps a silent stream alive, and how a stream ends. No Flask in here."""

import logging
import time
from collections.abc import Callable
from typing import Self

import msgspec

from app.http.errors import error_body, log_unexpected
from protocol.errors import Cancelled, InternalError, ServiceError

log = logging.getLogger(__name__)

COMMENT_AFTER_S = 5.0
COMMENT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def frame(data: bytes) -> bytes:
    """One event. `data` is JSON on one line."""
    return b"data: " + data + b"\n\n"


class EventStream:
    """What goes over the wire, for a WSGI server: `take` gives frames as they come, b"" after a second of silence, None
    after a complete answer. `close` is called at its end, whatever that is.

    Ends with [DONE] only after a complete answer: the node and its users have no other sign of it. A failure after the
    first byte becomes an error event, and the stream ends without [DONE].
    """

    # an iterator and no generator: app.dispatch.dispatcher.EventReader says why
    __slots__ = ("_clock", "_ended", "_last_sent", "_take", "close")

    def __init__(
        self,
        take: Callable[[], bytes | None],
        close: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._take = take
        self.close = close
        self._clock = clock
        self._last_sent = clock()
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        if self._ended:
            raise StopIteration
        try:
            while (part := self._take()) == b"" and self._clock() - self._last_sent < COMMENT_AFTER_S:
                pass
        except Cancelled:
            raise StopIteration from None
        except ServiceError as error:
            self._ended = True
            return frame(msgspec.json.encode(error_body(error)))
        except Exception as error:
            self._ended = True
            log_unexpected(log, "stream broken", error)
            failure = InternalError("something went wrong here in mid-answer")
            return frame(msgspec.json.encode(error_body(failure)))
        self._last_sent = self._clock()
        if part is None:
            self._ended = True
            return DONE
        return part or COMMENT
