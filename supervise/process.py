"""One process that is kept running: in a session of its own, restarted with backoff, ended within a bounded time."""

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

from config import EXIT_CONFIGURATION
from supervise.console import Say

LONGEST_BACKOFF_S = 30.0
RESET_AFTER_S = 60.0  # a life this long was a success: the next backoff starts from the beginning
HURRIED_STOP_S = 2.0
LAST_OUTPUT_S = 1.0  # how long an ended process's last lines may take through the pipe
LONGEST_LINE = 65536  # bytes; a longer one is printed in pieces

_TETHER = (sys.executable, "-S", "-E", str(Path(__file__).with_name("tether.py")), str(os.getpid()))


@dataclass(frozen=True)
class Spec:
    """What to run.

    `fatal_at_start`: exit statuses that fail a whole start; later only EXIT_CONFIGURATION is final. `orphan_signal`: what
    the kernel sends when the supervisor dies; SIGTERM where there is something to tidy up.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    stop_timeout_s: float
    fatal_at_start: frozenset[int] = frozenset({EXIT_CONFIGURATION})
    orphan_signal: signal.Signals = signal.SIGTERM


def backoff_s(failures: int) -> float:
    """Seconds to wait after this many failures in a row (1, 2, …): 1, 2, 4 … 30."""
    return min(LONGEST_BACKOFF_S, 2.0 ** (failures - 1))


class Process:
    """Keeps `spec` running from `run()` until `stop()`.

    `on_exit(process, status)` hears of every unasked end and says whether to start again.
    """

    def __init__(self, spec: Spec, say: Say, on_exit: Callable[["Process", int], bool]) -> None:
        self.spec = spec
        self.last_words = ""
        self._say = say
        self._on_exit = on_exit
        self._child: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._over = asyncio.Event()
        self._over.set()

    @property
    def pid(self) -> int | None:
        """The process id while one runs."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def run(self) -> None:
        """Start, and start again after each end, until stopped or until an end that a restart can't mend."""
        failures = 0
        self._over.clear()
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                status = await self._run_once()
                if self._stopping.is_set():
                    return
                if not self._on_exit(self, status):
                    self._say(f"{describe_status(status)}; not restarted")
                    return
                failures = 1 if time.monotonic() - started >= RESET_AFTER_S else failures + 1
                self._say(f"{describe_status(status)}; restarting in {backoff_s(failures):g} s")
                await _within(backoff_s(failures), self._stopping.wait())
        finally:
            self._over.set()

    async def stop(self, hurry: asyncio.Event) -> None:
        """SIGTERM, then SIGKILL after the spec's time (or HURRIED_STOP_S from when `hurry` is set). Ends when all is over."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        hurried = asyncio.create_task(hurry.wait())
        over = asyncio.create_task(self._over.wait())
        await asyncio.wait(
            {hurried, over}, timeout=self.spec.stop_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if hurried.done() and not over.done():
            await _within(HURRIED_STOP_S, self._over.wait())
        hurried.cancel()
        if self.pid is not None:
            self._say("did not end in time: killed")
            self._kill_group(self.pid)
        await over

    async def _run_once(self) -> int:
        read_end, write_end = os.pipe()
        try:
            self._child = await asyncio.create_subprocess_exec(
                *_TETHER,
                str(int(self.spec.orphan_signal)),
                *self.spec.argv,
                env=self.spec.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone, which stops in order
            )
        finally:
            os.close(write_end)
        output, lines = await asyncio.get_running_loop().connect_read_pipe(
            lambda: _Lines(self._take_line), os.fdopen(read_end, "rb")
        )
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)  # stopped while it was being started
        status = await self._child.wait()
        self._kill_group(self._child.pid)  # what it started itself goes with it
        await _within(LAST_OUTPUT_S, lines.closed.wait())
        output.close()
        return status

    def _take_line(self, line: str) -> None:
        if line.strip():
            self.last_words = line.strip()
            self._say(line)

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)

    @staticmethod
    def _kill_group(leader: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def describe_status(status: int) -> str:
    """An exit status as asyncio gives it, in words."""
    if status == EXIT_CONFIGURATION:
        return f"ended with status {status}, a configuration error"
    return f"ended with status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"


async def _within(seconds: float, waiting: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(waiting, seconds)


class _Lines(asyncio.Protocol):
    """Cuts what a pipe brings into lines. A progress bar redraws its line with \\r: only its last state counts."""

    def __init__(self, take: Say) -> None:
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
