"""workers.metrics on a real Redis: what a worker counts, and what an earlier incarnation lost."""

from typing import Any, cast

import pytest

from protocol.events import Delta, Event, Failed, Finished, ImageReady, Progress, Usage
from protocol.metrics import GPU_SECONDS, MetricStore, Snapshot
from protocol.names import Keys
from tests.records import worker_record
from workers.engines.base import Engine, EngineCounts, EngineStatus
from workers.engines.token_gaps import TokenGaps
from workers.gpu_time import GpuTime
from workers.job_log import JobLog
from workers.metrics import WorkerMetrics


class CountingEngine:
    """An engine that has counted something."""

    def __init__(self) -> None:
        self.gaps = TokenGaps()
        self.counts = True

    def status(self) -> EngineStatus:
        if not self.counts:
            return EngineStatus(True, 0, 0, 0)
        counts = EngineCounts(70, 30, 70, 20, 1, self.gaps)
        return EngineStatus(True, 0, 0, 0, counts=counts)


class Bench:
    """A worker's metrics, with a clock of its own."""

    def __init__(self, store: MetricStore, incarnation: int = 1) -> None:
        self.now = 0.0
        self.store = store
        self.engine = CountingEngine()
        self.gpu_time = GpuTime(lambda: self.now)
        identity = worker_record(incarnation_id=f"cid:{incarnation}")
        self.metrics = WorkerMetrics(identity, cast(Engine, self.engine), self.gpu_time, store)

    def job(self, *events: Event, gpu_s: float | None = None) -> None:
        log = JobLog("r", "echo", None, None)
        for event in events:
            log.observe(event)
        log.gpu_s = gpu_s
        self.metrics.ended(log)

    def published(self) -> Snapshot:
        self.metrics.publish()
        found = self.store.read("cid")
        assert found is not None
        return found


@pytest.fixture
def store(redis_client: Any, keys: Keys) -> MetricStore:
    return MetricStore(redis_client, keys)


@pytest.fixture
def bench(store: MetricStore) -> Bench:
    return Bench(store)


def test_requests_are_counted_by_how_they_ended(bench: Bench) -> None:
    for reason in ("stop", "length", "length"):
        bench.job(Delta("x", finish_reason=reason), Finished(Usage(1, 1)), gpu_s=0.5)
    bench.job(Failed("cancelled", "gone"), gpu_s=2)
    bench.job(Failed("engine_error", "refused before the engine had it"))
    found = bench.published()
    assert found.labels == {"model_name": "echo", "cid": "cid"}
    assert found.value("request_success_total", finished_reason="stop") == 1
    assert found.value("request_success_total", finished_reason="length") == 2
    assert found.value("request_failure_total", code="cancelled") == 1
    assert found.value("request_failure_total", code="engine_error") == 1
    assert found.value(GPU_SECONDS, outcome="completed") == 1.5
    assert found.value(GPU_SECONDS, outcome="cancelled") == 2


def test_images_and_steps_count_also_where_the_rest_failed(bench: Bench) -> None:
    image = ImageReady(0, 0, 64, 64)
    bench.job(Progress(1, 8), Progress(8, 8), image, image, Finished(), gpu_s=1)
    bench.job(Progress(3, 8), Failed("cancelled", "gone"), gpu_s=1)
    found = bench.published()
    assert found.value("images_total") == 2 and found.value("image_steps_total") == 11
    assert found.value("request_success_total", finished_reason="stop") == 1


def test_what_the_engine_counts(bench: Bench) -> None:
    bench.engine.gaps.add(0.02, 8)
    bench.engine.gaps.add(60.0, 1)
    found = bench.published()
    names = (
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
    )
    assert [found.value(f"{name}_total") for name in names] == [70, 30, 70, 20, 1]
    gaps = "inter_token_latency_seconds"
    assert [found.value(f"{gaps}_bucket", le=le) for le in ("0.01", "0.025", "10.0", "+Inf")] == [0, 8, 8, 9]
    assert found.value(f"{gaps}_count") == 9 and found.value(f"{gaps}_sum") == pytest.approx(60.16)


def test_what_a_killed_incarnation_ran_is_lost_in_the_next_one(bench: Bench, store: MetricStore) -> None:
    bench.gpu_time.start("a")
    bench.now += 4
    bench.published()
    second = Bench(store, incarnation=2)
    assert second.published().value(GPU_SECONDS, outcome="worker_lost") == 4
    assert second.published().value(GPU_SECONDS, outcome="worker_lost") == 4, "once"
    third = Bench(store, incarnation=3)
    assert third.published().value(GPU_SECONDS, outcome="worker_lost") == 4, "the sum goes on"


def test_what_ran_while_a_worker_counted_as_lost_is_lost(bench: Bench) -> None:
    bench.gpu_time.start("a")
    bench.now += 3
    bench.metrics.write_off_running()
    found = bench.published()
    assert found.value(GPU_SECONDS, outcome="worker_lost") == 3
    assert found.value("gpu_seconds_running") == 0


def test_tokens_of_an_engine_that_counts_none_are_those_of_its_requests(bench: Bench) -> None:
    bench.engine.counts = False
    bench.job(Finished(Usage(12, 0)), gpu_s=1)
    bench.job(Finished(), gpu_s=1)
    found = bench.published()
    assert found.value("prompt_tokens_total") == 12
    assert not [family for family in found.families if family.name == "generation_tokens"]
