"""The result of one check."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """PASS; WARN: it works and may surprise, or could not be checked; FAIL: something will not work."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """`check`: what was looked at.

    `message`: what was found and, unless it passed, what to do, in one line.
    """

    check: str
    status: Status
    message: str


def passed(check: str, message: str) -> Finding:
    return Finding(check, Status.PASS, message)


def warned(check: str, message: str) -> Finding:
    return Finding(check, Status.WARN, message)


def failed(check: str, message: str) -> Finding:
    return Finding(check, Status.FAIL, message)
