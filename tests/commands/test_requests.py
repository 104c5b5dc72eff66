"""`flask --app wsgi requests ...` with a real worker that takes one request at a time."""

import os
import threading
from collections.abc import Iterator

import pytest

from tests.commands.conftest import flask, succeeds, table
from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until
from tests.faults.conftest import counted, read

WORKER = f"echo-1@{os.uname().nodename}"
PROMPT = "a-secret-prompt"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    catalogue = ECHO_CATALOGUE.format(step_ms=50, slots=1)
    with Deployment(tmp_path_factory.mktemp("requests"), catalogue=catalogue) as service:
        yield service.start("echo")


class Waiting:
    """A plain request in a thread, whose client sent an id of its own."""

    def __init__(self, service: Deployment) -> None:
        self.answer: tuple[int, str, str | None] | None = None
        self._thread = threading.Thread(target=self._call, args=(service,))
        self._thread.start()

    def _call(self, service: Deployment) -> None:
        body = (
            f'{{"model": "echo", "messages": [{{"role": "user", "content": "{PROMPT}"}}], "max_tokens": 3}}'
        )
        headers = {"Content-Type": "application/json"}
        response, connection = service.request("POST", "/v1/chat/completions", body.encode(), headers)
        text = response.read().decode()
        self.answer = response.status, text, response.headers["X-Should-Retry"]
        connection.close()

    def ended(self) -> tuple[int, str, str | None]:
        self._thread.join(60)
        assert self.answer is not None
        return self.answer


@pytest.mark.slow
def test_requests_are_listed_without_prompts_and_cancelled(service: Deployment) -> None:
    assert succeeds(service, "requests", "list") == "no request is open\n"
    (running,) = read(service, 2000)
    waiting, cancelled = Waiting(service), Waiting(service)
    wait_until(
        lambda: service.redis.client.zcard("Test:waiting:echo") == 2, timeout_s=20, what="two requests wait"
    )

    printed = succeeds(service, "requests", "list")
    assert PROMPT not in printed
    rows = table(printed)
    assert [(row["MODEL"], row["STATE"], row["WORKER"]) for row in rows] == [
        ("echo", "running", WORKER),
        ("echo", "waiting", "-"),
        ("echo", "waiting", "-"),
    ]
    assert all(row["ID"].startswith("cmpl-") and row["AGE"].endswith(" s") for row in rows)

    # a waiting one ends although no worker is free
    first, second, third = (row["ID"] for row in rows)
    assert succeeds(service, "requests", "cancel", third) == f"{third}: cancelled\n"
    wait_until(lambda: waiting.answer or cancelled.answer, timeout_s=20, what="a waiting request is answered")
    other, gone = (waiting, cancelled) if cancelled.answer else (cancelled, waiting)
    status, text, retry = gone.ended()
    assert status == 503 and "cancelled_by_operator" in text and retry == "false"
    assert not running.ended.is_set()

    succeeds(service, "requests", "cancel", first)
    running.wait_end(20)
    assert running.error is not None and running.error["error"]["code"] == "cancelled_by_operator"
    assert not running.done
    status, text, _ = other.ended()
    assert status == 200 and counted(3).strip() in text, "the slot is free for the next one"
    wait_until(
        lambda: not service.redis.client.exists("Test:running:echo", "Test:waiting:echo"),
        timeout_s=20,
        what="nothing is left",
    )

    for gone_id in (second, "cmpl-missing"):
        done = flask(service, "requests", "cancel", gone_id)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"Error: there is no open request '{gone_id}'; `requests list` shows them\n"
