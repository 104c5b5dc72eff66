"""A real Prometheus for tests: Debian's, which scripts/fetch-prometheus downloads."""

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.deployment import ROOT, free_port, wait_until

TOOLS = ROOT / ".tools"
MONITORING = ROOT / "deploy" / "monitoring"


def fetch() -> None:
    """Download Prometheus and promtool, unless they are there. Skips the test where nothing has them."""
    if not shutil.which("apt-get") and not shutil.which("promtool"):
        pytest.skip("no Prometheus (only Debian's can be fetched)")
    done = subprocess.run([ROOT / "scripts/fetch-prometheus"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def promtool(*arguments: str | Path, stdin: str = "") -> str:
    """Run promtool; returns what it printed. Raises AssertionError if it finds anything."""
    done = subprocess.run(
        [TOOLS / "promtool", *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_configuration(folder: Path, service_port: int = 1088) -> Path:
    """Copy deploy/monitoring/ for a service at another port, with a key; returns the path of
    prometheus.yml."""
    for file in MONITORING.glob("*.yml"):
        shutil.copy(file, folder)
    (folder / "key").write_text("none")
    configuration = folder / "prometheus.yml"
    text = configuration.read_text()
    assert "127.0.0.1:1088" in text and "scrape_interval: 15s" in text
    text = text.replace("127.0.0.1:1088", f"127.0.0.1:{service_port}")
    configuration.write_text(text.replace("_interval: 15s", "_interval: 1s"))
    return configuration


class Prometheus:
    """Scrapes a service each second with the configuration of deploy/monitoring/."""

    def __init__(self, folder: Path, service_port: int) -> None:
        self._folder = folder
        self._configuration = copy_configuration(folder, service_port)
        self._url = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [
            str(TOOLS / "prometheus"),
            f"--config.file={self._configuration}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self._url}",
            "--log.level=warn",
        ]
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)
        wait_until(self._answers, timeout_s=60, what="Prometheus is ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)
        if error is not None:
            print((self._folder / "prometheus.log").read_text()[-4000:])

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Evaluate an expression now; returns its series, each with `metric` and `value`."""
        address = f"http://{self._url}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(address, timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])

    def wait_for(self, expression: str) -> list[dict[str, Any]]:
        """Wait until an expression has a result, and return it."""
        return wait_until(lambda: self.query(expression), timeout_s=60, what=f"Prometheus finds {expression}")

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "Prometheus has ended"
        try:
            with urllib.request.urlopen(f"http://{self._url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
