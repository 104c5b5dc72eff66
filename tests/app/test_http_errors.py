"""The headers of an error response."""

import pytest

from app.http.errors import error_response
from protocol.errors import EngineStopped, NoWorker, OutOfMemory, ServiceError, WorkerLost


@pytest.mark.parametrize("kind", [EngineStopped, OutOfMemory])
def test_what_would_fail_again_tells_clients_not_to_retry(kind: type[ServiceError]) -> None:
    response = error_response(kind())
    assert response.headers["X-Should-Retry"] == "false" and "again" not in kind().message


@pytest.mark.parametrize("error", [WorkerLost(), NoWorker("none serves it")])
def test_what_may_pass_leaves_the_retry_to_the_client(error: ServiceError) -> None:
    assert "X-Should-Retry" not in error_response(error).headers
