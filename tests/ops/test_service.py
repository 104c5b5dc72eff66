"""Start order, failed starts and stop order of a plan whose processes are small stand-ins."""

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from config import Settings
from supervise import alarms as alarms_module
from supervise import service as service_module
from supervise.console import Console
from supervise.plan import Plan
from supervise.readiness import Probe
from supervise.service import Service, StartFailed
from tests.ops.stand_ins import alive, noted, stand_in, until_noted


class StubProbe(Probe):
    """Reports ready as soon as the file `ready_when` exists.

    `reasons`: what it answers to `unregistered`, one after another, the last one again and again.
    """

    def __init__(self, ready_when: Path, reasons: Sequence[str | None] = ("",)) -> None:
        super().__init__(Settings(node_url=""))
        self._ready_when = ready_when
        self._reasons = list(reasons)

    def unregistered(self) -> str | None:
        return self._reasons.pop(0) if len(self._reasons) > 1 else self._reasons[0]

    def ready(self, web_pid: int | None = None) -> bool:
        return self._ready_when.exists()

    def progress(self) -> str:
        return "m: 1 loading"

    def ready_workers(self) -> set[int]:
        return set()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


class Output:
    """What a service has printed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self.console = Console(self._file.fileno())

    def so_far(self) -> str:
        return self._path.read_text()

    def to_end(self) -> str:
        self.console.close()
        self._file.close()
        return self.so_far()


def build(plan: Plan, ready_when: Path, reasons: Sequence[str | None] = ("",)) -> tuple[Service, Output]:
    out = Output(ready_when.with_name("output"))
    probe = StubProbe(ready_when, reasons)
    return Service(plan, probe, None, out.console, "READY http://stand-in", lambda texts, ended: None), out


STOPS_WITH_THE_OTHER = """
def on_term(*_):
    note("stopping")
    while open(log).read().count("stopping") < 2:
        time.sleep(0.02)
    note("stopped")
    sys.exit(0)

signal.signal(signal.SIGTERM, on_term)
"""


def test_workers_stop_first_and_redis_last(log: Path) -> None:
    slow = [stand_in(name, log, body=STOPS_WITH_THE_OTHER) for name in ("worker-1", "worker-2")]
    plan = Plan(
        redis=(stand_in("redis", log),),
        web=(stand_in("web", log),),
        flower=(stand_in("flower", log),),
        workers=tuple(slow),
    )

    async def scenario() -> str:
        service, out = build(plan, log)
        running = asyncio.create_task(service.run())
        for name in ("redis", "web", "flower", "worker-1", "worker-2"):
            await until_noted(log, f"{name} started")
        while "READY" not in out.so_far():
            await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(running, 60)
        return out.to_end()

    output = asyncio.run(scenario())
    stops = [line for line in noted(log) if "started" not in line]
    assert sorted(stops[:2]) == ["worker-1 stopping", "worker-2 stopping"]
    assert sorted(stops[2:4]) == ["worker-1 stopped", "worker-2 stopped"]
    assert stops[4:] == [
        f"{name} {what}" for name in ("flower", "web", "redis") for what in ("stopping", "stopped")
    ]
    assert output.count("READY") == 1


def test_a_configuration_error_fails_the_start_and_leaves_no_process(log: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    body = f"open({str(pids)!r}, 'w').write(str(os.getpid()))"
    failing = f"""
while not (os.path.exists({str(pids)!r}) and open({str(pids)!r}).read()):
    time.sleep(0.05)
