"""`python -m supervise`: prepares the process for signals before anything is imported that takes time."""

import os
import signal
import sys
from typing import Any

from supervise.init import run_as_init


def _stop_early(number: int, frame: Any) -> None:
    raise SystemExit(0)


def start() -> int:
    """Handle signals, then run the command line."""
    if os.getpid() == 1:
        run_as_init()
    # until the command line installs the handlers that stop everything in order
    signal.signal(signal.SIGTERM, _stop_early)
    try:
        # imported here: it takes half a second, in which a signal may already arrive
        from supervise.command_line import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(start())
