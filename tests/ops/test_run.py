"""`scripts/run` with the real web process, workers and embedded Redis, on the echo engine."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from config import Settings
from supervise.readiness import Probe
from tests.deployment import ROOT, free_port, wait_until
from tests.ops.running import CATALOGUE, READY_S, Run, command_of
from tests.ops.stand_ins import alive
from tests.stand_in_node import StandInNode


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    try:
        run.until_printed(r"READY http://")
        yield run
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            run.process.send_signal(signal.SIGINT)
            run.process.wait(60)
        # A killed supervisor leaves these files behind.
        shutil.rmtree(ROOT / ".run" / run.bind.rpartition(":")[2], ignore_errors=True)


def test_output_that_nobody_reads_stops_neither_the_service_nor_its_end(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(CATALOGUE)
    bind = f"127.0.0.1:{free_port()}"
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 4096)
    os.set_blocking(write_end, True)
    process = subprocess.Popen(
        [ROOT / "scripts" / "run", tmp_path / "models.toml"],
        env={**os.environ, "BIND": bind, "NODE_URL": "", "REDIS_URL": ""},
        stdout=write_end,
        stderr=write_end,
    )
    os.close(write_end)
    try:
        wait_until(Probe(Settings(bind=bind)).ready, timeout_s=READY_S, what="ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(read_end)


def test_nohup_survives_its_terminal(tmp_path: Path) -> None:
    run = Run(tmp_path, "nohup")
    try:
        run.until_printed(r"READY http://")
        run.process.send_signal(signal.SIGHUP)
        run.process.send_signal(signal.SIGCONT)
        wait_until(run.ready, timeout_s=30, what="ready")
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(60) == 0
        assert run.output.count("stopping:") == 1
    finally:
        run.process.kill()
        run.process.wait()


def test_workers_log_what_they_loaded_but_no_task(started: Run) -> None:
    started.until_printed(r"echo-1 +\| .*echo answered the canary request, [0-9.]+ s after the start")
    assert "received" not in started.output


def test_as_json_every_line_of_every_process_is_an_object(tmp_path: Path) -> None:
    run = Run(tmp_path, LOG_FORMAT="json")
    try:
        run.until_printed(r"READY http://")
        with contextlib.closing(run.stream(3)) as stream:
            assert stream.text()
        worker = run.workers()[0]
        worker.kill()
        run.until_printed(r"killed by SIGKILL; restarting")
    finally:
        run.stop()
    lines = [json.loads(line) for line in run.output.splitlines()]
    for line in lines:
        assert line.keys() >= {"time", "level", "process", "message"}
    assert {line["process"] for line in lines} >= {"run", "web", "echo-1", "echo-2"}


@pytest.fixture
def node() -> Iterator[StandInNode]:
    with StandInNode() as node:
        yield node


@pytest.mark.parametrize(("host", "loopback"), [("0.0.0.0", "127.0.0.1"), ("[::]", "[::1]")])
def test_a_service_that_listens_on_every_address_is_registered_at_the_loopback(
    tmp_path: Path, node: StandInNode, host: str, loopback: str
) -> None:
    port = free_port()
    run = Run(tmp_path, NODE_URL=node.url, BIND=f"{host}:{port}")
    try:
        ready = run.until_printed(r"READY (\S+)/v1 .*")
        assert ready[1] == f"http://{loopback}:{port}"
        node.wait_for(lambda node: len(node.entries()) == 2, 30)
        assert {entry["api"] for entry in node.entries()} == {f"{ready[1]}/v1/chat/completions"}
    finally:
        run.stop()


def test_the_ready_line_and_readyz_say_what_the_node_refuses(tmp_path: Path, node: StandInNode) -> None:
    node.behave("refusing", code=1001)
    run = Run(tmp_path, NODE_URL=node.url)
    try:
        assert "1001" in run.until_printed(r"READY .* not registered with the node: .*")[0]
        with urllib.request.urlopen(f"http://{run.bind}/readyz", timeout=20) as answer:
            warnings = json.load(answer)["warnings"]
        assert [warning for warning in warnings if "is not registered" in warning and "1001" in warning]
    finally:
        run.stop()


ON_ONE_GPU = """
project = "Run"
[[models]]
name = "twice"
tasks = ["chat"]
weights = "echo:"
workers = [[0], [0]]
[[models]]
name = "beside"
tasks = ["chat"]
weights = "echo:"
"""


def test_workers_that_share_a_gpu_have_cids_of_their_own(tmp_path: Path, node: StandInNode) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho GPU-1\n")
    driver.chmod(0o755)
    run = Run(
        tmp_path,
        models=ON_ONE_GPU,
        NODE_URL=node.url,
        CUDA_VISIBLE_DEVICES="GPU-1",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        WORKER_CID="copied",
    )
    try:
        run.until_printed(r"READY http://")
        node.wait_for(lambda node: len(node.cids("Run")) == 3, 30)
        with urllib.request.urlopen(f"http://{run.bind}/v1/workers", timeout=20) as answer:
            rows = json.load(answer)["data"]
        assert [row["gpus"] for row in rows] == [["GPU-1"]] * 3
        assert len({row["cid"] for row in rows}) == 3
        run.until_printed(r"twice-1 .*is present at the node")
    finally:
        run.stop()


def test_from_ready_to_one_ctrl_c(started: Run) -> None:
    wait_until(started.ready, timeout_s=30, what="ready")
    url_file = Path(started.until_printed(r"REDIS_URL for other terminals: (\S+)")[1])
    assert stat.S_IMODE(url_file.stat().st_mode) == 0o600
    with redis.Redis.from_url(url_file.read_text().strip()) as client:
        assert client.ping()
    processes = [process.pid for process in started.processes()]
    assert len(processes) >= 5, "redis, gunicorn's master and worker, two workers"

    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(60) == 0
    assert not [pid for pid in processes if alive(pid)]
    assert not url_file.exists()
    assert "did not stop in time" not in started.output


@pytest.mark.parametrize("all_at_once", [False, True], ids=["to the supervisor", "to all processes"])
def test_running_streams_complete_after_sigterm(tmp_path: Path, node: StandInNode, all_at_once: bool) -> None:
    """systemd sends SIGTERM to the main process or, with KillMode=control-group, to all at once."""
    slow = CATALOGUE.replace("echo:", "echo:step_ms=20&tokens=1000")
    run = Run(tmp_path, models=slow, NODE_URL=node.url, DRAIN_S="30")
    try:
        run.until_printed(r"READY http://")
        node.wait_for(lambda node: len(node.entries()) == 2, 30)
        processes = [process.pid for process in run.processes()]
        stream = run.stream(300)
        with contextlib.closing(stream):
            events = stream.events()
            next(events)
            for pid in [run.process.pid, *(processes if all_at_once else [])]:
                os.kill(pid, signal.SIGTERM)
            assert not [event for event in events if "error" in event]
            assert stream.done
        assert run.process.wait(60) == 0
        assert node.entries() == [] and not [pid for pid in processes if alive(pid)]
        assert not (ROOT / ".run" / run.bind.rpartition(":")[2] / "redis-url").exists()
    finally:
        run.process.kill()
        run.process.wait()


def test_a_killed_worker_comes_back(started: Run) -> None:
    before = {worker.pid for worker in started.workers()}
    os.kill(min(before), signal.SIGKILL)
    started.until_printed(r"echo-\d\s+\| killed by SIGKILL; restarting in 1 s")
    wait_until(
        lambda: len({w.pid for w in started.workers()} - before) == 1, timeout_s=30, what="a new worker"
    )
    wait_until(started.ready, timeout_s=30, what="ready")


def test_a_killed_redis_comes_back_with_the_same_url(started: Run) -> None:
    server = next(process for process in started.processes() if "redis-server" in process.name())
    server.kill()
    wait_until(lambda: not started.ready(), timeout_s=30, what="/readyz sees that Redis is gone")
    wait_until(started.ready, timeout_s=60, what="service again by itself")


def test_no_process_outlives_a_killed_supervisor(started: Run) -> None:
    commands = {process.pid: " ".join(command_of(process)) for process in started.processes()}
    started.process.kill()
    started.process.wait()

    def left() -> list[str]:
        return [command for pid, command in commands.items() if alive(pid)]

    try:
        wait_until(lambda: not left(), timeout_s=45, what="all children gone")
    except AssertionError as error:
        raise AssertionError(f"still there: {left()}") from error
