"""The result of each check: a line when it is known, and a file of all at the end."""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

Status = Literal["PASS", "FAIL", "SKIP"]


class Outcome(NamedTuple):
    """What a check found. `figure`: one line for a reader. `values`: numbers for the file."""

    status: Status
    figure: str
    values: dict[str, Any]


class Skipped(Exception):
    """Raised by a check that can't be made here. The text is the reason."""


def judged(right: bool, figure: str, **values: Any) -> Outcome:
    """PASS or FAIL."""
    return Outcome("PASS" if right else "FAIL", figure, values)


class Report:
    """Runs checks one after another and keeps what they found."""

    def __init__(self, show: Callable[[str], object] = print) -> None:
        self._show = show
        self.outcomes: dict[str, Outcome] = {}
        """By name of the check, in order."""

    def run(self, name: str, check: Callable[[], Outcome]) -> None:
        """Run one check. What it raises is its result: the next checks run anyway."""
        try:
            outcome = check()
        except Skipped as reason:
            outcome = Outcome("SKIP", str(reason), {})
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            outcome = Outcome(
                "FAIL", f"{type(error).__name__}: {first}", {"traceback": traceback.format_exc()}
            )
        self.outcomes[name] = outcome
        self._show(f"{outcome.status}  {name:<26}  {outcome.figure}")

    @property
    def exit_status(self) -> int:
        """1 if any check failed, else 0."""
        return int(any(outcome.status == "FAIL" for outcome in self.outcomes.values()))

    def write(self, path: Path, **header: Any) -> None:
        """Write `header` and all results as JSON."""
        checks = {name: outcome._asdict() for name, outcome in self.outcomes.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header | {"checks": checks}, indent=1) + "\n", encoding="utf-8")
