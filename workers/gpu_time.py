"""How the time of the GPU is divided among the requests that use it together."""

import threading
import time
from collections.abc import Callable


class GpuTime:
    """Gives each running request an equal part of the seconds in which this worker had any.

    So the parts of all requests add up to the time in which the worker was busy, and a request that shares
    the GPU with seven others is charged an eighth of the time that it takes. Thread safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._now = clock()
        self._share_s = 0.0
        """The part of a request that has run from the beginning, in seconds: grows by 1/n each second."""
        self._began: dict[str, float] = {}
        """For each running request: `_share_s` when it began."""

    def start(self, request_id: str) -> None:
        """Note that a request begins."""
        with self._lock:
            self._advance()
            self._began[request_id] = self._share_s

    def end(self, request_id: str) -> float:
        """Note that a request ends; returns its part, in seconds."""
        with self._lock:
            self._advance()
            return self._share_s - self._began.pop(request_id)

    def running_s(self) -> float:
        """Return the parts so far of all that run, in seconds."""
        with self._lock:
            self._advance()
            return self._running_s()

    def write_off(self) -> float:
        """Return what `running_s` returns, and begin at 0 again with all that run."""
        with self._lock:
            self._advance()
            parts = self._running_s()
            self._began = dict.fromkeys(self._began, self._share_s)
            return parts

    def _running_s(self) -> float:
        return sum(self._share_s - began for began in self._began.values())

    def _advance(self) -> None:
        now = self._clock()
        if self._began:
            self._share_s += (now - self._now) / len(self._began)
        self._now = now
