"""Reads a GPU's memory, load and temperature from the driver. Imported where there is a GPU only."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import pynvml

from protocol.leases import GpuUsage

T = TypeVar("T")


class NvmlReader:
    """A connection to NVML, which is made when it is needed."""

    def __init__(self, gpu: str) -> None:
        """`gpu`: a UUID."""
        self._gpu = gpu
        self._connected = False

    def read(self) -> GpuUsage | str:
        """Return the figures, or the reason why there are none."""
        try:
            if not self._connected:
                pynvml.nvmlInit()
                self._connected = True
            return _usage(self._gpu)
        except pynvml.NVMLError as error:
            self._disconnect()
            return str(error)

    def _disconnect(self) -> None:
        """Let the next read connect again: after a restart of the driver an old connection stays unusable."""
        if self._connected:
            self._connected = False
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def _usage(uuid: str) -> GpuUsage:
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
