"""Tells what may pass from what a person must change, after a load has failed.

The libraries wrap the errors of network, disk and device in many types, so the whole chain of causes is
looked at. In doubt a person must change something, unless memory or the device is the reason.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from catalogue import ModelEntry
from workers.engines.base import EngineLoadError, TemporaryLoadError

_LASTING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS}
    | {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
)
"""Errors of files that stay until a person changes something. All others are trouble of a disk or the
network."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How the libraries in Rust (safetensors, tokenizers) name an error of the system in their text."""

_DEVICE = ("out of memory", "can't allocate memory", "not enough memory", "busy or unavailable")
"""What torch says, in a plain RuntimeError, when memory or a GPU can't be had at the moment."""

_RETRIED_STATUSES = frozenset({408, 429})


def load_error(entry: ModelEntry, error: Exception, message: str) -> EngineLoadError:
    """Return what a load raises instead of `error`.

    `message`: one line for the operator, without the model's name.
    """
    folder = entry.weights_folder
    if folder is not None and _is_away(folder):
        return TemporaryLoadError(f"{entry.name}: the folder {folder} is missing, empty or can't be read")
    kind = TemporaryLoadError if _may_pass(error) else EngineLoadError
    return kind(f"{entry.name}: {message}")


def no_room(message: str, *, needed: int, room: int) -> EngineLoadError:
    """Return the error for memory that can't be had: lasting if `needed` bytes exceed `room`, all that there
    could be."""
    return EngineLoadError(message) if needed > room else TemporaryLoadError(message)


def refuse_too_large(modules: Iterable[torch.nn.Module], device: torch.device) -> None:
    """Raise EngineLoadError if the weights are larger than the whole GPU.

    Does nothing for the CPU, where they are.
    """
    if device.type != "cuda":
        return
    tensors = {id(tensor): tensor for module in modules for tensor in module.parameters()}
    needed, total = sum(tensor.nbytes for tensor in tensors.values()), torch.cuda.mem_get_info(device)[1]
    if needed > total:
        raise EngineLoadError(
            f"the weights take {needed / 2**30:.1f} GiB and the GPU has {total / 2**30:.1f} GiB"
        )


def memory_of_own(device: torch.device) -> int:
    """Return the bytes of the device that would be free if no other process used it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 8 << 30


def _is_away(folder: Path) -> bool:
    """Whether a folder is missing, or empty as the folder of a disk that is not mounted."""
    try:
        with os.scandir(folder) as files:
            return next(files, None) is None
    except OSError as error:
        return error.errno == errno.ENOENT or bool(_verdict(error))


def _may_pass(error: BaseException) -> bool:
    """Whether the outermost error of the chain that tells anything tells of something that may pass."""
    verdicts = (_verdict(each) for each in _chain(error))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _verdict(error: BaseException) -> bool | None:
    """Whether an error may pass, None if it doesn't tell."""
    if isinstance(error, EngineLoadError):
        return isinstance(error, TemporaryLoadError)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE):
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):  # of the hub
        return status >= 500 or status in _RETRIED_STATUSES
    # the hub's HTTP client, by a name that all its versions share
    if isinstance(error, ConnectionError | TimeoutError) or _is_a(error, "TransportError"):
        return True
    number = getattr(error, "errno", None) or _number_in(str(error))
    return True if number and number not in _LASTING else None


def _is_a(error: BaseException, name: str) -> bool:
    return any(base.__name__ == name for base in type(error).__mro__)


def _number_in(text: str) -> int | None:
    found = _OS_ERROR.search(text)
    return int(found[1]) if found else None
