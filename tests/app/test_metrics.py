"""app.operations.metrics and process_metrics on a real Redis: each web process shows the metrics of the whole
deployment."""

import re
from typing import Any

import pytest
from flask import Flask
from prometheus_client import CollectorRegistry

from app.dispatch.request_metrics import RequestMetrics
from app.dispatch.timings import Timings
from app.dispatch.worker_view import WorkerView
from app.operations.metrics import DeploymentMetrics
from app.operations.process_metrics import ProcessMetrics
from config import Settings
from protocol.celery_app import create_celery
from protocol.event_router import EventRouter
from protocol.events import Delta, Finished, Started
from protocol.jobs import ChatJob, SamplingParams
from protocol.leases import GpuUsage, Leases
from protocol.metrics import Family, MetricStore, Snapshot
from protocol.names import Keys
from protocol.queue import JobQueue
from tests.deployment import RedisServer
from tests.records import worker_record


class Web:
    """One web process with a lease."""

    def __init__(self, server: RedisServer, keys: Keys, web_id: str, client: Any = None) -> None:
        redis = client or server.client
        self.leases = Leases(redis, keys)
        self.leases.renew_web(web_id)
        self.queue = JobQueue(redis, keys, create_celery(Settings(redis_url=server.url), keys), claim_ttl_s=9)
        self.worker_view = WorkerView(self.leases)
        self.worker_view.refresh()
        self.router = EventRouter(redis, keys, web_id)
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(self.registry)
        store = MetricStore(redis, keys)
        self.metrics = ProcessMetrics(self.registry, self.router, store, web_id=web_id)
        self.deployment = DeploymentMetrics(
            ["echo"], store, self.leases, self.queue, self.worker_view, publish=self.metrics.publish
        )
        app = Flask(web_id)
        self.metrics.init_app(app)
        app.add_url_rule("/answer/<name>", view_func=lambda name: name)
        self.client = app.test_client()

    def samples(self) -> dict[str, float]:
        """What a scrape of this process finds."""
        lines = self.deployment.render().decode().splitlines()
        found = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in found}


@pytest.fixture
def webs(redis_server: RedisServer, keys: Keys) -> tuple[Web, Web]:
    return Web(redis_server, keys, "a"), Web(redis_server, keys, "b")


def answers(samples: dict[str, float]) -> dict[str, float]:
    """Responses of the route, by web process."""
    name = r'http_requests_total{route="/answer/<name>",status="200",web="(\w)"}'
    return {match[1]: value for key, value in samples.items() if (match := re.fullmatch(name, key))}


def test_each_process_shows_both_and_no_counter_goes_back(webs: tuple[Web, Web]) -> None:
    one, two = webs
    one.client.get("/answer/x")
    two.client.get("/answer/made-up")
    assert answers(one.samples()) == {"a": 1}, "the other one has not published yet"
    assert answers(two.samples()) == {"a": 1, "b": 1}
    one.client.get("/answer/y")
    assert answers(two.samples()) == {"a": 1, "b": 1}
    assert answers(one.samples()) == {"a": 2, "b": 1}
    assert answers(two.samples()) == {"a": 2, "b": 1}, "what one scrape has shown, the next one shows too"


def test_of_an_ended_process_the_counters_stay_and_the_gauges_go(webs: tuple[Web, Web]) -> None:
    one, two = webs
    two.client.get("/answer/x")
    two.router.open("r", "echo")
    assert two.samples()['requests_open{web="b"}'] == 1
    two.leases.release_web("b")
    found = one.samples()
    assert answers(found) == {"b": 1}
    assert 'requests_open{web="a"}' in found and 'requests_open{web="b"}' not in found


def test_times_of_requests_and_refusals(webs: tuple[Web, Web]) -> None:
    one, two = webs
    now = 0.0
    timings = Timings(one.requests.times_of("echo"), clock=lambda: now)
    for at, event in ((2.0, Started("w:1")), (5.0, Delta("x")), (6.0, Delta("y"))):
        now = at
        timings.note([event])
    now = 9.0
    timings.note([Finished()])
    timings.end(finished=True)
    timings.end(finished=True)
    failed = Timings(one.requests.times_of("echo"), clock=lambda: now)
    failed.end(finished=False)
    one.requests.rejected("echo", "overloaded")
    one.metrics.publish()
    found = two.samples()
    labels = '{model_name="echo",web="a"}'
    times = {
        "request_queue_time_seconds": 2,
        "request_prefill_time_seconds": 3,
        "time_to_first_token_seconds": 5,
        "request_decode_time_seconds": 4,
        "e2e_request_latency_seconds": 9,
    }
    assert {name: found[f"{name}_sum{labels}"] for name in times} == times
    assert {found[f"{name}_count{labels}"] for name in times} == {1}
    assert found['admission_rejections_total{code="overloaded",model_name="echo",web="a"}'] == 1


