"""What a web process knows of the workers between two looks."""

from typing import Any, cast

import msgspec
import redis

from app.dispatch.worker_view import WorkerView
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
    monkeypatch.setattr("app.dispatch.worker_view.time.monotonic", lambda: now)
    records = Records()
    worker_view = WorkerView(cast(Any, records))
    worker_view.refresh()
    records.found = [cast(WorkerRecord, Ready("echo"))]
    assert not worker_view.has_ready("echo", look_again=True), "it has just looked"
    now += 0.2
    assert not worker_view.has_ready("echo")
    assert worker_view.has_ready("echo", look_again=True)
    assert records.reads == 2
    now += 0.2
    assert worker_view.has_ready("echo", look_again=True)
    assert records.reads == 2
