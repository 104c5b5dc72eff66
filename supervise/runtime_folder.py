"""The folder for the files of one running service, which is also its lock."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from config import ConfigurationError
from supervise.listeners import Unavailable

_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


@contextlib.contextmanager
def runtime_folder(parent: Path, port: int) -> Iterator[Path]:
    """Create and lock the folder of the service at `port`; remove it afterwards if it is empty then.

    The kernel releases the lock when the process ends, however it ends. Raises Unavailable if another
    process has the lock, ConfigurationError or Unavailable if the folder can't be created.
    """
    folder = parent / str(port)
    try:
        lock = _lock(folder)
    except BlockingIOError as error:
        raise Unavailable(f"BIND: scripts/run already serves port {port} ({folder} is locked)") from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
        os.close(lock)


def cannot_write(path: Path, error: OSError) -> ConfigurationError | Unavailable:
    """Return the error of one line for a file or folder that can't be written. A full disk may pass."""
    kind = ConfigurationError if error.errno in _NOT_WRITABLE else Unavailable
    return kind(f"{path}: {error.strerror}; scripts/run keeps its lock and the embedded Redis's files there")


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the lock. Raises BlockingIOError if another process has it."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its last owner has just removed the folder: again
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), folder.stat()):
                    return lock
            except OSError:
                os.close(lock)
                raise
            os.close(lock)
