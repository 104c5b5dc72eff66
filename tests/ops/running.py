"""A `scripts/run` of a test: started in the background, its output, its processes."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil

from config import Settings
from supervise.readiness import Probe
from tests.deployment import ROOT, Stream, free_port, wait_until

READY_S = 90.0
CATALOGUE = """
project = "Run"
[[models]]
name = "echo"
tasks = ["chat"]
weights = "echo:"
workers = [[], []]
"""


def command_of(process: psutil.Process) -> list[str]:
    """Return its command line, [] for one that has exited."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


class Run:
    """A `scripts/run` in the background."""

    def __init__(self, folder: Path, *before: str, models: str = CATALOGUE, **settings: str) -> None:
        catalogue = folder / "models.toml"
        catalogue.write_text(models)
        self.bind = settings.get("BIND") or f"127.0.0.1:{free_port()}"
        self._log = folder / "output"
        env = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "API_KEYS", "FLOWER_BASIC_AUTH")}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*before, ROOT / "scripts" / "run", catalogue],
                env={**env, "BIND": self.bind, "NODE_URL": "", "DRAIN_S": "2", **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def until_printed(self, pattern: str) -> re.Match[str]:
        try:
            found = wait_until(lambda: re.search(pattern, self.output), timeout_s=READY_S, what=pattern)
        except AssertionError as error:
            raise AssertionError(f"{pattern!r} was never printed:\n{self.output}") from error
        assert found
        return found

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "worker" in command_of(process)]

    def stream(self, tokens: int) -> Stream:
        """Begin a streamed chat of `tokens` tokens; return when its head has arrived."""
        connection = http.client.HTTPConnection(self.bind, timeout=60)
        messages = [{"role": "user", "content": "count"}]
        body = {"model": "echo", "messages": messages, "stream": True, "max_tokens": tokens}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        return Stream(connection.getresponse(), connection)

    def ready(self) -> bool:
        return Probe(Settings(bind=self.bind)).ready()

    def get(self, path: str) -> tuple[int, Any]:
        """The status and the JSON of an answer of the web process."""
        connection = http.client.HTTPConnection(self.bind, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def stop(self) -> None:
        """Stop it in order, or at once if that fails."""
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(60) == 0
        finally:
            self.process.kill()
            self.process.wait()
