"""app.dispatch.dispatcher.Dispatcher on a real Redis: how many requests are admitted at the same time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from app.dispatch import dispatcher
from app.dispatch.dispatcher import Dispatcher
from app.dispatch.request_metrics import RequestMetrics
from app.dispatch.worker_view import WorkerView
from catalogue import CHAT
from config import Settings
from protocol.celery_app import create_celery
from protocol.connections import connect_redis
from protocol.errors import Overloaded, QueueUnavailable
from protocol.event_router import EventRouter
from protocol.jobs import ChatJob, SamplingParams
from protocol.leases import Leases
from protocol.names import Keys
from protocol.open_requests import OpenRequests
from protocol.queue import JobQueue
from tests.deployment import RedisServer, wait_until
from tests.records import worker_record


class Client:
    def disconnected(self) -> bool:
        return False


class Web:
    """A dispatcher that admits one request at a time, and may be told that Redis is gone."""

    def __init__(self, server: RedisServer, keys: Keys) -> None:
        settings = Settings(redis_url=server.url)
        client = connect_redis(settings)
        leases = Leases(client, keys)
        leases.seize_worker(worker_record(state="ready"))
        worker_view = WorkerView(leases)
        worker_view.refresh()
        self.redis = server.client
        self.queue = JobQueue(client, keys, create_celery(settings, keys), claim_ttl_s=100)
        self.connected = True
        self.dispatcher = Dispatcher(
            settings,
            web_id="w",
            queue=self.queue,
            router=EventRouter(client, keys, "w"),
            worker_view=worker_view,
            requests=OpenRequests(client, keys, mark_ttl_s=100),
            metrics=RequestMetrics(CollectorRegistry()),
            connected=lambda: self.connected,
            draining_for_s=lambda: 0.0,
        )

    def begin(self, name: str) -> float:
        job = ChatJob(id=name, model="echo", messages=[], sampling=SamplingParams())
        return self.dispatcher.begin(job, CHAT, Client())._inbox.admitted

    def pause(self) -> None:
        """Keep Redis from answering commands that write, until `go_on`."""
        self.redis.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")

    def go_on(self) -> None:
        self.redis.execute_command("CLIENT", "UNPAUSE")


@pytest.fixture
def web(redis_server: RedisServer, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(dispatcher, "ADMISSIONS", 1)
    web = Web(redis_server, keys)
    yield web
    web.go_on()


def blocked(web: Web) -> int:
    """The number of requests whose admission waits for Redis."""
    found: Any = web.redis.info("clients")
    return int(found["blocked_clients"])


def waiting(web: Web) -> int:
    """The number of requests that wait for their turn. `begin` has made its first checks by then."""
    turns: Any = web.dispatcher._admissions
    return len(turns._cond._waiters)


def test_a_burst_is_admitted_one_after_another(web: Web) -> None:
    web.pause()
    with ThreadPoolExecutor(8) as pool:
        burst = [pool.submit(web.begin, str(number)) for number in range(8)]
        wait_until(lambda: blocked(web) + waiting(web) == 8, timeout_s=60, what="the burst has begun")
        at_once = blocked(web)
        web.go_on()
        assert all(one.result(60) for one in burst)
    assert at_once == 1


def test_a_request_whose_turn_does_not_come_is_told_of_the_burst(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "ADMISSION_WAIT_S", 0.05)
    web.pause()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(web.begin, "first")
        wait_until(lambda: blocked(web), timeout_s=60, what="the first request waits for Redis")
        with pytest.raises(Overloaded, match="too many requests arrived at once"):
            web.begin("second")
        web.go_on()
        assert first.result(60)


def test_a_request_that_waited_for_its_turn_asks_no_redis_that_is_gone(web: Web) -> None:
    web.pause()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(web.begin, "first")
        wait_until(lambda: blocked(web), timeout_s=60, what="the first request waits for Redis")
        second = pool.submit(web.begin, "second")
        wait_until(lambda: waiting(web), timeout_s=60, what="the second request waits for its turn")
        web.connected = False
        web.go_on()
        assert first.result(60)
        with pytest.raises(QueueUnavailable):
            second.result(60)


def test_a_request_that_may_have_been_admitted_is_cancelled_when_redis_answers(web: Web) -> None:
    web.pause()
    with ThreadPoolExecutor(1) as pool:
        admission = pool.submit(web.begin, "a")
        wait_until(lambda: blocked(web), timeout_s=60, what="the request waits for Redis")
        web.redis.execute_command("CLIENT", "KILL", "TYPE", "normal")
        with pytest.raises(QueueUnavailable):
            admission.result(60)
    assert web.queue.cancelled(["a"]) == set()
    web.go_on()
    web.queue.sweep()
    assert web.queue.cancelled(["a"]) == {"a"}
