"""A soak test: memory, files, threads, connections and keys stay bounded.

It runs for a minute; SOAK_MINUTES=10 in the environment makes it longer.
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
from tests.faults.test_clients import JSON, chat_body, waiting

MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))
WARM_UP_S = 20 if MINUTES < 5 else 150  # a long run: until claims expire as fast as new ones come
CLAIM_MB = 0 if MINUTES > 5 else 0.5 / 1024
"""For each request, in a run shorter than a claim lives. A replay list of ten tokens is four times that."""
CLIENTS = 4

PERMANENT = ("_kombu.binding", "workers", "worker:", "lease:", "web:")
"""Keys that a deployment has also when it is idle. All others must have a TTL."""

TRANSIENT = ("job:", "waiting:", "events:", "model.")
"""Keys that must be gone when nothing runs."""


class Held(NamedTuple):
    """What a process holds of the machine."""

    memory_mb: float
    files: int
    threads: int
    connections: int


def paused(status: int, answer: Any) -> bool:
    """Whether Redis, or the whole machine, paused for longer than a command may take."""
    return status == 503 and answer["error"]["code"] == "queue_unavailable"


class Clients:
    """Four clients that send requests: one in a hundred fails in the engine, one in a hundred is closed."""

    def __init__(self, service: Deployment) -> None:
        self.counts: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._service = service
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._requests, args=(n,)) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        if self.failure is not None:
            raise self.failure

    def _requests(self, client: int) -> None:
        number = client * 25
        try:
            while not self._stop.is_set():
                number += 1
                self.counts[self._one(number)] += 1
        except BaseException as error:
            self.failure = error

    def _one(self, number: int) -> str:
        service = self._service
        if number % 100 == 0:
            status, answer = service.chat("raise", "echo")
            if paused(status, answer):
                return "paused"
            assert (status, answer["error"]["code"]) == (500, "engine_error"), answer
            return "failed"
        if number % 100 == 50:
            response, connection = service.request(
                "POST", "/v1/chat/completions", chat_body(50_000, stream=True), JSON
            )
            response.readline()
            response.close()
            connection.close()
            return "closed"
        if number % 20 == 10:
            body = {"model": "echo-images", "prompt": "x"}
            status, answer = service.post("/v1/images/generations", body)
            if paused(status, answer):
                return "paused"
            assert status == 200, answer
            return "image"
        if number % 2:
            status, answer = service.chat("count", "echo", max_tokens=10)
            if paused(status, answer):
                return "paused"
            assert status == 200, answer
            assert answer["choices"][0]["message"]["content"] == counted(10)
            return "plain"
        response, connection = service.request(
            "POST", "/v1/chat/completions", chat_body(10, stream=True), JSON
        )
        text = response.read()
        connection.close()
        if response.status != 200 and paused(response.status, json.loads(text)):
            return "paused"
        lines = text.split(b"\n\n")
        assert lines[-2] == b"data: [DONE]", lines[-3:]
        assert json.loads(lines[0].removeprefix(b"data: "))["choices"][0]["delta"]["role"] == "assistant"
        return "streamed"


def processes(service: Deployment) -> dict[str, psutil.Process]:
    """Return every process of the deployment by name."""
    assert service.web is not None and service.redis.process is not None
    master = psutil.Process(service.web.pid)
    found = {"redis": psutil.Process(service.redis.process.pid), "gunicorn": master}
    found |= {f"web {n}": child for n, child in enumerate(master.children())}
    return found | {name: psutil.Process(worker.pid) for name, worker in service.workers.items()}


def measure(service: Deployment) -> dict[str, Held]:
    """Return what each process holds; the memory is the median of five seconds."""
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
    """Wait until nothing runs and nothing is queued; return the keys without the namespace."""
    wait_until(
        lambda: service.running_tasks() == 0 and not waiting(service), timeout_s=30, what="all is done"
    )

    def quiet() -> list[str] | None:
        keys = [key.decode().partition(":")[2] for key in service.redis.client.scan_iter("*", count=1000)]
        return None if any(key.startswith(TRANSIENT) for key in keys) else keys

    return wait_until(quiet, timeout_s=20, what=f"no key of {TRANSIENT} is left") or []


def check_keys(service: Deployment) -> None:
    leaked = [
        key
        for key in settle(service)
        if not key.startswith(PERMANENT) and service.redis.client.ttl(f"Test:{key}") == -1
    ]
    assert not leaked, f"keys without a TTL: {leaked[:10]}"


@pytest.mark.slow
@pytest.mark.timeout(360 + MINUTES * 60)
def test_nothing_accumulates(start: Starter) -> None:
    deadlines = {f"{kind}_DEADLINE_S": "10" for kind in ("CHAT", "GENERATION", "EDIT")}
    service = start(step_ms=5, slots=8, IMAGE_TTL_S="20", IMAGE_STORE_MB="1", **deadlines)
    service.start_worker("echo-images")
    service.wait_ready("echo", "echo-images")
    began = time.monotonic()
    clients = Clients(service)
    try:
        run = _ended_after(clients, began)
        wait_until(partial(run, WARM_UP_S), timeout_s=WARM_UP_S + 10, what="warm-up")
        before = measure(service)
        asked_before = clients.counts.total()
        wait_until(partial(run, MINUTES * 60), timeout_s=MINUTES * 60 + 10, what="the soak")
        after = measure(service)
        asked = clients.counts.total() - asked_before
    finally:
        clients.end()
    print(dict(clients.counts))
    for name, held in after.items():
        grown = held.memory_mb / before[name].memory_mb - 1
        print(f"{name:16} {held.memory_mb:7.1f} MB ({grown:+.1%})  {before[name][1:]} -> {held[1:]}")
    assert min(clients.counts[kind] for kind in ("plain", "streamed", "failed", "closed", "image")) > 0
    assert clients.counts["paused"] <= clients.counts.total() / 50
    check_keys(service)
    for name, held in after.items():
        # What is open varies with the running requests; a leak adds one for each of hundreds.
        assert held.files <= before[name].files + 2 * CLIENTS, name
        assert held.threads <= before[name].threads + 2 * CLIENTS, name
        assert held.connections <= before[name].connections + 2 * CLIENTS, name
        expiring_mb = CLAIM_MB * asked if name == "redis" else 0
        assert held.memory_mb <= before[name].memory_mb * 1.10 + expiring_mb, f"{name} grows"


def _ended_after(clients: Clients, began: float) -> Callable[[float], bool]:
    def ended(seconds: float) -> bool:
        if clients.failure is not None:
            raise clients.failure
        return _passed(began, seconds)

    return ended
