"""The terminal that all processes share. Each line begins with the name of its process."""

import sys
from collections.abc import Callable
from typing import TextIO

SUPERVISOR = "run"
_COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")

PrintLine = Callable[[str], None]


class Console:
    """Prints `name | line`, on a terminal with a different colour for each name."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._coloured = out.isatty()
        self._width = len(SUPERVISOR)
        self._colour_of: dict[str, str] = {SUPERVISOR: "1"}

    def printer(self, name: str) -> PrintLine:
        """Return a function that prints lines with this name."""
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
            # The terminal or the reader of the pipe is gone. The service continues until a signal stops it.
            pass
