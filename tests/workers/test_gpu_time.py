"""workers.gpu_time: parts of requests that share a GPU, with a clock of its own."""

import pytest

from workers.gpu_time import GpuTime


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gpu_time(clock: Clock) -> GpuTime:
    return GpuTime(clock)


def test_a_request_alone_has_all_of_its_time(gpu_time: GpuTime, clock: Clock) -> None:
    clock.now += 50
    gpu_time.start("a")
    clock.now += 3
    assert gpu_time.end("a") == pytest.approx(3)
    clock.now += 50
    assert gpu_time.running_s() == 0


def test_requests_that_run_together_share_the_time(gpu_time: GpuTime, clock: Clock) -> None:
    gpu_time.start("a")
    clock.now += 2
    gpu_time.start("b")
    clock.now += 4
    assert gpu_time.running_s() == pytest.approx(6)
    assert gpu_time.end("a") == pytest.approx(2 + 4 / 2)
    clock.now += 1
    assert gpu_time.end("b") == pytest.approx(4 / 2 + 1)


def test_what_was_written_off_is_not_counted_again(gpu_time: GpuTime, clock: Clock) -> None:
    gpu_time.start("a")
    clock.now += 5
    assert gpu_time.write_off() == pytest.approx(5)
    clock.now += 2
    assert gpu_time.running_s() == pytest.approx(2)
    assert gpu_time.end("a") == pytest.approx(2)
