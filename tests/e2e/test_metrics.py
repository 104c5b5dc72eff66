"""GET /metrics of two web processes and three workers, scraped by a real Prometheus."""

import json
import re
from collections.abc import Iterator
from contextlib import closing

import pytest
import yaml

from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until
from tests.prometheus import MONITORING, Prometheus, fetch, promtool

REQUESTS = 30
COMPLETED = 'gpu_seconds_total{outcome="completed"}'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two web processes, two workers for chats of 20 ms a token, and one for images."""
    catalogue = ECHO_CATALOGUE.format(step_ms=20, slots=2)
    folder = tmp_path_factory.mktemp("metrics")
    with Deployment(folder, catalogue=catalogue, redis_server=None, WEB_CONCURRENCY="2") as service:
        yield service.start("echo", "echo", "echo-images")


@pytest.fixture(scope="module")
def prometheus(service: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    fetch()
    with Prometheus(tmp_path_factory.mktemp("prometheus"), service.port) as prometheus:
        yield prometheus


def scrape(service: Deployment) -> str:
    """What one of the processes tells."""
    response, connection = service.request("GET", "/metrics")
    with closing(connection):
        return response.read().decode()


def counted(service: Deployment, route: str) -> int:
    """Responses of a route by all web processes, as one of them tells them."""
    found = re.findall(
        rf'^http_requests_total{{route="{route}",status="200",web="\w+"}} (\S+)', scrape(service), re.M
    )
    return int(sum(map(float, found)))


def test_two_processes_tell_one_truth(service: Deployment) -> None:
    for _ in range(REQUESTS):
        assert service.get("/v1/models")[0] == 200
    wait_until(
        lambda: counted(service, "/v1/models") == REQUESTS, timeout_s=20, what="all responses are counted"
    )
    assert {counted(service, "/v1/models") for _ in range(20)} == {REQUESTS}


def test_prometheus_has_what_was_answered_and_what_was_for_nobody(
    service: Deployment, prometheus: Prometheus
) -> None:
    for _ in range(3):
        assert service.chat("Hi", "echo", max_tokens=5)[0] == 200
    assert service.post("/v1/images/generations", {"model": "echo-images", "prompt": "x", "n": 2})[0] == 200
    stream = service.stream("Hi", "echo")
    next(stream.events())
    stream.close()

    prometheus.wait_for('sum(request_success_total{model_name="echo",finished_reason="length"}) == 3')
    prometheus.wait_for('sum(request_success_total{model_name="echo-images",finished_reason="stop"}) == 1')
    prometheus.wait_for('sum(request_failure_total{model_name="echo",code="cancelled"}) == 1')
    prometheus.wait_for('images_total{model_name="echo-images"} == 2')
    prometheus.wait_for("image_steps_total == 4")
    prometheus.wait_for('sum(time_to_first_token_seconds_count{model_name="echo"}) == 4')
    prometheus.wait_for('sum(e2e_request_latency_seconds_count{model_name="echo"}) == 3')
    prometheus.wait_for('sum(generation_tokens_total{model_name="echo"}) > 15')
    prometheus.wait_for("sum(inter_token_latency_seconds_count) > 12")
    prometheus.wait_for('sum(gpu_seconds_total{outcome="cancelled"}) > 0')
    # 3 answers of 5 tokens, one after another: nobody else shared the GPU
    (spent,) = prometheus.wait_for(f'sum({COMPLETED[:-1]},model_name="echo"}})')
    assert float(spent["value"][1]) >= 3 * 5 * 0.02
    prometheus.wait_for('sum(workers{state="ready"}) == 3')
    prometheus.wait_for("count(engine_slots) == 3")


def test_the_exposition_pleases_promtool(service: Deployment, prometheus: Prometheus) -> None:
    text = scrape(service)
    promtool("check", "metrics", stdin=text)
    assert text.count("# TYPE") == len(set(re.findall(r"^# TYPE (\S+)", text, re.M)))


def test_dashboard_and_alerts_ask_for_what_there_is(service: Deployment, prometheus: Prometheus) -> None:
    dashboard = json.loads((MONITORING / "grafana/dashboards/modelservice.json").read_text())
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [rule["expr"] for rule in rules]
    known = set(re.findall(r"^# TYPE (\S+)", scrape(service), re.M))
    for expression in expressions:
        expression = expression.replace("$__rate_interval", "1m").replace("$model", ".*")
        prometheus.query(expression)
        names = set(re.findall(r"\b([a-z0-9]+(?:_[a-z0-9]+)+)(?=[{ )\[]|$)", expression))
        names -= {"histogram_quantile", "model_name", "finished_reason"}
        families = {re.sub(r"_bucket$", "", name) for name in names}
        assert families <= known, expression


def test_counters_outlive_a_killed_worker_and_what_it_ran_is_lost(
    service: Deployment, prometheus: Prometheus
) -> None:
    (before,) = prometheus.wait_for(f"sum({COMPLETED})")
    streams = [service.stream("Hi", "echo") for _ in range(4)]
    for stream in streams:
        next(stream.events())
    prometheus.wait_for("count(gpu_seconds_running > 1) == 2")
    victim = next(name for name in service.workers if name.startswith("echo-") and "images" not in name)
    service.workers[victim].end()
    prometheus.wait_for('workers{model_name="echo",state="lost"} == 1')
    prometheus.wait_for('sum(gpu_seconds_total{outcome="worker_lost"}) > 1')
    prometheus.wait_for('count(engine_slots{model_name="echo"}) == 1')
    (after,) = prometheus.query(f"sum({COMPLETED})")
    assert after["value"][1] == before["value"][1]

    service.start_worker("echo", victim)
    service.wait_worker(victim, "ready")
    prometheus.wait_for('count(engine_slots{model_name="echo"}) == 2')
    assert not prometheus.query('resets(gpu_seconds_total{outcome="worker_lost"}[5m]) > 0'), "the sum goes on"
