"""The stop that a signal asks for, heard by a thread: no line of Python runs in a signal handler for it.

A handler that takes a lock can be interrupted by the next signal, whose handler then waits for that lock for ever. The
kernel sends a dying supervisor's children SIGTERM once for each of its threads, microseconds apart; Celery's handler takes
a lock. Here the interpreter itself writes the signal's number into a pipe.
"""

import os
import signal

STOPS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGQUIT})


class StopSignal:
    """Made in the main thread, where Python allows it; `wait` in any other."""

    def __init__(self) -> None:
        self._heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def wait(self) -> None:
        """Returns after the first signal that stops a worker."""
        while not STOPS.intersection(os.read(self._heard, 64)):
            pass
