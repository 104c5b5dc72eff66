"""GET /metrics of a gunicorn with two processes: whichever answers tells the sum of both."""

import re
from pathlib import Path

from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until

REQUESTS = 30


def counted(service: Deployment, route: str) -> int:
    """Responses of a route, as one of the processes tells them."""
    response, connection = service.request("GET", "/metrics")
    text = response.read().decode()
    connection.close()
    found = re.search(rf'^http_requests_total{{route="{route}",status="200"}} (\d+)', text, re.M)
    return int(float(found[1])) if found else 0


def test_two_processes_tell_one_truth(tmp_path: Path) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=2)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None, WEB_CONCURRENCY="2") as service:
        service.start("echo")
        for _ in range(REQUESTS):
            assert service.get("/v1/models")[0] == 200
        wait_until(
            lambda: counted(service, "/v1/models") == REQUESTS, timeout_s=20, what="all responses are counted"
        )
        assert {counted(service, "/v1/models") for _ in range(20)} == {REQUESTS}
