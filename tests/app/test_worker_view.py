"""What a web process knows of the workers between two looks."""

from typing import Any, cast

import msgspec
import redis

from app.directory import Directory
from protocol.leases import WorkerRecord


class Records:
    """Leases that a test writes; counts how often they are read."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.reads = 0
        self.lost = False

    def workers(self) -> list[Any]:
        self.reads += 1
        if self.lost:
            raise redis.ConnectionError("gone")
        return self.found


class Ready(msgspec.Struct):
    model: str
    state: str = "ready"


def test_it_looks_again_before_it_says_no_and_not_for_each_caller(monkeypatch: Any) -> None:
    now = 100.0
    monkeypatch.setattr("app.directory.time.monotonic", lambda: now)
    records = Records()
    directory = Directory(cast(Any, records))
    directory.refresh()
    records.found = [cast(WorkerRecord, Ready("echo"))]
    assert not directory.has_ready("echo", look_again=True), "it has just looked"
    now += 0.2
    assert not directory.has_ready("echo")
    assert directory.has_ready("echo", look_again=True)
    assert records.reads == 2
    now += 0.2
    assert directory.has_ready("echo", look_again=True)
    assert records.reads == 2
