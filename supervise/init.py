"""What the first process of a container owes the others: passing signals on and reaping orphans.

The kernel ignores signals to process 1 that it has no handler for, and makes it the parent of every process
whose own parent has ended.
"""

import contextlib
import os
import signal

_PASSED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}


def run_as_init() -> None:
    """Fork, and return in the child.

    The parent passes signals on to the child, reaps every process that ends, and exits with the child's
    status.
    """
    waited_for = _PASSED_ON | {signal.SIGCHLD}
    # Blocked signals wait for sigwait(): none is lost, whenever it comes.
    signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # else a terminal's Ctrl-C would come twice: from the terminal and from the parent
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waited_for)
        return
    while True:
        number = signal.sigwait(waited_for)
        if number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        elif (status := _reap(child)) is not None:
            os._exit(status if status >= 0 else 128 - status)


def _reap(child: int) -> int | None:
    """Reap all processes that have ended. Returns the status of `child` if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):  # there are no more children
        while True:
            pid, code = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                status = os.waitstatus_to_exitcode(code)
    return status
