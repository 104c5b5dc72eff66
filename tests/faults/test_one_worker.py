"""One worker that dies, stops or has an engine that fails, while requests run."""

import signal
import time
from collections.abc import Iterator

import pytest

from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until
from tests.faults.conftest import check_lost, read, wait_served

NAME = "echo-1"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment for the tests of its only worker, which may end it."""
    catalogue = ECHO_CATALOGUE.format(step_ms=50, slots=16)
    folder = tmp_path_factory.mktemp("one_worker")
    with Deployment(folder, catalogue=catalogue, redis_server=None, DRAIN_S="1", HANG_S="3") as service:
        yield service.start("echo")


@pytest.fixture
def service(shared: Deployment) -> Deployment:
    """The shared deployment with its worker ready, started again where the test before has ended it."""
    if shared.workers[NAME].popen.poll() is not None:
        shared.start_worker("echo", NAME)
    shared.wait_worker(NAME, "ready")
    return shared


def test_killed_during_streams(service: Deployment) -> None:
    readers = read(service, 2000, 4)
    service.workers[NAME].end()
    for reader in readers:
        check_lost(reader, 30)
    status, answer = service.chat("hi", "echo", max_tokens=2)
    assert status == 503
    assert answer["error"]["code"] == "no_worker"
    service.start_worker("echo", NAME)
    service.wait_worker(NAME, "ready")
    wait_served(service)
    wait_until(
        lambda: service.wait_worker(NAME, "ready")["running"] == 0,
        timeout_s=20,
        what="nothing runs: the rest of the cut streams, 100 s, is not generated",
    )


def test_restarted_before_its_lease_expires(service: Deployment) -> None:
    readers = read(service, 2000, 2)
    service.workers[NAME].end()
    service.start_worker("echo", NAME)
    for reader in readers:
        check_lost(reader, 30)
    service.wait_worker(NAME, "ready")
    wait_served(service)


def test_drain_is_bounded(service: Deployment) -> None:
    (reader,) = read(service, 5000)
    service.workers[NAME].signal(signal.SIGTERM)
    reader.wait_end(20)
    assert reader.error is not None
    assert reader.error["error"]["code"] == "shutting_down"
    assert service.workers[NAME].popen.wait(20) == 0


@pytest.mark.parametrize(("fault", "code"), [("raise", "engine_error"), ("out of memory", "out_of_memory")])
def test_a_request_that_the_engine_fails_on(service: Deployment, fault: str, code: str) -> None:
    began = time.monotonic()
    status, answer = service.chat(fault, "echo")
    assert status == 500
    assert answer["error"]["code"] == code
    assert time.monotonic() - began < 10
    assert service.chat("hi", "echo", max_tokens=3)[0] == 200


@pytest.mark.parametrize(("fault", "reason"), [("hang", "no progress"), ("die", "has died")])
def test_an_engine_that_hangs_or_dies_is_replaced(service: Deployment, fault: str, reason: str) -> None:
    (other,) = read(service, 5000)
    status, answer = service.chat(fault, "echo")
    assert status == 500
    assert answer["error"]["code"] == "engine_stopped" and "again" not in answer["message"]
    other.wait_end(10)
    assert other.error is not None
    assert other.error["error"]["code"] == "engine_stopped"
    worker = service.workers[NAME]
    assert worker.popen.wait(20) not in (0, 78), "with this status a supervisor would not start it again"
    assert reason in worker.tail()
    service.start_worker("echo", NAME)
    service.wait_worker(NAME, "ready")
    wait_served(service)
