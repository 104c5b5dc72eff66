"""One supervised process: restarts, final statuses, stops, output. Every process is a real one."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from supervise import process as process_module
from supervise.process import Process, backoff_s
from tests.deployment import wait_until
from tests.ops.stand_ins import alive, noted, retry_all_but_78, stand_in, until_noted


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def watch_backoff(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the arguments that `backoff_s` gets from now on, and make the waits short."""
    asked: list[int] = []

    def quick(failures: int) -> float:
        asked.append(failures)
        return 0.01

    monkeypatch.setattr(process_module, "backoff_s", quick)
    return asked


def test_backoff_doubles_up_to_half_a_minute() -> None:
    assert [backoff_s(n) for n in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]


def test_a_process_that_exits_is_restarted(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = watch_backoff(monkeypatch)

    async def scenario() -> None:
        process = Process(stand_in("w", log, body="os._exit(1)"), print, retry_all_but_78)
        running = asyncio.create_task(process.run())
        await until_noted(log, "w started", times=4)
        await process.stop(asyncio.Event())
        await running

    run(scenario())
    assert sorted(set(waits))[:3] == [1, 2, 3]


def test_a_long_run_resets_the_backoff(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = watch_backoff(monkeypatch)
    monkeypatch.setattr(process_module, "RESET_AFTER_S", 0.0)

    async def scenario() -> None:
        process = Process(stand_in("w", log, body="os._exit(1)"), print, retry_all_but_78)
        running = asyncio.create_task(process.run())
        await until_noted(log, "w started", times=3)
        await process.stop(asyncio.Event())
        await running

    run(scenario())
    assert set(waits) == {1}


def test_a_configuration_error_is_not_retried(log: Path) -> None:
    lines: list[str] = []

    async def scenario() -> None:
        body = "print('weights are missing', flush=True); os._exit(78)"
        process = Process(stand_in("w", log, body=body), lines.append, retry_all_but_78)
        await asyncio.wait_for(process.run(), 60)
        assert process.last_line == "weights are missing"

    run(scenario())
    assert noted(log) == ["w started"]
    assert lines[-1] == "exited with status 78, a configuration error; not restarted"


def test_stop_lets_a_process_finish(log: Path) -> None:
    async def scenario() -> None:
        process = Process(stand_in("w", log, stop_s=0.5), print, retry_all_but_78)
        running = asyncio.create_task(process.run())
        await until_noted(log, "w started")
        await process.stop(asyncio.Event())
        assert running.done() or process.pid is None

    run(scenario())
    assert noted(log) == ["w started", "w stopping", "w stopped"]


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(log: Path) -> None:
    child_pid = log.with_name("child")
    body = f"open({str(child_pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid)); note('has a child')"

    async def scenario() -> None:
        process = Process(
            stand_in("w", log, ignores_sigterm=True, body=body, stop_timeout_s=0.3), print, retry_all_but_78
        )
        running = asyncio.create_task(process.run())
        await until_noted(log, "w has a child")
        await process.stop(asyncio.Event())
        await running

    run(scenario())
    assert not alive(int(child_pid.read_text()))


def test_hurry_cuts_a_long_stop_short(log: Path) -> None:
    async def scenario() -> None:
        process = Process(stand_in("w", log, stop_s=60, stop_timeout_s=60), print, retry_all_but_78)
        running = asyncio.create_task(process.run())
        await until_noted(log, "w started")
        hurry = asyncio.Event()
        asyncio.get_running_loop().call_later(0.2, hurry.set)
        started = time.monotonic()
        await process.stop(hurry)
        assert time.monotonic() - started < process_module.HURRIED_STOP_S + 25
        await running

    run(scenario())


def test_a_stop_during_the_backoff_starts_nothing_more(log: Path) -> None:
    async def scenario() -> None:
        process = Process(stand_in("w", log, body="os._exit(1)"), print, retry_all_but_78)
        running = asyncio.create_task(process.run())
        await until_noted(log, "w started")
        await process.stop(asyncio.Event())
        await asyncio.wait_for(running, 1)

    run(scenario())
    assert noted(log) == ["w started"]


def test_each_process_has_its_own_session(log: Path) -> None:
    async def scenario() -> None:
        process = Process(stand_in("w", log), print, retry_all_but_78)
        running = asyncio.create_task(process.run())
        await until_noted(log, "w started")
        assert process.pid is not None and os.getsid(process.pid) == process.pid != os.getsid(0)
        await process.stop(asyncio.Event())
        await running

    run(scenario())


def test_of_a_progress_bar_only_the_last_state_is_shown(log: Path) -> None:
    lines: list[str] = []

    async def scenario() -> None:
        body = r"sys.stdout.write('10 %\r50 %\r100 %\nlong' + 'g' * 200000); sys.stdout.flush(); os._exit(78)"
        await Process(stand_in("w", log, body=body), lines.append, retry_all_but_78).run()

    run(scenario())
    assert lines[0] == "100 %"
    assert "".join(lines[1:-1]) == "long" + "g" * 200000


def kill_the_supervisor_of(spec: str, log: Path) -> int:
    """Kill a supervisor whose process has started. Returns the id of that process."""
    script = f"""
import asyncio, dataclasses, signal
from pathlib import Path
from supervise.process import Process
from tests.ops.stand_ins import stand_in
log = Path({str(log)!r})
process = Process({spec}, print, lambda *_: True)
async def main():
    running = asyncio.create_task(process.run())
    while process.pid is None:
        await asyncio.sleep(0.01)
    print(process.pid, flush=True)
    await running
asyncio.run(main())
"""
    supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    with supervisor.stdout:
        try:
            pid = int(supervisor.stdout.readline())
            asyncio.run(until_noted(log, "w started"))
        finally:
            supervisor.send_signal(signal.SIGKILL)
            supervisor.wait()
    return pid


def test_children_end_when_the_supervisor_is_killed(log: Path) -> None:
    kill_the_supervisor_of('stand_in("w", log)', log)
    asyncio.run(until_noted(log, "w stopped"))


def test_a_child_that_ignores_sigterm_can_be_killed_with_the_supervisor(log: Path) -> None:
    spec = 'dataclasses.replace(stand_in("w", log, ignores_sigterm=True), orphan_signal=signal.SIGKILL)'
    pid = kill_the_supervisor_of(spec, log)
    wait_until(lambda: not alive(pid), timeout_s=20, what="the child is gone")
