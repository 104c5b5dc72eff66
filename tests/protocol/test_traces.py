"""protocol.traces: what the log has of a collector that fails, and of one that works again."""

import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from protocol.traces import Traces
from tests.deployment import free_port


class Collector:
    """Answers every batch of spans with `status`."""

    def __init__(self) -> None:
        self.status = 200
        self.batches = 0
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                collector.batches += 1
                body = ExportTraceServiceResponse().SerializeToString()
                self.send_response(collector.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


def send_span(traces: Traces) -> None:
    """Send a batch of one span."""
    traces.begin("request", None, at_ns=time.time_ns()).end()
    assert traces._provider.force_flush()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


def test_a_failing_collector_is_told_of_once_and_so_is_its_return(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    traces = Traces(collector.url, process="web", instance="w")
    for status in (200, 400, 404, 400, 200, 200, 400):
        collector.status = status
        send_span(traces)
    traces.stop()
    assert collector.batches == 7
    failed, again, failed_again = lines(caplog)
    assert failed.startswith("the collector of traces does not take spans, so they are lost: ")
    assert "400" in failed
    assert again == "the collector of traces takes spans again"
    assert failed_again == failed


def test_a_collector_that_is_away_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    traces = Traces(f"http://127.0.0.1:{free_port()}", process="web", instance="w")
    for _ in range(2):
        send_span(traces)
    traces.stop()
    (line,) = lines(caplog)
    assert "Connection refused" in line
