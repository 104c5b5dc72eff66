"""app.process.WebProcess: what gunicorn starts, and what it tells a process that is to stop."""

from types import SimpleNamespace
from typing import Any

import pytest

from app.process import WebProcess


class Part:
    """Stands for a thread of the process; records what is called."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self._name = name
        self._calls = calls
        self.reachable = True
        self.refusal = ""
        self.subscribed = SimpleNamespace(is_set=lambda: True)

    def start(self) -> None:
        self._calls.append(f"start {self._name}")

    def stop(self) -> None:
        self._calls.append(f"stop {self._name}")


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def parts(calls: list[str]) -> dict[str, Any]:
    return {
        name: Part(name, calls) for name in ("router", "worker_view", "heartbeat", "reconciler", "traces")
    }


def test_the_threads_start_in_order_and_stop_in_the_opposite_one(
    calls: list[str], parts: dict[str, Any]
) -> None:
    process = WebProcess(**parts)
    process.start()
    process.stop()
    assert calls == [
        *("start traces", "start router", "start heartbeat", "start reconciler"),
        *("stop reconciler", "stop heartbeat", "stop router", "stop traces"),
    ]


def test_a_process_without_a_node_has_no_reconciler(calls: list[str], parts: dict[str, Any]) -> None:
    process = WebProcess(**parts | {"reconciler": None})
    process.start()
    process.stop()
    assert not [call for call in calls if "reconciler" in call]


def test_it_is_connected_while_redis_answers_and_the_channel_is_subscribed(parts: dict[str, Any]) -> None:
    process = WebProcess(**parts)
    assert process.connected()
    parts["worker_view"].reachable = False
    assert not process.connected()
    parts["worker_view"].reachable = True
    parts["heartbeat"].refusal = "it is full"
    assert not process.connected(), "Redis answers reads, and refuses what queues a request"
    assert process.redis_state() == "refuses writes: it is full"
    parts["heartbeat"].refusal = ""
    parts["router"].subscribed.is_set = lambda: False
    assert not process.connected()


def test_it_drains_from_the_moment_when_gunicorn_was_told_to_stop(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("app.process.time.monotonic", lambda: now)
    process = WebProcess(**parts)
    assert process.draining_for_s() == 0, "before the start"
    worker = SimpleNamespace(alive=True)
    process.start(worker)
    now += 50
    assert process.draining_for_s() == 0
    worker.alive = False
    assert process.draining_for_s() > 0, "a process that drains is told apart from one that does not"
    now += 7
    assert process.draining_for_s() == 7
