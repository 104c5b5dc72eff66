"""Writes frequent lines of a worker's log in batches.

Each write lets go of the interpreter's lock, for which the threads of the running requests compete. A write
for each job took a worker a tenth more CPU time for short requests than a batch now and then.
"""

import logging
import threading
import time
from collections import deque
from typing import TextIO

PAUSE_S = 0.05
"""How late a line may be."""

LINES_LIMIT = 10_000
"""Lines that wait at most. Further ones are dropped and counted."""


class BufferedHandler(logging.Handler):
    """Gives its lines to another handler, from a thread of its own, at most every PAUSE_S.

    Flushed at the exit.
    """

    def __init__(self, target: "logging.StreamHandler[TextIO]") -> None:
        super().__init__()
        self._target = target
        self._lines: deque[str] = deque()
        self._writing = threading.Lock()
        self._dropped = 0
        """Lines beyond LINES_LIMIT."""
        self._failed = 0
        """Lines that could not be written. Changed with `_writing`, as the next one."""
        self._reported = 0
        """How many of both the log says are missing."""
        self._pending = threading.Event()
        threading.Thread(target=self._write_on, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called with this handler's lock. Never waits for the stream."""
        if len(self._lines) >= LINES_LIMIT:
            self._dropped += 1
            return
        try:
            self._lines.append(self._target.format(record) + self._target.terminator)
        except Exception:
            self.handleError(record)
        if not self._pending.is_set():
            self._pending.set()

    def flush(self) -> None:
        """Write what is buffered. A reader that has stalled blocks this.

        Lines that can't be written are lost, and the next write says how many.
        """
        with self._writing:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if lines:
                self._write(lines)

    def _write(self, lines: list[str]) -> None:
        missing = self._dropped + self._failed - self._reported
        try:
            text = "".join([self._note(missing), *lines] if missing else lines)
            self._target.acquire()
            try:
                self._target.stream.write(text)
                self._target.flush()
            finally:
                self._target.release()
        except Exception:
            # a full disk or a reader that is gone, which must not end the thread: StreamHandler does the same
            self._failed += len(lines)
        else:
            self._reported += missing

    def _note(self, missing: int) -> str:
        # "up to": a stream may keep a part of a write that failed, and send it with the next
        text = "up to %d lines are missing: they could not be written"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (missing,), None)
        return self._target.format(record) + self._target.terminator

    def _write_on(self) -> None:
        while True:
            self._pending.wait()
            time.sleep(PAUSE_S)
            self._pending.clear()
            self.flush()


def buffer_lines(logger: logging.Logger) -> None:
    """Let the lines of `logger` wait for others before the root's handlers write them."""
    targets = [handler for handler in logging.root.handlers if isinstance(handler, logging.StreamHandler)]
    logger.handlers = [BufferedHandler(target) for target in targets]
    logger.propagate = not targets


def flush_lines(logger: logging.Logger) -> None:
    """Write what waits, before the process ends without cleaning up."""
    for handler in logger.handlers:
        handler.flush()
