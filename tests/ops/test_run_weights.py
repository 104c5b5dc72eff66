"""`scripts/run` while the weights of a model are away for a while, or are replaced by others that can't be
served."""

import http.client
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from supervise.alarms import FAILED_STARTS
from tests.deployment import ROOT, wait_until
from tests.ops.running import Run

CATALOGUE = """
project = "Run"
[[models]]
name = "demo"
tasks = ["chat"]
weights = "{weights}"
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return shutil.copytree(ROOT / "demo" / "models" / "chat", tmp_path / "disk" / "chat")


@pytest.fixture
def run(tmp_path: Path, weights: Path) -> Iterator[Run]:
    run = Run(tmp_path, models=CATALOGUE.format(weights=weights))
    try:
        run.until_printed(r"READY http://")
        yield run
    finally:
        run.stop()


def kill_worker(run: Run) -> None:
    (worker,) = run.workers()
    os.kill(worker.pid, signal.SIGKILL)


def wait_warning(run: Run, words: str) -> None:
    """Wait until /readyz warns of it."""
    wait_until(
        lambda: any(words in warning for warning in run.get("/readyz")[1]["warnings"]),
        timeout_s=90,
        what=f"a warning of {words!r}",
    )


def answers(run: Run) -> bool:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
    with closing(http.client.HTTPConnection(run.bind, timeout=60)) as connection:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        return connection.getresponse().status == 200


@pytest.mark.slow
def test_a_model_whose_weights_are_away_for_a_while_comes_back_by_itself(run: Run, weights: Path) -> None:
    assert answers(run)
    disk = weights.parent
    disk.rename(disk.with_name("elsewhere"))
    kill_worker(run)
    run.until_printed(r"the folder \S+/chat is missing, empty or can't be read; a later start may succeed")
    run.until_printed(r"exited with status 75, for a reason that may pass; restarting in")
    wait_warning(run, "ends again and again before it is ready; it exited with status 75")
    assert run.output.count("restarting in") >= FAILED_STARTS
    run.until_printed(r"ALARM: demo-1 on \S+ ends again and again .*the folder \S+/chat is missing")

    disk.with_name("elsewhere").rename(disk)
    wait_until(run.ready, timeout_s=90, what="ready")
    assert answers(run)
    wait_until(lambda: not run.get("/readyz")[1]["warnings"], timeout_s=60, what="no warning is left")


@pytest.mark.slow
def test_weights_that_a_person_must_correct_are_an_alarm(run: Run, weights: Path) -> None:
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps({**config, "model_type": "t5", "architectures": ["T5"]}))
    kill_worker(run)
    run.until_printed(r"exited with status 78, a configuration error; not restarted")
    wait_warning(run, "does not run: demo: T5 is an encoder-decoder model")
    run.until_printed(r"ALARM: demo-1 on \S+ does not run: demo: T5 is an encoder-decoder model")
    assert run.get("/readyz")[0] == 503
