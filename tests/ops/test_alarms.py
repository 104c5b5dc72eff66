"""supervise.alarms: when a process is an alarm, and until when."""

import os
from collections.abc import Collection
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from logs import json_line
from supervise.alarms import FAILED_STARTS, REPEAT_S, ProcessAlarms
from supervise.process import Process
from tests.ops.stand_ins import retry_all_but_78, stand_in

HOST = os.uname().nodename
AGAIN = f"m-1 on {HOST} ends again and again before it is ready; it exited with status 1: no room"


class Bench:
    """Alarms of one worker and of the web process; `published` is what Redis has."""

    def __init__(self, log: Path) -> None:
        worker, web = stand_in("m-1", log), stand_in("web", log)
        self.worker = Process(worker, print, retry_all_but_78)
        self.worker.last_line = "[2026-01-01 00:00:00: CRITICAL/MainProcess] no room"
        self.web = Process(web, print, retry_all_but_78)
        self.printed: list[str] = []
        self.published: set[str] = set()
        self.reachable = True
        self.alarms = ProcessAlarms([worker], self.publish, self.printed.append)

    def publish(self, texts: Collection[str], ended: Collection[str]) -> None:
        if not self.reachable:
            raise RedisConnectionError("gone")
        self.published = (self.published | set(texts)) - set(ended)

    def fail(self, times: int, status: int = 1) -> None:
        for _ in range(times):
            self.alarms.exited(self.worker, status)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "log")


def test_the_reason_of_a_worker_that_logs_json_is_its_message(bench: Bench) -> None:
    bench.worker.last_line = json_line("m-1", "no room")
    bench.fail(FAILED_STARTS)
    bench.alarms.tell(0)
    assert bench.printed == [f"ALARM: {AGAIN}"]


def test_a_worker_that_fails_again_and_again_is_an_alarm_until_it_is_ready(bench: Bench) -> None:
    bench.fail(FAILED_STARTS - 1)
    bench.alarms.tell(0)
    assert bench.printed == [] and bench.published == set()
    bench.fail(1)
    bench.alarms.tell(5)
    assert bench.printed == [f"ALARM: {AGAIN}"] and bench.published == {AGAIN}
    bench.alarms.became_ready(bench.worker)
    bench.alarms.tell(10)
    assert bench.published == set()
    bench.fail(FAILED_STARTS - 1)
    bench.alarms.tell(15)
    assert bench.published == set(), "the count begins anew"


def test_a_process_that_is_not_restarted_is_an_alarm_at_once(bench: Bench) -> None:
    bench.fail(1, status=78)
    bench.alarms.tell(0)
    assert bench.published == {f"m-1 on {HOST} does not run: no room; correct it and restart"}


def test_other_processes_are_only_alarms_if_they_are_not_restarted(bench: Bench) -> None:
    for _ in range(FAILED_STARTS):
        bench.alarms.exited(bench.web, 1)
    bench.alarms.tell(0)
    assert bench.published == set()


def test_an_alarm_that_lasts_is_printed_seldom(bench: Bench) -> None:
    bench.fail(FAILED_STARTS)
    for now in (0, 5, REPEAT_S - 1, REPEAT_S, REPEAT_S + 5):
        bench.alarms.tell(now)
    assert len(bench.printed) == 2


def test_what_ended_while_redis_was_away_is_removed_when_it_is_back(bench: Bench) -> None:
    bench.fail(FAILED_STARTS)
    bench.alarms.tell(0)
    bench.reachable = False
    bench.alarms.became_ready(bench.worker)
    bench.alarms.tell(5)
    bench.reachable = True
    bench.alarms.tell(10)
    assert bench.published == set()
