"""Notices an engine that is dead or stuck."""

import time
from collections.abc import Callable

from workers.engines.base import Engine


class EngineHung(Exception):
    """Raised by `Watchdog.check` when the engine's thread is dead or makes no progress."""


class Watchdog:
    """Watches the step counter of an engine, which must grow within `hang_s` seconds while there is work."""

    def __init__(self, engine: Engine, hang_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._hang_s = hang_s
        self._clock = clock
        self._active = False
        self._steps = 0
        self._progress_at = 0.0

    def start(self) -> None:
        """Watch from now on: the engine is loaded, and no step takes as long as loading and compiling do."""
        self._progress_at = self._clock()
        self._active = True

    def stop(self) -> None:
        """Watch no longer: the engine is being closed."""
        self._active = False

    def check(self) -> None:
        """Look at the engine once. Raises EngineHung."""
        if not self._active:
            return
        status, now = self._engine.status(), self._clock()
        if not status.alive:
            raise EngineHung("the engine's thread has died")
        if status.steps != self._steps or status.running + status.waiting == 0:
            self._steps, self._progress_at = status.steps, now
        elif now - self._progress_at > self._hang_s:
            raise EngineHung(f"the engine made no progress for {self._hang_s:g} s while requests ran")
