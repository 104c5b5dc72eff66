"""The one terminal that all processes share: whose line it is stands before each."""

import sys
from collections.abc import Callable
from typing import TextIO

SUPERVISOR = "run"
_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")

Say = Callable[[str], None]


class Console:
    """Prints `name | line`, the name in a colour of its own where the output is a terminal."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._coloured = out.isatty()
        self._width = len(SUPERVISOR)
        self._colour_of: dict[str, str] = {SUPERVISOR: "1"}

    def sayer(self, name: str) -> Say:
        """A function that prints lines under this name."""
        self._width = max(self._width, len(name))
        self._colour_of.setdefault(name, _COLOURS[(len(self._colour_of) - 1) % len(_COLOURS)])
        return lambda line: self._print(name, line)

    def _print(self, name: str, line: str) -> None:
        label = f"{name:<{self._width}} |"
        if self._coloured:
            label = f"\x1b[{self._colour_of[name]}m{label}\x1b[0m"
        try:
            self._out.write(f"{label} {line}\n")
            self._out.flush()
        except OSError:
            # the terminal or the reader of the pipe is gone: the service goes on and is stopped by its own signals
            pass
