"""What an exception in the engine means for the caller and for the log."""

import logging
import traceback

import torch

from protocol.errors import EngineError, OutOfMemory
from protocol.events import Failed

log = logging.getLogger(__name__)


def failure_of(error: Exception) -> Failed:
    """What the caller is told; the log gets the kind and the place of the error, not its text, which may quote a prompt."""
    place = "".join(traceback.format_tb(error.__traceback__))
    if _is_out_of_memory(error):
        log.error("out of memory: %s\n%s", error, place)
        return Failed(
            OutOfMemory.code, "the model ran out of memory; ask for a smaller size or fewer pictures"
        )
    detail = f": {error}" if isinstance(error, RuntimeError) else ""  # torch's own: shapes and devices
    log.error("%s%s\n%s", type(error).__name__, detail, place)
    return Failed(EngineError.code, "the model failed on this request")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
