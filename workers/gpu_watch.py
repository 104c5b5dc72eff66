"""Watches memory, load and temperature of this worker's GPU."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from protocol.leases import GpuUsage

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
STALE_S = 10.0
"""An older reading is not told: the driver no longer answers."""


class GpuWatch(threading.Thread):
    """Reads the first of `gpus` (UUIDs) again and again; without one it ends at once.

    In a thread of its own, because a call to a driver in trouble may never return, and the lease must be
    renewed.
    """

    def __init__(self, gpus: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name="gpu-watch", daemon=True)
        self._gpu = gpus[0] if gpus else None
        self._clock = clock
        self._reading: tuple[float, GpuUsage] | None = None
        self._failure = ""

    @property
    def usage(self) -> GpuUsage | None:
        """The last reading; None on the CPU and when there is none of the last STALE_S."""
        reading = self._reading
        if reading is None or self._clock() - reading[0] > STALE_S:
            return None
        return reading[1]

    def run(self) -> None:
        if self._gpu is None:
            return
        # imported here: Flower loads this module, and the web process's image has no nvidia-ml-py
        from workers.nvml import NvmlReader

        reader = NvmlReader(self._gpu)
        while True:
            self.note(reader.read())
            time.sleep(INTERVAL_S)

    def note(self, found: GpuUsage | str) -> None:
        """Take a reading, or the reason why there is none, which is logged once."""
        if isinstance(found, GpuUsage):
            self._reading, self._failure = (self._clock(), found), ""
        elif found != self._failure:
            self._failure = found
            log.warning("the driver does not tell the use of GPU %s: %s", self._gpu, found)
