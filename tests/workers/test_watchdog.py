"""workers.watchdog: which engines count as hung. Time is made up."""

from typing import Any, cast

import pytest

from workers.engines.base import EngineStatus
from workers.watchdog import EngineHung, Watchdog

HANG_S = 30


class Engine:
    """An engine whose status a test chooses."""

    def __init__(self) -> None:
        self.now = 100.0
        self.current = EngineStatus(alive=True, running=1, waiting=0, steps=5)
        self.watchdog = Watchdog(cast(Any, self), HANG_S, clock=lambda: self.now)

    def status(self) -> EngineStatus:
        return self.current

    def check_after(self, seconds: float) -> None:
        self.now += seconds
        self.watchdog.check()


@pytest.fixture
def engine() -> Engine:
    engine = Engine()
    engine.watchdog.start()
    engine.check_after(1)
    return engine


def test_without_progress_an_engine_with_work_is_hung(engine: Engine) -> None:
    engine.check_after(HANG_S)
    with pytest.raises(EngineHung, match="no progress for 30 s"):
        engine.check_after(1)


def test_requests_that_wait_are_work_too(engine: Engine) -> None:
    engine.current = engine.current._replace(running=0, waiting=1)
    with pytest.raises(EngineHung):
        engine.check_after(HANG_S + 1)


def test_progress_starts_the_time_again(engine: Engine) -> None:
    for steps in range(6, 9):
        engine.current = engine.current._replace(steps=steps)
        engine.check_after(HANG_S - 1)
    with pytest.raises(EngineHung):
        engine.check_after(HANG_S + 1)


def test_an_engine_without_work_is_never_hung(engine: Engine) -> None:
    engine.current = engine.current._replace(running=0)
    engine.check_after(HANG_S + 1)
    # and a request has the whole time
    engine.current = engine.current._replace(running=1)
    engine.check_after(HANG_S - 1)


def test_a_dead_thread_is_noticed_at_once(engine: Engine) -> None:
    engine.current = engine.current._replace(alive=False, running=0)
    with pytest.raises(EngineHung, match="has died"):
        engine.check_after(0)


def test_before_the_start_and_after_the_stop_nothing_is_checked() -> None:
    engine = Engine()
    engine.current = engine.current._replace(alive=False)
    engine.check_after(HANG_S + 1)
    engine.watchdog.start()
    engine.watchdog.stop()
    engine.check_after(HANG_S + 1)