def test_gauges_of_workers_and_queue(webs: tuple[Web, Web]) -> None:
    one, _ = webs
    gpu = GpuUsage(memory_used_bytes=3, memory_total_bytes=8, utilization=0.5)
    fields: dict[str, Any] = {"state": "ready", "running": 2, "slots": 4, "kv_cache_usage": 0.25, "gpu": gpu}
    one.leases.seize_worker(worker_record("w", node="http://n", registered=True, **fields))
    one.leases.seize_worker(worker_record("e", node="http://n", model="vectors", tasks=("embedding",)))
    one.leases.seize_worker(worker_record("v", state="loading"))
    one.leases.release_worker(worker_record("v", state="loading"), keep_record=True)
    for name in "xyz":
        job = ChatJob(id=name, model="echo", messages=[], sampling=SamplingParams())
        one.queue.admit(job, web_id="a", deadline_s=60, max_waiting=9)
    one.worker_view.refresh()
    found = {name: value for name, value in one.samples().items() if "web=" not in name}
    of_worker = '{cid="w",model_name="echo"}'
    assert 'node_registered{cid="e",model_name="vectors"}' not in found, "no node knows its task"
    found = {name: value for name, value in found.items() if "vectors" not in name}
    assert found == {
        "redis_up": 1,
        'workers{model_name="echo",state="ready"}': 1,
        'workers{model_name="echo",state="lost"}': 1,
        'num_requests_waiting{model_name="echo"}': 3,
        f"num_requests_running{of_worker}": 2,
        f"engine_slots{of_worker}": 4,
        f"kv_cache_usage_perc{of_worker}": 0.25,
        f"node_registered{of_worker}": 1,
        f"gpu_memory_used_bytes{of_worker}": 3,
        f"gpu_memory_total_bytes{of_worker}": 8,
        f"gpu_utilization{of_worker}": 0.5,
    }


def worker_snapshot(running_s: float) -> Snapshot:
    lost = ("gpu_seconds_total", {"outcome": "worker_lost"}, 1.0)
    completed = ("gpu_seconds_total", {"outcome": "completed"}, 7.0)
    return Snapshot(
        labels={"model_name": "echo", "cid": "w"},
        families=[
            Family("gpu_seconds", "Seconds.", "counter", [completed, lost]),
            Family("gpu_seconds_running", "Running.", "gauge", [("gpu_seconds_running", {}, running_s)]),
        ],
        incarnation_id="w:1",
    )


def test_what_a_lost_worker_ran_counts_as_lost(
    webs: tuple[Web, Web], redis_server: RedisServer, keys: Keys
) -> None:
    one, _ = webs
    record = worker_record("w", state="ready")
    one.leases.seize_worker(record)
    MetricStore(redis_server.client, keys).write("w", worker_snapshot(5.0))
    one.worker_view.refresh()
    lost = 'gpu_seconds_total{cid="w",model_name="echo",outcome="worker_lost"}'
    running = 'gpu_seconds_running{cid="w",model_name="echo"}'
    found = one.samples()
    assert (found[lost], found[running]) == (1, 5)
    one.leases.release_worker(record, keep_record=True)
    one.worker_view.refresh()
    found = one.samples()
    assert found[lost] == 6 and running not in found
    assert found['gpu_seconds_total{cid="w",model_name="echo",outcome="completed"}'] == 7


def test_streams_go_on_while_many_metrics_are_written(
    webs: tuple[Web, Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = webs
    two.metrics.publish()
    pauses: list[float] = []
    monkeypatch.setattr("protocol.metrics.time.sleep", pauses.append)
    families = one.deployment.render().count(b"# TYPE")
    own = len(list(one.registry.collect()))
    assert pauses == [0] * (own + families)


def test_without_redis_no_counter_looks_smaller(tmp_path: Any, keys: Keys) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        web = Web(server, keys, "a")
        web.client.get("/answer/x")
        assert answers(web.samples()) == {"a": 1}
        server.kill()
        assert web.samples() == {"redis_up": 0}
    finally:
        server.stop()
