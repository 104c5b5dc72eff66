"""Runs a command that must not outlive the supervisor.

`python -S -E tether.py SUPERVISOR_PID SIGNAL STOP_SIGNAL COMMAND…` asks the kernel to send SIGNAL when the
supervisor dies, then replaces itself by COMMAND. If STOP_SIGNAL is not SIGTERM, SIGTERM stays blocked in
COMMAND: systemd, for example, may send it to all processes at once, and the supervisor stops them in order.

A `preexec_fn` would run Python between fork and exec, where a lock of another thread may be held
indefinitely.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; survives exec


def main() -> None:
    supervisor, number, stop_number, *command = sys.argv[1:]
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # it may be the signal to stop; Python's own handler would raise
    if int(stop_number) != signal.SIGTERM:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # survives exec
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != int(supervisor):
            return  # the supervisor died before the prctl call
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
