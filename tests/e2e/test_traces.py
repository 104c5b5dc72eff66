"""Traces of real processes, sent to a collector: one trace from the route to the last token."""

import re
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
SECRET = "a-secret-prompt"
JSON = {"Content-Type": "application/json"}


class Found(NamedTuple):
    """A span that a collector got."""

    process: str
    name: str
    trace_id: str
    id: str
    parent_id: str
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[str]
    failed: bool


class Collector:
    """Takes OTLP over HTTP as an OpenTelemetry collector does, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Found] = []
        self.raw = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def take(self, body: bytes) -> None:
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            process = next(
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            )
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                attributes = {
                    each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes
                }
                self.spans.append(
                    Found(
                        process,
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        attributes,
                        [event.name for event in span.events],
                        span.status.code == span.status.STATUS_CODE_ERROR,
                    )
                )

    def of(self, request_id: str) -> list[Found]:
        """The spans of the request's trace, in order of their beginning."""
        traces = {
            each.trace_id
            for each in self.spans
            if each.attributes.get("modelservice.request_id") == request_id
        }
        return sorted(
            (each for each in self.spans if each.trace_id in traces), key=lambda each: each.begin_ns
        )

    def wait_for(self, request_id: str, count: int = 3) -> list[Found]:
        wait_until(
            lambda: len(self.of(request_id)) == count, timeout_s=60, what=f"{count} spans of {request_id}"
        )
        return self.of(request_id)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Deployment]:
    catalogue = ECHO_CATALOGUE.format(step_ms=10, slots=1)
    folder: Path = tmp_path_factory.mktemp("traces")
    with Deployment(folder, catalogue=catalogue, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as service:
        yield service.start("echo", "echo-images")


def test_one_trace_from_the_route_to_the_last_token(service: Deployment, collector: Collector) -> None:
    body = f'{{"model": "echo", "stream": true, "max_tokens": 20, "messages": [{{"role": "user", "content": "{SECRET}"}}]}}'
    headers = {**JSON, "traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}
    response, connection = service.request("POST", "/v1/chat/completions", body.encode(), headers)
    with closing(connection):
        request_id = response.headers["X-Request-Id"]
        assert response.read().endswith(b"[DONE]\n\n")
    request, queue, job = collector.wait_for(request_id)

    assert {span.trace_id for span in (request, queue, job)} == {TRACE}
    assert request.parent_id == CLIENT_SPAN and queue.parent_id == job.parent_id == request.id
    assert [(span.process, span.name) for span in (request, queue, job)] == [
        ("modelservice-web", "POST /v1/chat/completions"),
        ("modelservice-worker", "queue"),
        ("modelservice-worker", "chat echo"),
    ]
    assert request.begin_ns <= queue.begin_ns <= queue.end_ns <= job.begin_ns
    assert job.end_ns - job.begin_ns >= 19 * 10_000_000, "it ends with the last token"
    assert request.end_ns - request.begin_ns >= 19 * 10_000_000, "so does that of a streamed response"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["http.route"] == "/v1/chat/completions"
    assert job.attributes["gen_ai.usage.output_tokens"] == 20 and job.events == ["first_token"]
    assert not any(span.failed for span in (request, queue, job))
    assert SECRET.encode() not in collector.raw


def test_a_request_without_a_trace_begins_one_and_a_failure_shows(
    service: Deployment, collector: Collector
) -> None:
    stream = service.stream("Hi", "echo")
    request_id = next(stream.events())["id"]
    stream.close()
    request, _, job = collector.wait_for(request_id)
    assert request.parent_id == "" and re.fullmatch("[0-9a-f]{32}", request.trace_id)
    assert job.failed and job.attributes["error.type"] == "cancelled"
    assert request.failed and request.attributes["modelservice.outcome"] == "cancelled"


def test_an_image_and_what_is_left_when_a_worker_stops(service: Deployment, collector: Collector) -> None:
    image = b'{"model": "echo-images", "prompt": "x", "n": 2}'
    response, connection = service.request("POST", "/v1/images/generations", image, JSON)
    with closing(connection):
        assert response.status == 200
        request_id = response.headers["X-Request-Id"]
    worker = next(process for name, process in service.workers.items() if "images" in name)
    worker.popen.terminate()
    assert worker.popen.wait(60) == 0
    _, _, job = collector.wait_for(request_id)
    assert job.name == "generation echo-images" and job.attributes["modelservice.images"] == 2


def test_a_collector_that_is_away_costs_no_request(tmp_path: Path) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=1)
    with Deployment(
        tmp_path, catalogue=catalogue, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"
    ) as service:
        service.start("echo")
        assert service.chat("Hi", "echo", max_tokens=3)[0] == 200
        for process in (service.workers["echo-1"], service.web):
            assert process is not None
            process.popen.terminate()
            assert process.popen.wait(60) == 0
