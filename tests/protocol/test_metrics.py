"""protocol.metrics on a real Redis: what processes share, and for how long."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from protocol.metrics import METRICS_TTL_S, MetricStore, Snapshot, families_of, merged
from protocol.names import Keys


@pytest.fixture
def store(redis_client: Any, keys: Keys) -> MetricStore:
    return MetricStore(redis_client, keys)


def snapshot(process: str, count: float) -> Snapshot:
    registry = CollectorRegistry()
    counter = Counter("answers_total", "Answers.", ["kind"], registry=registry)
    counter.labels("good").inc(count)
    return Snapshot(labels={"web": process}, families=families_of(registry), web_id=process)


def exposition(snapshots: list[Snapshot]) -> list[str]:
    """The samples as Prometheus reads them."""

    class Collected(Collector):
        def collect(self) -> list[Metric]:
            return merged(snapshots)

    registry = CollectorRegistry()
    registry.register(Collected())
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("# HELP")]


def test_the_series_of_all_processes_are_one_metric(store: MetricStore) -> None:
    for process, count in (("a", 1), ("b", 5), ("a", 2)):
        store.write(process, snapshot(process, count))
    assert exposition(store.read_all()) == [
        "# TYPE answers_total counter",
        'answers_total{kind="good",web="a"} 2.0',
        'answers_total{kind="good",web="b"} 5.0',
    ]


def test_all_keys_expire_and_an_expired_process_is_forgotten(
    store: MetricStore, redis_client: Any, keys: Keys
) -> None:
    for process in "ab":
        store.write(process, snapshot(process, 1))
    for key in (keys.metrics, keys.metrics_of("a"), keys.metrics_of("b")):
        assert METRICS_TTL_S - 60 < redis_client.ttl(key) <= METRICS_TTL_S
    redis_client.delete(keys.metrics_of("a"))
    assert [found.web_id for found in store.read_all()] == ["b"]
    assert redis_client.smembers(keys.metrics) == {b"b"}


def test_what_another_version_wrote_hides_nothing(store: MetricStore, redis_client: Any, keys: Keys) -> None:
    store.write("a", snapshot("a", 1))
    store.write("b", snapshot("b", 1))
    redis_client.set(keys.metrics_of("a"), b'{"labels": 7}')
    assert [found.web_id for found in store.read_all()] == ["b"]
    assert store.read("a") is None and store.read("unknown") is None


def test_the_value_of_one_sample() -> None:
    found = snapshot("a", 3)
    assert found.value("answers_total", kind="good") == 3
    assert found.value("answers_total", kind="bad") == found.value("answers_total") == 0
