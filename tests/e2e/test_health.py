"""GET /health, /ping and /version, as vLLM's clients and load balancers ask them."""

import http.client
import signal
from contextlib import closing
from pathlib import Path

from config import VERSION
from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until

CATALOGUE = ECHO_CATALOGUE.format(step_ms=50, slots=2)
PROBES = ("/health", "/ping")


def statuses(service: Deployment) -> list[int]:
    """The statuses of both probes, whose responses must have no body."""
    found = []
    for path in PROBES:
        response, connection = service.request("GET", path)
        with closing(connection):
            assert response.read() == b""
            assert response.headers["Content-Length"] == "0" and response.headers["Content-Type"] is None
            found.append(response.status)
    return found


def test_health_tells_whether_a_model_can_be_served(tmp_path: Path) -> None:
    with Deployment(tmp_path, catalogue=CATALOGUE) as service:
        service.start()
        assert statuses(service) == [503, 503], "there is no worker yet"
        assert service.get("/version") == (200, {"version": VERSION})

        service.start_worker("echo")
        service.wait_ready("echo")
        assert statuses(service) == [200, 200]
        assert service.get("/readyz")[0] == 503, "the other model of the catalogue has no worker"

        service.redis.kill()
        wait_until(
            lambda: statuses(service) == [503, 503], timeout_s=20, what="/health sees that Redis is gone"
        )
        assert service.get("/healthz")[0] == 200


def test_a_process_that_stops_is_taken_out_of_service(tmp_path: Path) -> None:
    with Deployment(tmp_path, catalogue=CATALOGUE) as service:
        service.start("echo")
        stream = service.stream("Hi", "echo", max_tokens=100)
        next(stream.events())
        with closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)) as kept:

            def status() -> int:
                kept.request("GET", "/health")
                response = kept.getresponse()
                assert response.read() == b""
                return response.status

            assert status() == 200
            assert service.web is not None
            service.web.signal(signal.SIGTERM)
            wait_until(lambda: status() == 503, timeout_s=20, what="a kept connection sees the stop")
        assert len(stream.text().split()) == 100 and stream.done, "what ran goes on"
