"""Small real processes for the tests of the supervisor."""

import asyncio
import os
import sys
import time
from pathlib import Path

from supervise.process import Process, Spec

_STAND_IN = """
import os, signal, subprocess, sys, time
log, name = sys.argv[1:3]

def note(what):
    with open(log, "a") as file:
        print(name, what, file=file, flush=True)

def on_term(*_):
    note("stopping")
    time.sleep({stop_s})
    note("stopped")
    sys.exit(0)

signal.signal(signal.SIGTERM, {handler})
note("started")
{body}
while True:
    time.sleep(0.05)
"""


def stand_in(
    name: str,
    log: Path,
    *,
    body: str = "",
    stop_s: float = 0,
    ignores_sigterm: bool = False,
    stop_timeout_s: float = 60,
    fatal_at_start: frozenset[int] = frozenset({78}),
) -> Spec:
    """Make a process that writes to `log`: "NAME started", "NAME stopping", "NAME stopped".

    `body` is Python code that it runs after "started"; `stop_s` is how long it takes to stop.
    """
    script = _STAND_IN.format(
        stop_s=stop_s, handler="signal.SIG_IGN" if ignores_sigterm else "on_term", body=body
    )
    argv = (sys.executable, "-S", "-c", script, str(log), name)
    return Spec(name, argv, dict(os.environ), stop_timeout_s, fatal_at_start)


def noted(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


async def until_noted(log: Path, line: str, *, times: int = 1, timeout_s: float = 20) -> None:
    """Wait until the log has `line` that often."""
    give_up_at = time.monotonic() + timeout_s
    while noted(log).count(line) < times:
        assert time.monotonic() < give_up_at, f"no {line!r} in {noted(log)}"
        await asyncio.sleep(0.02)


def retry_all_but_78(_: Process, status: int) -> bool:
    return status != 78


def alive(pid: int) -> bool:
    """Whether the process runs. A zombie counts as gone."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the second: it exited between open and read
        return False
