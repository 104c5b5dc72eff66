"""The supervisor's probe: whose answer counts."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from config import Settings
from supervise.readiness import Probe

ANSWERS: dict[str, Any] = {"/readyz": {"code": 0, "master_pid": 4711}}


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


LOADING = {"state": "loading", "registered": False, "last_error": ""}
WAITS = {"state": "ready", "registered": False, "last_error": ""}
REFUSED = {"state": "ready", "registered": False, "last_error": "could not register: code 1001"}
REGISTERED = {"state": "ready", "registered": True, "last_error": ""}


@pytest.mark.parametrize(
    ("workers", "answer"),
    [
        ([], ""),
        ([REGISTERED, LOADING], ""),
        ([REGISTERED, WAITS], None),
        ([WAITS, REFUSED], "could not register: code 1001"),
    ],
)
def test_what_keeps_workers_from_the_node(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, workers: list[dict[str, Any]], answer: str | None
) -> None:
    monkeypatch.setitem(ANSWERS, "/v1/workers", {"data": workers})
    assert probe.unregistered() == answer


def test_the_progress_tells_what_workers_under_drain_wait_for(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"model": "b", "state": "drained"}, {"model": "a", "state": "loading"}]
    monkeypatch.setitem(ANSWERS, "/v1/workers", {"data": rows})
    waited_for = "workers under drain wait for `flask --app wsgi workers resume --all`"
    assert probe.progress() == f"a: 1 loading; b: 1 drained; {waited_for}"
    monkeypatch.setitem(ANSWERS, "/v1/workers", {"data": rows[1:]})
    assert probe.progress() == "a: 1 loading"
