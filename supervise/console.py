"""The terminal that all processes share.

Each line begins with the name of its process, or is JSON that has it.
"""

import collections
import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable

from logs import is_json_line, json_line

SUPERVISOR = "run"
PENDING_LIMIT = 4 * 2**20
"""Bytes that wait for a reader which has stalled. Further lines are dropped and counted."""
_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")

PrintLine = Callable[[str], None]


class LineWriter:
    """Writes lines to a file descriptor without ever blocking the caller.

    A pipe that nobody reads or a terminal after Ctrl-S blocks a write indefinitely, so a thread makes the
    writes. It uses the descriptor itself: a thread blocked in `sys.stdout` would hold the lock that the
    interpreter needs at its exit.
    """

    def __init__(self, fd: int, encoding: str = "utf-8", *, as_json: bool = False) -> None:
        """`as_json`: how it tells of dropped lines."""
        self._fd = fd
        self._encoding = encoding
        self._as_json = as_json
        self._lines: collections.deque[bytes] = collections.deque()
        self._pending = 0
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="line-writer", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue one line, or drop it if PENDING_LIMIT is reached."""
        data = (line + "\n").encode(self._encoding, "backslashreplace")
        with self._changed:
            if self._pending + len(data) > PENDING_LIMIT:
                self._dropped += 1
                return
            self._lines.append(data)
            self._pending += len(data)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Let the thread write what is queued, for at most `timeout_s`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (data := self._next()) is not None:
            # OSError: the terminal or the reader of the pipe is gone. The service continues without it.
            with contextlib.suppress(OSError):
                self._write_all(data)
            with self._changed:
                self._pending -= len(data)

    def _next(self) -> bytes | None:
        """Wait for a line. Returns None when the writer is closed and all is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._dropped or self._closed)
            if self._lines:
                return self._lines.popleft()
            if not self._dropped:
                return None
            text = f"{self._dropped} lines were dropped: nobody read this output"
            line = json_line(SUPERVISOR, text, "WARNING") if self._as_json else f"{SUPERVISOR} | {text}"
            note = f"{line}\n".encode()
            self._dropped = 0
            self._pending += len(note)
            return note

    def _write_all(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # another program has made the descriptor non-blocking
                select.select([], [self._fd], [])


class Console:
    """Prints `name | line`, on a terminal with a different colour for each name.

    As JSON it prints lines that are JSON already as they are, and makes an object of each other line.
    """

    def __init__(self, fd: int = 1, *, as_json: bool = False) -> None:
        self._as_json = as_json
        self._writer = LineWriter(fd, sys.stdout.encoding, as_json=as_json)
        self._coloured = os.isatty(fd)
        self._width = len(SUPERVISOR)
        self._colour_of: dict[str, str] = {SUPERVISOR: "1"}

    def printer(self, name: str, level: str = "INFO") -> PrintLine:
        """Return a function that prints lines with this name.

        `level`: that of lines which are no JSON yet.
        """
        self._width = max(self._width, len(name))
        self._colour_of.setdefault(name, _COLOURS[(len(self._colour_of) - 1) % len(_COLOURS)])
        return lambda line: self._print(name, line, level)

    def close(self, timeout_s: float = 2.0) -> None:
        """Wait until all lines are written, for at most `timeout_s`."""
        self._writer.close(timeout_s)

    def _print(self, name: str, line: str, level: str) -> None:
        if self._as_json:
            self._writer.write(line if is_json_line(line) else json_line(name, line, level))
            return
        label = f"{name:<{self._width}} |"
        if self._coloured:
            label = f"\x1b[{self._colour_of[name]}m{label}\x1b[0m"
        self._writer.write(f"{label} {line}")
