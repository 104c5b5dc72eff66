"""Server-Sent Events: frames, the comment that keeps a silent stream alive, and how a stream ends. No Flask in here."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from app.errors import error_body, log_unexpected
from protocol.errors import Cancelled, InternalError, ServiceError

log = logging.getLogger(__name__)

COMMENT_AFTER_S = 5.0
COMMENT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def frame(data: bytes) -> bytes:
    """One event. `data` is JSON on one line."""
    return b"data: " + data + b"\n\n"


def stream(parts: Iterable[bytes], clock: Callable[[], float] = time.monotonic) -> Iterator[bytes]:
    """What goes over the wire: `parts` are frames joined as they came; an empty part is a second of silence.

    Ends with [DONE] only after a complete answer: the node and its users have no other sign of it. A failure after the
    first byte becomes an error event, and the stream ends without [DONE].
    """
    last_sent = clock()
    try:
        for part in parts:
            if part:
                yield part
                last_sent = clock()
            elif clock() - last_sent >= COMMENT_AFTER_S:
                yield COMMENT
                last_sent = clock()
        yield DONE
    except Cancelled:
        return
    except ServiceError as error:
        yield frame(msgspec.json.encode(error_body(error)))
    except Exception as error:
        log_unexpected(log, "stream broken", error)
        yield frame(msgspec.json.encode(error_body(InternalError("something went wrong here in mid-answer"))))
