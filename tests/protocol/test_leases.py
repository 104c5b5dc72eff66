"""protocol.leases: what a missing lease proves, and what Redis holds of workers and web processes."""

import pytest

from protocol.leases import GAP_S, LEASE_TTL_S, Observation


class Watch:
    """An Observation with a clock of its own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.observation = Observation(lambda: self.now)

    def look(self, *pauses: float) -> None:
        """Look after each of these pauses."""
        for pause in pauses:
            self.now += pause
            self.observation.seen()


@pytest.fixture
def watch() -> Watch:
    watch = Watch()
    watch.look(0)
    return watch


def test_nothing_counts_before_the_first_look() -> None:
    observation = Observation()
    assert observation.interrupted
    assert not observation.absence_counts()


def test_a_missing_lease_counts_after_a_whole_lease_of_watching(watch: Watch) -> None:
    watch.look(*[1] * (LEASE_TTL_S - 1))
    assert not watch.observation.absence_counts()
    watch.look(1)
    assert watch.observation.absence_counts()
    assert not watch.observation.absence_counts(after_s=LEASE_TTL_S + 1)


def test_a_failed_look_restarts_the_waiting_period(watch: Watch) -> None:
    watch.look(*[1] * 60)
    watch.observation.interrupt()
    assert watch.observation.interrupted
    assert not watch.observation.absence_counts()
    watch.look(1)
    assert not watch.observation.interrupted
    watch.look(*[1] * (LEASE_TTL_S - 1))
    assert not watch.observation.absence_counts()
    watch.look(1)
    assert watch.observation.absence_counts()


def test_a_pause_in_which_leases_can_expire_restarts_the_waiting_period(watch: Watch) -> None:
    watch.look(*[1] * 60)
    watch.look(GAP_S)
    assert watch.observation.absence_counts()
    watch.look(GAP_S + 0.1)
    assert watch.observation.watched_s == 0
    assert not watch.observation.interrupted, "the look itself succeeded"
    watch.look(*[GAP_S] * 2)
    assert watch.observation.absence_counts()


def test_time_after_the_latest_look_is_not_watched(watch: Watch) -> None:
    """A process that is paused between its look and its question learns nothing meanwhile."""
    watch.look(*[1] * (LEASE_TTL_S - 1))
    watch.now += 60
    assert not watch.observation.absence_counts()
