"""app.dispatch.worker_view.WorkerView: when it answers from its snapshot, and when it refreshes it."""

from typing import Any, cast

import msgspec
import redis

from app.dispatch.worker_view import WorkerView
from protocol.leases import WorkerRecord


class Records:
    """Leases with the records that a test gives them; counts the reads."""

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


def test_it_refreshes_before_it_says_no_but_not_for_each_request(monkeypatch: Any) -> None:
    now = 100.0
    monkeypatch.setattr("app.dispatch.worker_view.time.monotonic", lambda: now)
    records = Records()
    worker_view = WorkerView(cast(Any, records))
    worker_view.refresh()
    records.found = [cast(WorkerRecord, Ready("echo"))]
    assert not worker_view.has_ready("echo", look_again=True), "the snapshot is new"
    now += 0.2
    assert not worker_view.has_ready("echo")
    assert worker_view.has_ready("echo", look_again=True)
    assert records.reads == 2
    now += 0.2
    assert worker_view.has_ready("echo", look_again=True)
    assert records.reads == 2
