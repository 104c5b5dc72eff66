"""Reads memory, load and temperature of this worker's GPU from the driver, through NVML."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import pynvml

from protocol.leases import GpuUsage

T = TypeVar("T")

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
STALE_S = 10.0
"""An older reading is not told: the driver no longer answers."""


class GpuWatch(threading.Thread):
    """Reads the first of `gpus` (UUIDs) again and again; without one it ends at once.

    In a thread of its own, because a call to a driver in trouble may never return, and the lease must be renewed.
    """

    def __init__(self, gpus: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name="gpu-watch", daemon=True)
        self._gpu = gpus[0] if gpus else None
        self._clock = clock
        self._reading: tuple[float, GpuUsage] | None = None
        self._failure = ""
        self._connected = False

    @property
    def usage(self) -> GpuUsage | None:
        """The last reading; None on the CPU and when there is none of the last STALE_S."""
        reading = self._reading
        if reading is None or self._clock() - reading[0] > STALE_S:
            return None
        return reading[1]

    def run(self) -> None:
        while self._gpu is not None:
            self.look()
            time.sleep(INTERVAL_S)

    def look(self) -> None:
        """Read once. Why that fails is logged once."""
        assert self._gpu is not None
        try:
            if not self._connected:
                pynvml.nvmlInit()
                self._connected = True
            usage = _read(self._gpu)
        except pynvml.NVMLError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                log.warning("the driver does not tell the use of GPU %s: %s", self._gpu, error)
            self._disconnect()
            return
        self._failure = ""
        self._reading = self._clock(), usage

    def _disconnect(self) -> None:
        """The next look connects anew: after a restart of the driver an old connection stays dead."""
        if self._connected:
            self._connected = False
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def _read(uuid: str) -> GpuUsage:
    """Raises pynvml.NVMLError."""
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return GpuUsage(
        memory_used_bytes=memory.used,
        memory_total_bytes=memory.total,
        utilization=_or_none(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        temperature_c=_or_none(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    )


def _or_none(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except pynvml.NVMLError_NotSupported:
        return None
