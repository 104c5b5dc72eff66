"""More requests than the service can answer."""

import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.deployment import Deployment, wait_until
from tests.faults.conftest import Starter, counted
from tests.faults.test_clients import JSON, chat_body, waiting

SLOTS = 4
MAX_WAITING = 8
DEADLINE_S = 30
TOKENS = 20
STEP_MS = 50
FLOOD_S = 20


class Answered(NamedTuple):
    """One request of the flood. `seconds`: from sending it to the end of the response."""

    status: int
    seconds: float
    retry_after: int
    text: str


def ask(service: Deployment) -> Answered:
    began = time.monotonic()
    response, connection = service.request("POST", "/v1/chat/completions", chat_body(TOKENS), JSON)
    body = json.loads(response.read())
    connection.close()
    seconds = time.monotonic() - began
    if response.status != 200:
        # "queue_unavailable": Redis, or the whole machine, paused for longer than a command may take.
        assert body["error"]["code"] in ("overloaded", "queue_unavailable"), body
        return Answered(response.status, seconds, int(response.headers.get("Retry-After", 0)), "")
    return Answered(200, seconds, 0, body["choices"][0]["message"]["content"])


class QueueWatch:
    """Notes the greatest number of waiting requests that Redis shows."""

    def __init__(self, service: Deployment) -> None:
        self.longest = 0
        self._service = service
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.longest = max(self.longest, waiting(self._service))

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.longest


def flood(service: Deployment) -> list[Answered]:
    """Send ten times what the engine can do for FLOOD_S seconds, at a fixed rate that no answer changes."""
    pause_s = TOKENS * STEP_MS / 1000 / SLOTS / 10
    answers = []
    began = time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        for number in range(int(FLOOD_S / pause_s)):
            due = began + number * pause_s
            while (early := due - time.monotonic()) > 0:
                threading.Event().wait(early)
            answers.append(pool.submit(ask, service))
        return [answer.result() for answer in answers]


def test_a_flood_of_ten_times_the_capacity(start: Starter) -> None:
    service = start(
        step_ms=STEP_MS, slots=SLOTS, MAX_WAITING=str(MAX_WAITING), CHAT_DEADLINE_S=str(DEADLINE_S)
    )
    queue = QueueWatch(service)
    answers = flood(service)
    longest = queue.end()
    refused = [answer for answer in answers if answer.status != 200]
    served = [answer for answer in answers if answer.status == 200]
    slowest = max(answer.seconds for answer in served)
    quick = sorted(answer.seconds for answer in refused)
    print(
        f"{len(served)} served, slowest {slowest:.1f} s; {len(refused)} refused, p99 {quick[len(quick) * 99 // 100]:.3f} s; "
        f"queue {longest}"
    )
    assert {answer.status for answer in refused} == {503}
    assert all(answer.retry_after >= 1 for answer in refused)
    assert len(refused) > len(answers) / 2, "too few requests to be a flood"
    assert statistics.median(quick) < 2, "a refused request must not wait in the queue"
    assert 1 <= longest <= MAX_WAITING
    assert all(answer.text == counted(TOKENS) for answer in served)
    assert slowest < DEADLINE_S
    # A batch of SLOTS takes a second. A service that refused what it could answer would serve fewer.
    assert len(served) > SLOTS * FLOOD_S / 4
    wait_until(
        lambda: service.running_tasks() == 0 and not waiting(service), timeout_s=10, what="all is done"
    )


def test_an_idle_service_takes_a_burst(start: Starter) -> None:
    """Light traffic says when requests came, and not how fast they could have been served."""
    service = start(step_ms=10, slots=1, CHAT_DEADLINE_S=str(DEADLINE_S))
    with ThreadPoolExecutor(48) as pool:
        for _ in range(15):
            pair = [pool.submit(ask, service) for _ in range(2)]
            assert [answer.result().status for answer in pair] == [200, 200]
            threading.Event().wait(0.8)
        burst = [pool.submit(ask, service) for _ in range(48)]
        assert {answer.result().status for answer in burst} == {200}


def test_a_saturated_service_refuses_what_would_wait_too_long(start: Starter) -> None:
    """MAX_WAITING would let them wait here, but by the measured throughput they would wait too long."""
    deadline_s = 12
    service = start(step_ms=STEP_MS, slots=1, CHAT_DEADLINE_S=str(deadline_s))
    answers: list[Answered] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            answers.append(ask(service))
            if answers[-1].status == 503:
                over.wait(0.2)

    with ThreadPoolExecutor(10) as pool:
        for _ in range(10):
            pool.submit(keep_asking)
        try:
            wait_until(
                lambda: any(answer.status == 503 for answer in answers),
                timeout_s=60,
                what="a request is refused",
            )
        finally:
            over.set()
    (refused, *_) = [answer for answer in answers if answer.status == 503]
    assert 1 <= refused.retry_after <= 60
    assert waiting(service) == 0
