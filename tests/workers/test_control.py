"""workers.control: options of Celery that can't work, and remote controls of a real worker."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config import ConfigurationError
from tests.deployment import ECHO_CATALOGUE, ROOT, Deployment, wait_until
from tests.faults.conftest import counted, read
from workers.control import check_options


def controller(**options: Any) -> Any:
    queues = SimpleNamespace(consume_from={options.pop("queue", "model.m"): None})
    app = SimpleNamespace(amqp=SimpleNamespace(queues=queues))
    return SimpleNamespace(**({"pool_cls": "threads", "concurrency": 4, "options": {}, "app": app} | options))


def test_the_defaults_are_accepted() -> None:
    check_options(controller(), queue="model.m", slots=4)


@pytest.mark.parametrize(
    ("option", "value"),
    [("pool_cls", "solo"), ("concurrency", 3), ("options", {"autoscale": (8, 2)}), ("queue", "other")],
)
def test_an_option_that_cannot_work_is_named(option: str, value: object) -> None:
    name = {"pool_cls": "--pool", "queue": "--queues"}.get(option, "--concurrency")
    with pytest.raises(ConfigurationError, match=name):
        check_options(controller(**{option: value}), queue="model.m", slots=4)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Deployment]:
    catalogue = ECHO_CATALOGUE.format(step_ms=50, slots=1)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None) as service:
        yield service.start("echo")


def control(service: Deployment, *command: str) -> str:
    """Run `celery control` against the deployment."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers", "control", "--timeout", "5", *command],
        cwd=ROOT,
        env=service.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_remote_controls_answer_clients_and_cannot_deafen_a_worker(service: Deployment) -> None:
    assert "follows from the catalogue" in control(service, "cancel_consumer", "model.echo")
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200

    (reader,) = read(service, 2000)
    request_id = next(iter(service.redis.client.keys("Test:job:*"))).decode().rpartition(":")[2]
    control(service, "revoke", request_id)
    reader.wait_end(20)
    assert reader.error is not None and reader.error["error"]["code"] == "interrupted"

    (reader,) = read(service, 60)
    control(service, "shutdown")
    began = time.monotonic()
    wait_until(
        lambda: [row["state"] for row in service.worker_rows()] in (["draining"], []),
        timeout_s=10,
        what="the worker drains",
    )
    reader.wait_end(30)
    assert reader.done and reader.text == counted(60), "what runs is finished"
    assert service.workers["echo-1"].popen.wait(30) == 0
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_a_hangup_stops_a_worker_in_order(service: Deployment) -> None:
    (reader,) = read(service, 40)
    service.workers["echo-1"].signal(signal.SIGHUP)
    reader.wait_end(30)
    assert reader.done and reader.text == counted(40)
    assert service.workers["echo-1"].popen.wait(30) == 0
    wait_until(lambda: not service.worker_rows(), timeout_s=20, what="its lease and record are gone")


@pytest.mark.slow
def test_a_worker_of_another_queue_ends_with_78(service: Deployment) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers", "worker", "-n", "other@%h", "-Q", "other"],
        cwd=ROOT,
        env=service.environment(WORKER_MODEL="echo"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 78
    assert "leave --queues out" in done.stderr.splitlines()[-1]
