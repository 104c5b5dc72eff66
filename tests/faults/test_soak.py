"""Hours in short: nothing may pile up (row 19 of the table in docs/operations.md).

A minute by default; SOAK_MINUTES=10 in the environment for the long run.
"""

import json
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import psutil
import pytest

from tests.deployment import Deployment, wait_until
from tests.faults.conftest import Starter, counted
from tests.faults.test_callers import JSON, chat_body, in_hand, waiting

MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))
WARM_UP_S = 20 if MINUTES < 5 else 150  # the long one: until the first claims lapse as fast as new ones come
CLAIM_MB = 0 if MINUTES > 5 else 0.5 / 1024
"""What a request may still hold in Redis in a run shorter than a claim lives; a replay list of ten tokens is four times that."""
CALLERS = 4

STANDING = ("_kombu.binding", "workers", "worker:", "lease:", "web:")
"""Keys that a deployment has whether or not it works. All others must have a TTL."""

OVER = ("job:", "waiting:", "events:", "unacked", "model.")
"""Keys that must be gone when nothing runs."""


class Held(NamedTuple):
    """What a process holds of its machine."""

    memory_mb: float
    files: int
    threads: int
    connections: int


def stood_still(status: int, answer: Any) -> bool:
    """Redis, or all of the machine, did nothing for longer than a command may take."""
    return status == 503 and answer["error"]["code"] == "queue_unavailable"


class Callers:
    """Four callers, one request after another: one in a hundred fails in the engine, one in a hundred leaves."""

    def __init__(self, service: Deployment) -> None:
        self.counts: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._service = service
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        if self.failure is not None:
            raise self.failure

    def _call(self, caller: int) -> None:
        number = caller * 25
        try:
            while not self._over.is_set():
                number += 1
                self.counts[self._one(number)] += 1
        except BaseException as error:
            self.failure = error

    def _one(self, number: int) -> str:
        service = self._service
        if number % 100 == 0:
            status, answer = service.chat("raise", "echo")
            if stood_still(status, answer):
                return "stood still"
            assert (status, answer["error"]["code"]) == (500, "engine_error"), answer
            return "failed"
        if number % 100 == 50:
            response, connection = service.request(
                "POST", "/v1/chat/completions", chat_body(50_000, stream=True), JSON
            )
            response.readline()
            response.close()
            connection.close()
            return "left"
        if number % 20 == 10:
            body = {"model": "echo-pictures", "prompt": "x"}
            status, answer = service.post("/v1/images/generations", body)
            if stood_still(status, answer):
                return "stood still"
            assert status == 200, answer
            return "picture"
        if number % 2:
            status, answer = service.chat("count", "echo", max_tokens=10)
            if stood_still(status, answer):
                return "stood still"
            assert status == 200, answer
            assert answer["choices"][0]["message"]["content"] == counted(10)
            return "plain"
        response, connection = service.request(
            "POST", "/v1/chat/completions", chat_body(10, stream=True), JSON
        )
        text = response.read()
        connection.close()
        if response.status != 200 and stood_still(response.status, json.loads(text)):
            return "stood still"
        lines = text.split(b"\n\n")
        assert lines[-2] == b"data: [DONE]", lines[-3:]
        assert json.loads(lines[0].removeprefix(b"data: "))["choices"][0]["delta"]["role"] == "assistant"
        return "streamed"


def processes(service: Deployment) -> dict[str, psutil.Process]:
    """Every process of the deployment, by name."""
    assert service.web is not None and service.redis.process is not None
    master = psutil.Process(service.web.pid)
    found = {"redis": psutil.Process(service.redis.process.pid), "gunicorn": master}
    found |= {f"web {n}": child for n, child in enumerate(master.children())}
    return found | {name: psutil.Process(worker.pid) for name, worker in service.workers.items()}


def measure(service: Deployment) -> dict[str, Held]:
    """What each process holds; the memory is the median of five seconds."""
    samples: dict[str, list[float]] = {name: [] for name in processes(service)}
    for _ in range(5):
        at = time.monotonic()
        for name, process in processes(service).items():
            samples[name].append(process.memory_info().rss / 2**20)
        wait_until(partial(_passed, at, 1.0), timeout_s=5, what="a second")
    return {
        name: Held(
            statistics.median(samples[name]),
            process.num_fds(),
            process.num_threads(),
            len(process.net_connections("tcp")),
        )
        for name, process in processes(service).items()
    }


def _passed(since: float, seconds: float) -> bool:
    return time.monotonic() - since >= seconds


def settle(service: Deployment) -> list[str]:
    """The keys, without the namespace, once nothing runs and nothing is on its way."""
    wait_until(lambda: in_hand(service) == 0 and not waiting(service), timeout_s=30, what="all is done")

    def quiet() -> list[str] | None:
        keys = [key.decode().partition(":")[2] for key in service.redis.client.scan_iter("*", count=1000)]
        return None if any(key.startswith(OVER) for key in keys) else keys

    return wait_until(quiet, timeout_s=20, what=f"no key of {OVER} is left") or []


def check_keys(service: Deployment) -> None:
    leaked = [
        key
        for key in settle(service)
        if not key.startswith(STANDING) and service.redis.client.ttl(f"Test:{key}") == -1
    ]
    assert not leaked, f"keys that nobody deletes: {leaked[:10]}"


@pytest.mark.timeout(120 + MINUTES * 60)
def test_nothing_piles_up(start: Starter) -> None:
    deadlines = {f"{kind}_DEADLINE_S": "10" for kind in ("CHAT", "GENERATION", "EDIT")}
    service = start(step_ms=5, slots=8, IMAGE_TTL_S="20", IMAGE_STORE_MB="1", **deadlines)
    service.start_worker("echo-pictures")
    service.wait_ready("echo", "echo-pictures")
    began = time.monotonic()
    callers = Callers(service)
    try:
        run = _over_after(callers, began)
        wait_until(partial(run, WARM_UP_S), timeout_s=WARM_UP_S + 10, what="warm-up")
        before = measure(service)
        asked_before = callers.counts.total()
        wait_until(partial(run, MINUTES * 60), timeout_s=MINUTES * 60 + 10, what="the soak")
        after = measure(service)
        asked = callers.counts.total() - asked_before
    finally:
        callers.end()
    print(dict(callers.counts))
    for name, held in after.items():
        grown = held.memory_mb / before[name].memory_mb - 1
        print(f"{name:16} {held.memory_mb:7.1f} MB ({grown:+.1%})  {before[name][1:]} -> {held[1:]}")
    assert min(callers.counts[kind] for kind in ("plain", "streamed", "failed", "left", "picture")) > 0
    assert callers.counts["stood still"] <= callers.counts.total() / 50
    check_keys(service)
    for name, held in after.items():
        # what is open follows the request of the moment; what leaks is one more for each of hundreds
        assert held.files <= before[name].files + 2 * CALLERS, name
        assert held.threads <= before[name].threads + 2 * CALLERS, name
        assert held.connections <= before[name].connections + 2 * CALLERS, name
        lapsing_mb = CLAIM_MB * asked if name == "redis" else 0
        assert held.memory_mb <= before[name].memory_mb * 1.10 + lapsing_mb, f"{name} grows"


def _over_after(callers: Callers, began: float) -> Callable[[float], bool]:
    def over(seconds: float) -> bool:
        if callers.failure is not None:
            raise callers.failure
        return _passed(began, seconds)

    return over
