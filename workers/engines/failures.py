"""Turns an exception raised inside an engine into the event that ends the request and a line in the log."""

import logging
import traceback

import torch

from protocol.errors import EngineError, OutOfMemory, ServiceError
from protocol.events import Failed

log = logging.getLogger(__name__)


def failure_of(error: Exception) -> Failed:
    """Return the event for the client, and log the error unless the client caused it (a ServiceError).

    The log gets the type and the traceback of the error. Its text may quote a prompt, so it is logged only
    for errors of torch, whose texts hold shapes, devices and sizes.
    """
    if isinstance(error, ServiceError):
        return Failed.of(error)
    trace = "".join(traceback.format_tb(error.__traceback__))
    if _is_out_of_memory(error):
        log.error("out of memory: %s\n%s", error, trace)
        return Failed.of(OutOfMemory())
    text = f": {error}" if isinstance(error, RuntimeError) else ""
    log.error("%s%s\n%s", type(error).__name__, text, trace)
    return Failed.of(EngineError())


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out on the GPU, or on the CPU, where torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Return the GPU memory that torch caches to the device. Does nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
