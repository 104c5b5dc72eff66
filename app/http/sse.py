"""Server-Sent Events: frames, comments that keep a silent stream alive, how a stream ends. Knows no Flask."""

import logging
import time
from collections.abc import Callable
from typing import Self

from app.http.errors import error_body, log_unexpected
from app.http.json import encode_json
from protocol.errors import Cancelled, InternalError, ServiceError

log = logging.getLogger(__name__)

COMMENT_AFTER_S = 5.0
DONE = b"data: [DONE]\n\n"


def frame(data: bytes, *, event: str = "") -> bytes:
    """Frame one event. `data` is JSON on one line; `event`: its type, "" where events have none."""
    head = b"event: " + event.encode() + b"\n" if event else b""
    return head + b"data: " + data + b"\n\n"


def comment(text: str) -> bytes:
    """Frame a comment, which clients of event streams skip."""
    return b": " + text.encode() + b"\n\n"


COMMENT = b": waiting\n\n"


class EventStream:
    """A response's body for a WSGI server, which calls `close` at its end.

    It ends with [DONE] only after a complete response, which is the only sign of completeness that the node
    and its users have. A failure becomes an error event, and the stream ends without [DONE].

    Streams of images have types of events instead, as OpenAI's have: the last image is the sign of
    completeness.
    """

    # an iterator instead of a generator: see docs/adr/0007-open-streams.md
    __slots__ = ("_clock", "_ended", "_last_sent", "_next_frames", "_on_failure", "_typed", "close")

    def __init__(
        self,
        next_frames: Callable[[], bytes | None],
        close: Callable[[], None],
        on_failure: Callable[[ServiceError], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        typed: bool = False,
    ) -> None:
        """`next_frames` returns frames, b"" after a second of silence, and None after a complete response.

        `on_failure` is told why a response ends before it is complete. `typed`: events have types.
        """
        self._next_frames = next_frames
        self.close = close
        self._on_failure = on_failure
        self._clock = clock
        self._typed = typed
        self._last_sent = clock()
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        if self._ended:
            raise StopIteration
        try:
            frames = self._next_frames()
            while frames == b"" and self._clock() - self._last_sent < COMMENT_AFTER_S:
                frames = self._next_frames()
        except Cancelled as error:
            self._on_failure(error)
            raise StopIteration from None
        except ServiceError as error:
            return self._fail(error)
        except Exception as error:
            log_unexpected(log, "unexpected error in a stream", error)
            return self._fail(InternalError())
        self._last_sent = self._clock()
        if frames is None:
            self._ended = True
            if self._typed:
                raise StopIteration
            return DONE
        return frames or COMMENT

    def _fail(self, error: ServiceError) -> bytes:
        self._ended = True
        self._on_failure(error)
        return frame(encode_json(error_body(error)), event="error" if self._typed else "")