print('[now] m: no such folder', flush=True)
os._exit(78)
"""
    plan = Plan(
        redis=(),
        web=(stand_in("web", log, body=body),),
        flower=(),
        workers=(stand_in("m-1", log, body=failing),),
    )

    async def scenario() -> None:
        service, out = build(plan, tmp_path / "never")
        try:
            await asyncio.wait_for(service.run(), 60)
        finally:
            out.to_end()

    with pytest.raises(StartFailed) as failure:
        asyncio.run(scenario())
    assert (str(failure.value), failure.value.status) == ("m-1: m: no such folder", 78)
    assert not alive(int(pids.read_text()))


def test_a_web_process_that_cannot_boot_fails_the_start(log: Path, tmp_path: Path) -> None:
    web = stand_in("web", log, body="sys.exit(3)", fatal_at_start=frozenset({78, 3}))

    async def scenario() -> None:
        service, out = build(Plan(redis=(), web=(web,), flower=(), workers=()), tmp_path / "never")
        try:
            await asyncio.wait_for(service.run(), 30)
        finally:
            out.to_end()

    with pytest.raises(StartFailed, match="web: exited with status 3 while starting") as failure:
        asyncio.run(scenario())
    assert failure.value.status == 1


def test_a_stop_while_models_load_ends_at_once(log: Path, tmp_path: Path) -> None:
    plan = Plan(redis=(), web=(stand_in("web", log),), flower=(), workers=(stand_in("m-1", log),))

    async def scenario() -> None:
        service, out = build(plan, tmp_path / "never")
        running = asyncio.create_task(service.run())
        await until_noted(log, "web started")
        await until_noted(log, "m-1 started")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 60)
        out.to_end()

    asyncio.run(scenario())
    assert noted(log)[-1] == "web stopped"


STALE = "SERVICE_URL http://stand-in does not answer"


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        ([STALE, None, ""], ""),
        (["code 1001"], " | not registered with the node: code 1001"),
        ([None], " | not registered with the node: it has not answered yet"),
    ],
)
def test_ready_says_only_what_lasts_of_the_node(
    log: Path, monkeypatch: pytest.MonkeyPatch, reasons: list[str | None], said: str
) -> None:
    if reasons[-1] != "":
        monkeypatch.setattr(service_module, "REGISTER_S", 0.5)

    async def scenario() -> str:
        service, out = build(Plan((), (stand_in("web", log),), (), ()), log, reasons)
        running = asyncio.create_task(service.run())
        while "READY" not in out.so_far():
            await asyncio.sleep(0.02)
        service.ask_to_stop()
        await asyncio.wait_for(running, 60)
        return out.to_end()

    ready = next(line for line in asyncio.run(scenario()).splitlines() if "READY" in line)
    assert (said in ready) if said else ("not registered" not in ready)


def test_a_worker_that_exits_after_ready_is_restarted(log: Path) -> None:
    body = "time.sleep(0.2); os._exit(1) if open(log).read().count('m-1 started') == 1 else None"
    plan = Plan(redis=(), web=(), flower=(), workers=(stand_in("m-1", log, body=body),))

    async def scenario() -> str:
        service, out = build(plan, log)
        running = asyncio.create_task(service.run())
        await until_noted(log, "m-1 started", times=2)
        service.ask_to_stop()
        await asyncio.wait_for(running, 60)
        return out.to_end()

    assert "exited with status 1; restarting in 1 s" in asyncio.run(scenario())


def test_a_worker_that_is_not_restarted_is_an_alarm_again_and_again(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "WATCH_S", 0.05)
    monkeypatch.setattr(alarms_module, "REPEAT_S", 0.05)
    body = f"""
while "READY" not in open({str(log.with_name("output"))!r}).read():
    time.sleep(0.02)
print('[now] weights are gone', flush=True)
os._exit(78)
"""
    plan = Plan(redis=(), web=(), flower=(), workers=(stand_in("m-1", log, body=body),))

    async def scenario() -> None:
        service, out = build(plan, log)
        running = asyncio.create_task(service.run())
        line = f"ALARM: m-1 on {os.uname().nodename} does not run: weights are gone; correct it and restart"
        while out.so_far().count(line) < 3:
            await asyncio.sleep(0.02)
        service.ask_to_stop()
        await asyncio.wait_for(running, 60)
        out.to_end()

    asyncio.run(scenario())
    assert noted(log) == ["m-1 started"]
