"""Waits for the signal that stops a worker, in a thread instead of a signal handler.

A handler that takes a lock can be interrupted by the next signal, whose handler then waits for that lock
indefinitely. The kernel sends a dying supervisor's children SIGTERM once for each of its threads,
microseconds apart, and Celery's handler takes a lock. Here the interpreter itself writes the signal's
number into a pipe.
"""

import os
import signal

STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGQUIT})


class StopSignal:
    """Created in the main thread, as Python requires; `wait` may be called in any other."""

    def __init__(self) -> None:
        self._read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def wait(self) -> None:
        """Return after the first of STOP_SIGNALS."""
        while not STOP_SIGNALS.intersection(os.read(self._read_end, 64)):
            pass
