"""The supervisor's probe: whose answer counts."""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from config import Settings
from supervise.readiness import Probe

ANSWERS = {"/readyz": {"code": 0, "master_pid": 4711}}


class _Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(ANSWERS[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def probe() -> Iterator[Probe]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Web) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Probe(Settings(bind=f"127.0.0.1:{server.server_port}"))
        server.shutdown()
        thread.join()


def test_only_the_web_process_that_was_started_counts(probe: Probe) -> None:
    assert probe.ready(4711)
    assert not probe.ready(4712), "another service has the address"
