"""Starts the processes in order, waits until the service is ready, and stops them in order."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine
from typing import Any

from config import EXIT_CONFIGURATION
from supervise.alarms import ProcessAlarms, Publish, reason_of
from supervise.console import SUPERVISOR, Console
from supervise.plan import Plan
from supervise.process import Process, Spec, describe_status
from supervise.readiness import Probe
from supervise.redis_server import EmbeddedRedis

POLL_S = 0.5
PROGRESS_EVERY_S = 15.0
WATCH_S = 5.0
"""How often it is looked which workers are ready, and alarms are told; they last
protocol.alarms.ALARM_TTL_S."""
REGISTER_S = 6.0
"""How long READY waits until the node has all workers that are ready."""


class StartFailed(Exception):
    """Raised where the service can't start.

    The message is one line; `status` is the supervisor's exit status.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class Service:
    """The processes of a plan, from `run()` until they have stopped."""

    def __init__(
        self,
        plan: Plan,
        probe: Probe,
        redis: EmbeddedRedis | None,
        console: Console,
        ready_line: str,
        publish: Publish,
    ) -> None:
        """`publish` tells the web processes of alarms."""
        self._plan = plan
        self._probe = probe
        self._redis = redis
        self._console = console
        self._print = console.printer(SUPERVISOR)
        self._ready_line = ready_line
        self._ready = False
        self._stop_asked = asyncio.Event()
        self._hurry = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._groups: list[list[Process]] = []
        self._running: list[asyncio.Task[None]] = []
        self._alarms = ProcessAlarms(plan.workers, publish, console.printer(SUPERVISOR, "ERROR"))

    async def run(self) -> None:
        """Start everything, print READY, and stop everything when a signal or `ask_to_stop` requests it.

        Raises StartFailed, after stopping everything, if the service did not become ready.
        """
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
            numbers.append(signal.SIGHUP)
        for number in numbers:
            asyncio.get_running_loop().add_signal_handler(number, self.ask_to_stop)
        watching = asyncio.create_task(self._watch())
        try:
            await self._until_stopped(self._start())
            await self._stop_asked.wait()
        finally:
            watching.cancel()
            await self._stop()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _watch(self) -> None:
        """Tell again and again which processes do not come up."""
        while True:
            ready = await asyncio.to_thread(self._probe.ready_workers)
            for process in (process for group in self._groups for process in group if process.pid in ready):
                self._alarms.became_ready(process)
            await asyncio.to_thread(self._alarms.tell, time.monotonic())
            await asyncio.sleep(WATCH_S)

    def ask_to_stop(self) -> None:
        """Stop in order; when called again, without waiting for running requests."""
        if not self._stop_asked.is_set():
            self._stop_asked.set()
        elif not self._hurry.is_set():
            self._print("stopping without waiting for running requests")
            self._hurry.set()

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` until it is done, a stop is requested, or a process fails the start.

        Raises StartFailed.
        """
        doing = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop_asked.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {doing, stop, self._failed}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            if doing.done():
                doing.result()
        finally:
            for task in (doing, stop):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _start(self) -> None:
        started = time.monotonic()
        for group in self._plan.groups:
            self._groups.append([self._launch(spec) for spec in group])
            if group is self._plan.redis and self._redis is not None and not await self._redis.wait():
                raise StartFailed("the embedded Redis did not start", 1)
        await self._wait_until_ready(started)
        self._ready = True
        after_s = time.monotonic() - started
        if unregistered := await self._unregistered():
            self._ready_line += f" | not registered with the node: {unregistered}"
        self._print(f"{self._ready_line} (after {after_s:.1f} s)")

    def _launch(self, spec: Spec) -> Process:
        process = Process(spec, self._console.printer(spec.name), self._on_exit)
        self._running.append(asyncio.create_task(process.run()))
        return process

    async def _wait_until_ready(self, started: float) -> None:
        printed, print_again_at = "", 0.0
        while not await asyncio.to_thread(self._probe.ready, self._web_pid()):
            progress = await asyncio.to_thread(self._probe.progress)
            now = time.monotonic()
            if progress != printed or now >= print_again_at:
                self._print(f"starting ({now - started:.0f} s): {progress}")
                printed, print_again_at = progress, now + PROGRESS_EVERY_S
            await asyncio.sleep(POLL_S)

    async def _unregistered(self) -> str:
        """Return what keeps a worker from being registered with the node, "" if nothing does.

        A reason counts only if it lasts: a worker's may be older than the web process's first answer.
        """
        give_up_at = time.monotonic() + REGISTER_S
        while (reason := await asyncio.to_thread(self._probe.unregistered)) != "":
            if time.monotonic() >= give_up_at:
                return reason or "it has not answered yet, or SERVICE_URL does not reach this service"
            await asyncio.sleep(POLL_S)
        return ""

    def _web_pid(self) -> int | None:
        return next((p.pid for group in self._groups for p in group if p.spec in self._plan.web), None)

    def _on_exit(self, process: Process, status: int) -> bool:
        """Return whether to restart a process.

        During the start, a fatal status fails the start; the first one counts.
        """
        if self._ready or status not in process.spec.fatal_at_start:
            self._alarms.exited(process, status)
            return status != EXIT_CONFIGURATION
        if self._failed.done():
            return False
        if status == EXIT_CONFIGURATION:
            reason = f"{process.spec.name}: {reason_of(process) or describe_status(status)}"
            self._failed.set_exception(StartFailed(reason, EXIT_CONFIGURATION))
        else:
            reason = f"{describe_status(status)} while starting; its output above says why"
            self._failed.set_exception(StartFailed(f"{process.spec.name}: {reason}", 1))
        return False

    async def _stop(self) -> None:
        self._print(
            "stopping: workers finish their requests, then web and Redis stop (Ctrl-C again to hurry)"
        )
        for group in reversed(self._groups):
            await asyncio.gather(*(process.stop(self._hurry) for process in group))
        await asyncio.gather(*self._running)
        self._print("stopped")
