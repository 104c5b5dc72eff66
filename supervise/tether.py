"""`python -S -E tether.py SUPERVISOR_PID SIGNAL COMMAND…`: becomes COMMAND, to which the kernel sends SIGNAL when the
supervisor dies.

A process image of its own, not a `preexec_fn`: that one runs Python between fork and exec, where another thread's lock
may be held for ever.
"""

import os
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; survives exec


def main() -> None:
    supervisor, number, *command = sys.argv[1:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != int(supervisor):
            return  # it died before the kernel knew that we care
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
