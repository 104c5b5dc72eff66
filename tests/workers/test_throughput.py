"""workers.throughput: the rate that decides whether a new request would wait too long."""

import pytest

from workers.throughput import ENOUGH_S, WINDOW_S, Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def second(clock: Clock, throughput: Throughput, *, waiting: int, ends: int = 0, work: float = 1.0) -> None:
    """A second in which `ends` requests end, each followed at once by another; then a look."""
    for _ in range(ends):
        throughput.ended(work)
        throughput.started()
    clock.now += 1
    throughput.look(waiting)


def test_work_per_second_under_full_load(clock: Clock) -> None:
    throughput = Throughput(2, clock)
    throughput.started()
    throughput.started()
    throughput.look(5)
    for _ in range(int(ENOUGH_S)):
        second(clock, throughput, waiting=5, ends=1, work=3.0)
    assert throughput.rate == pytest.approx(3.0)


def test_there_is_no_rate_before_enough_was_measured(clock: Clock) -> None:
    throughput = Throughput(1, clock)
    throughput.started()
    throughput.look(1)
    for _ in range(int(ENOUGH_S) - 1):
        second(clock, throughput, waiting=1, ends=1)
    assert throughput.rate == 0


def test_pairs_of_short_requests_now_and_then_are_no_full_load(clock: Clock) -> None:
    throughput = Throughput(1, clock)
    for _ in range(60):
        # the first of a pair runs while the second waits, then the worker is idle
        throughput.started()
        throughput.look(1)
        throughput.ended(1)
        throughput.started()
        throughput.ended(1)
        clock.now += 1
        throughput.look(0)
        clock.now += 8
    assert throughput.rate == 0


def test_a_slot_that_was_free_between_two_looks_makes_the_interval_count_for_nothing(clock: Clock) -> None:
    throughput = Throughput(1, clock)
    for _ in range(60):
        throughput.started()
        throughput.look(1)
        throughput.ended(1)
        clock.now += 1  # nothing runs, though somebody waits at each look
    assert throughput.rate == 0


def test_old_measurements_are_forgotten(clock: Clock) -> None:
    throughput = Throughput(1, clock)
    throughput.started()
    throughput.look(1)
    for _ in range(20):
        second(clock, throughput, waiting=1, ends=1)
    assert throughput.rate
    clock.now += WINDOW_S
    throughput.look(0)
    assert throughput.rate == 0


def test_failed_requests_are_no_work(clock: Clock) -> None:
    throughput = Throughput(1, clock)
    throughput.started()
    throughput.look(1)
    for _ in range(20):
        second(clock, throughput, waiting=1, ends=1, work=0.0)
    assert throughput.rate == 0
