"""Writes frequent lines of a worker's log in batches.

Each write lets go of the interpreter's lock, for which the threads of the running requests compete. A write for each
job took a worker a tenth more CPU time for short requests than a batch now and then.
"""

import logging
import threading
import time
from typing import TextIO

PAUSE_S = 0.05
"""How late a line may be."""


class BufferedHandler(logging.Handler):
    """Gives its lines to another handler, from a thread of its own, at most every PAUSE_S. Flushed at the exit."""

    def __init__(self, target: "logging.StreamHandler[TextIO]") -> None:
        super().__init__()
        self._target = target
        self._lines: list[str] = []
        self._pending = threading.Event()
        threading.Thread(target=self._write_on, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called with this handler's lock."""
        try:
            self._lines.append(self._target.format(record) + self._target.terminator)
        except Exception:
            self.handleError(record)
        if not self._pending.is_set():
            self._pending.set()

    def flush(self) -> None:
        """Write what is buffered. A reader that has stalled blocks this, and with the lock who logs meanwhile."""
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            if lines:
                self._target.acquire()
                try:
                    self._target.stream.write("".join(lines))
                    self._target.flush()
                finally:
                    self._target.release()
        finally:
            self.release()

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
