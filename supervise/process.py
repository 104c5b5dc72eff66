"""Keeps one process running: in its own session, restarted with backoff, stopped within a bounded time."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import EXIT_CONFIGURATION, EXIT_TEMPORARY
from supervise.console import PrintLine

LONGEST_BACKOFF_S = 30.0
RESET_AFTER_S = 60.0  # after a run this long the backoff starts at 1 s again
HURRIED_STOP_S = 2.0
LAST_OUTPUT_S = 1.0  # how long to read on after a process has exited
LONGEST_LINE = 65536  # bytes; longer lines are split

_TETHER = (sys.executable, "-S", "-E", str(Path(__file__).with_name("tether.py")), str(os.getpid()))


@dataclass(frozen=True)
class Spec:
    """A process to run.

    `fatal_at_start`: exit statuses that fail the start of the service; afterwards only EXIT_CONFIGURATION is
    final. `orphan_signal`: what the kernel sends the process when the supervisor dies. `stop_signal`: what
    the supervisor stops it with; if that is not SIGTERM, the process gets no SIGTERM from anybody (it stays
    blocked).
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    stop_timeout_s: float
    fatal_at_start: frozenset[int] = frozenset({EXIT_CONFIGURATION})
    orphan_signal: signal.Signals = signal.SIGTERM
    stop_signal: signal.Signals = signal.SIGTERM


def backoff_s(failures: int) -> float:
    """Return the seconds to wait after this many consecutive failures: 1, 2, 4 … 30."""
    return min(LONGEST_BACKOFF_S, 2.0 ** (failures - 1))


class Process:
    """Keeps `spec` running from `run()` until `stop()`.

    `on_exit(process, status)` is called when the process exits by itself, and returns whether to restart it.
    """

    def __init__(self, spec: Spec, print_line: PrintLine, on_exit: Callable[["Process", int], bool]) -> None:
        self.spec = spec
        self.last_line = ""
        self._print = print_line
        self._on_exit = on_exit
        self._child: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()

    @property
    def pid(self) -> int | None:
        """The process id, None while none runs."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def run(self) -> None:
        """Start the process and restart it whenever it exits, until `stop()` or `on_exit` returning False."""
        failures = 0
        self._ended.clear()
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                status = await self._run_once()
                if self._stopping.is_set():
                    return
                if not self._on_exit(self, status):
                    self._print(f"{describe_status(status)}; not restarted")
                    return
                failures = 1 if time.monotonic() - started >= RESET_AFTER_S else failures + 1
                self._print(f"{describe_status(status)}; restarting in {backoff_s(failures):g} s")
                await _within(backoff_s(failures), self._stopping.wait())
        finally:
            self._ended.set()

    async def stop(self, hurry: asyncio.Event) -> None:
        """Send the spec's signal, then SIGKILL after its time, or HURRIED_STOP_S after `hurry` is set.

        Returns when the process is gone.
        """
        self._stopping.set()
        self._signal(self.spec.stop_signal)
        hurried = asyncio.create_task(hurry.wait())
        ended = asyncio.create_task(self._ended.wait())
        await asyncio.wait(
            {hurried, ended}, timeout=self.spec.stop_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if hurried.done() and not ended.done():
            await _within(HURRIED_STOP_S, self._ended.wait())
        hurried.cancel()
        if self.pid is not None:
            self._print("did not stop in time and was killed")
            self._kill_group(self.pid)
        await ended

    async def _run_once(self) -> int:
        read_end, write_end = os.pipe()
        try:
            self._child = await asyncio.create_subprocess_exec(
                *_TETHER,
                str(int(self.spec.orphan_signal)),
                str(int(self.spec.stop_signal)),
                *self.spec.argv,
                env=self.spec.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                # so that Ctrl-C reaches only the supervisor, which stops the processes in order
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        output, lines = await asyncio.get_running_loop().connect_read_pipe(
            lambda: _Lines(self._take_line), os.fdopen(read_end, "rb")
        )
        if self._stopping.is_set():
            self._signal(self.spec.stop_signal)  # stop() was called while the process was being created
        status = await self._child.wait()
        self._kill_group(self._child.pid)  # its own children
        await _within(LAST_OUTPUT_S, lines.closed.wait())
        output.close()
        return status

    def _take_line(self, line: str) -> None:
        if line.strip():
            self.last_line = line.strip()
            self._print(line)

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)

    @staticmethod
    def _kill_group(leader: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def describe_status(status: int) -> str:
    """Describe an exit status as asyncio gives it: negative for a signal."""
    if status == EXIT_CONFIGURATION:
        return f"exited with status {status}, a configuration error"
    if status == EXIT_TEMPORARY:
        return f"exited with status {status}, for a reason that may pass"
    return f"exited with status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"


async def _within(seconds: float, waiting: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(waiting, seconds)


class _Lines(asyncio.Protocol):
    """Splits a process's output into lines.

    Of a line that a progress bar redraws with \\r only the last state is kept.
    """

    def __init__(self, take: PrintLine) -> None:
        self.closed = asyncio.Event()
        self._take = take
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._emit(line)

    def connection_lost(self, error: Exception | None) -> None:
        if self._rest:
            self._emit(self._rest)
        self.closed.set()

    def _emit(self, line: bytes) -> None:
        self._take(line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace"))
