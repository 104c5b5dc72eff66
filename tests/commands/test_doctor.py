"""`flask --app wsgi doctor`: a healthy deployment passes, and each fault is named with what to do."""

import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.commands.checks import gpu, machine
from app.commands.checks.finding import Finding
from app.commands.checks.redis import check_clock
from catalogue import Catalogue
from config import Settings
from tests.commands.conftest import flask, parsed, succeeds
from tests.deployment import ECHO_CATALOGUE, ROOT, Deployment, RedisServer, free_port
from tests.records import worker_record
from tests.stand_in_node import StandInNode

CATALOGUE = ECHO_CATALOGUE.format(step_ms=5, slots=2)


@pytest.fixture(scope="module")
def node() -> Iterator[StandInNode]:
    with StandInNode() as node:
        yield node


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, node: StandInNode) -> Iterator[Deployment]:
    """A service with one worker that is registered. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("doctor")
    with Deployment(folder, catalogue=CATALOGUE, NODE_URL=node.url, SERVICE_ID="doctor") as service:
        service.start("echo")
        node.wait_for(lambda node: len(node.cids("Test")) == 1, 30)
        yield service


def found(service: Deployment, *, status: int = 0, **environment: str) -> dict[str, tuple[str, str]]:
    """Status and message of each check; `status`: the exit status that the command must have."""
    done = flask(service, "doctor", "--json", **environment)
    assert done.returncode == status, done.stdout + done.stderr
    printed = parsed(done.stdout)
    assert printed["ok"] == (status == 0)
    return {row["check"]: (row["status"], row["message"]) for row in printed["checks"]}


def levels(checks: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {check: status for check, (status, _) in checks.items() if status != "PASS"}


@pytest.mark.slow
def test_a_healthy_deployment(service: Deployment) -> None:
    checks = found(service, PUBLIC_URL=f"http://localhost:{service.port}")
    assert list(checks) == [
        *("settings", "redis", "eviction", "clock", "node", "registrations"),
        *("BIND", "SERVICE_URL", "PUBLIC_URL", "gpu", "torch", "open files"),
    ]
    # a warning: the URL of image links is on the loopback
    assert levels(checks) in ({"settings": "WARN"}, {"settings": "WARN", "open files": "WARN"}), checks
    assert "1 ready workers" in checks["registrations"][1]
    assert "is served by this deployment" in checks["BIND"][1]

    printed = succeeds(service, "doctor")
    assert [line.split("  ")[1].split(": ")[0] for line in printed.splitlines()] == list(checks)


@pytest.mark.slow
def test_a_redis_that_is_away_fails_alone(service: Deployment) -> None:
    checks = found(service, status=1, REDIS_URL="redis://:secret@127.0.0.1:1/0")
    assert checks["redis"][0] == "FAIL" and "secret" not in checks["redis"][1]
    assert "can't be reached" in checks["redis"][1]
    assert checks["clock"][0] == checks["registrations"][0] == "WARN"
    assert checks["BIND"][0] == checks["node"][0] == "PASS"


@pytest.mark.slow
def test_a_redis_that_evicts_or_refuses_writes(service: Deployment) -> None:
    redis = service.redis.client
    redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        checks = found(service)
        assert checks["eviction"][0] == "WARN" and "set it to noeviction" in checks["eviction"][1]
        redis.config_set("min-replicas-to-write", 1)
        checks = found(service, status=1)
        assert checks["redis"][0] == "FAIL" and "refuses writes" in checks["redis"][1]
        assert "start it" not in checks["redis"][1] and "give it more memory" in checks["redis"][1]
    finally:
        redis.config_set("min-replicas-to-write", 0)
        redis.config_set("maxmemory-policy", "noeviction")


@pytest.mark.slow
def test_a_node_that_is_away_or_has_forgotten_a_worker(service: Deployment, node: StandInNode) -> None:
    checks = found(service, status=1, NODE_URL=f"http://127.0.0.1:{free_port()}")
    assert checks["node"][0] == "FAIL" and "is unreachable" in checks["node"][1]

    (entry,) = node.entries("Test")
    node.add("Test", "echo", entry["api"], cid="left-behind")
    checks = found(service)
    assert checks["registrations"][0] == "WARN" and "left-behind" in checks["registrations"][1]

    # its worker reads the list once a minute only
    with node._changed:
        node.book.projects = {}
    checks = found(service, status=1)
    assert checks["registrations"][0] == "FAIL"
    assert "1 ready workers are not registered" in checks["registrations"][1]
    node.add(entry["project"], entry["model"], entry["api"], entry["type"], entry["cid"])
    assert found(service)["registrations"][0] == "PASS"


@pytest.mark.slow
def test_addresses_of_others(service: Deployment) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        checks = found(service, status=1, BIND=f"127.0.0.1:{port}")
        assert checks["BIND"][0] == "FAIL" and "in use by another program" in checks["BIND"][1]
        # with no web process of its own there, what the URLs reach is not known to be wrong
        assert checks["PUBLIC_URL"][0] == "WARN"
        checks = found(service, status=1, PUBLIC_URL=f"http://127.0.0.1:{port}")
        assert checks["PUBLIC_URL"][0] == "FAIL" and "correct PUBLIC_URL" in checks["PUBLIC_URL"][1]
        assert checks["BIND"][0] == checks["SERVICE_URL"][0] == "PASS"
    checks = found(service, status=1, NAMESPACE="Other")
    assert checks["BIND"][0] == "FAIL"
    checks = found(service, status=1, BIND="192.0.2.1:1088")
    assert "can't be listened on" in checks["BIND"][1]
    # the service that runs was started without keys, and so without that listener
    checks = found(service, status=1, API_KEYS="key", NODE_BIND=f"127.0.0.1:{free_port()}")
    assert "is free" in checks["NODE_BIND"][1] and checks["SERVICE_URL"][0] == "FAIL"


@pytest.mark.slow
def test_before_the_service_is_started(tmp_path: Path, redis_server: RedisServer) -> None:
    catalogue = f'{CATALOGUE}\n[[models]]\nname = "lost"\ntasks = ["chat"]\nweights = "{tmp_path}/lost"\n'
    service = Deployment(tmp_path, catalogue=catalogue, redis_server=redis_server, NAMESPACE=tmp_path.name)
    checks = found(service, status=1)
    assert levels(checks) | {"open files": "WARN"} == {
        "PUBLIC_URL": "WARN",
        "weights of lost": "FAIL",
        "open files": "WARN",
    }
    assert "is free" in checks["BIND"][1]


@pytest.mark.slow
def test_it_loads_no_torch_starts_no_threads_and_counts_open_files(service: Deployment) -> None:
    code = (
        "import resource, sys, threading\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n"
        "from flask.cli import main\n"
        "started, start = [], threading.Thread.start\n"
        "def note(thread):\n    started.append(thread.name)\n    start(thread)\n"
        "threading.Thread.start = note\n"
        "sys.argv = ['flask', '--app', 'wsgi', 'doctor', '--json']\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    print(started, 'torch' in sys.modules, ended.code, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=service.environment(PUBLIC_URL="http://models"),
        capture_output=True,
        text=True,
        timeout=340,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[] False 1"
    (files,) = [row for row in parsed(done.stdout)["checks"] if row["check"] == "open files"]
    assert files["status"] == "FAIL" and "LimitNOFILE" in files["message"]


# ----- checks whose faults a test can't cause on this machine


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of programs, in place of PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "DRIVER_GPUS", tmp_path / "gpus")
    return tmp_path


def nvidia_smi(tools: Path, printed: str, status: int = 0) -> None:
    tool = tools / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{printed}'\nexit {status}\n")
    tool.chmod(0o755)


def gpus(monkeypatch: pytest.MonkeyPatch, torch: str, **settings: str) -> dict[str, Finding]:
    """The findings about GPUs; `torch`: the code that stands in for the question to torch."""
    monkeypatch.setattr(gpu, "_ASK_TORCH", torch)
    catalogue = Catalogue.model_validate(
        {
            "project": "P",
            "models": [{"name": "m", "tasks": ["chat"], "weights": "echo:", "workers": [[0]]}],
        }
    )
    given = Settings.model_validate(settings)
    return {finding.check: finding for finding in gpu.check_gpus(given, catalogue)}


def answers(*gpus: list[Any], reason: str = "") -> str:
    return f"import json; print(json.dumps({{'version': '2', 'reason': {reason!r}, 'gpus': {list(gpus)!r}}}))"


L4 = ["L4", 8, 9]


@pytest.mark.parametrize(
    ("smi", "status", "torch", "expected"),
    [
        ("L4, 580.65, 23034 MiB", 0, answers(L4), ("PASS", "PASS", "computes on 1 GPUs")),
        ("L4, 550.90, 23034 MiB", 0, answers(L4), ("FAIL", "PASS", "580 series")),
        ("L4, 580.65, 23034 MiB", 0, answers(reason="no driver"), ("PASS", "FAIL", "no driver")),
        ("L4, 580.65, 23034 MiB", 0, answers(), ("PASS", "FAIL", "it sees none")),
        ("V100, 580.65, 1 MiB", 0, answers(["V100", 7, 0]), ("PASS", "FAIL", "V100")),
        ("L4, 580.65, 23034 MiB", 0, "print('null')", ("PASS", "WARN", "not installed")),
        ("L4, 580.65, 23034 MiB", 0, "raise OSError('libcudart')", ("PASS", "FAIL", "libcudart")),
        ("the driver is away", 9, answers(), ("FAIL", "PASS", "the driver is away")),
        ("", 0, answers(), ("FAIL", "PASS", "lists no GPU")),
    ],
)
def test_gpus(
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    smi: str,
    status: int,
    torch: str,
    expected: tuple[str, str, str],
) -> None:
    nvidia_smi(tools, smi, status)
    findings = gpus(monkeypatch, torch)
    assert (findings["gpu"].status, findings["torch"].status) == expected[:2]
    assert expected[2] in findings["gpu"].message + findings["torch"].message


def test_a_machine_without_a_gpu(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = gpus(monkeypatch, answers())
    assert findings["gpu"].status == "WARN" and "the catalogue names GPUs" in findings["gpu"].message
    assert findings["torch"].status == "PASS"
    assert gpus(monkeypatch, answers(), cuda_visible_devices="")["gpu"].status == "PASS"
    (tools / "gpus" / "0").mkdir(parents=True)
    assert "there is no nvidia-smi" in gpus(monkeypatch, answers())["gpu"].message


@pytest.mark.parametrize(
    ("ahead_s", "status", "text"),
    [
        (0.0, "PASS", "Redis'"),
        (10.0, "WARN", "10.0 s ahead of"),
        (-10.0, "WARN", "10.0 s behind"),
        (-300.0, "FAIL", "NTP"),
    ],
)
def test_a_clock(redis_client: Any, ahead_s: float, status: str, text: str) -> None:
    def now() -> float:
        seconds, micros = redis_client.time()
        return float(seconds + micros / 1e6 + ahead_s)

    finding = check_clock(redis_client, now)
    assert finding.status == status and text in finding.message


def model(weights: Path | str) -> Catalogue:
    return Catalogue.model_validate(
        {"project": "P", "models": [{"name": "m", "tasks": ["chat"], "weights": str(weights)}]}
    )


def test_weights_and_their_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (missing,) = machine.check_weights(model(tmp_path / "w"), [])
    assert missing.status == "FAIL" and "does not exist" in missing.message
    elsewhere = worker_record(model="m", host="gpu7", state="ready")
    (finding,) = machine.check_weights(model(tmp_path / "w"), [elsewhere])
    assert finding.status == "PASS" and "gpu7" in finding.message
    (tmp_path / "w").mkdir()
    (incomplete,) = machine.check_weights(model(tmp_path / "w"), None)
    assert incomplete.status == "FAIL" and "config.json" in incomplete.message
    (tmp_path / "w" / "config.json").touch()
    (finding,) = machine.check_weights(model(tmp_path / "w"), None)
    assert finding.status in ("PASS", "WARN")
    monkeypatch.setattr(machine, "FULL_BYTES", 2**80)
    (finding,) = machine.check_weights(model(tmp_path / "w"), None)
    assert finding.status == "WARN" and "make room" in finding.message


def test_the_folder_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(machine, "HUB_ROOM_BYTES", 0)
    monkeypatch.setattr(machine, "FULL_BYTES", 0)

    def look() -> Finding:
        (finding,) = machine.check_weights(model("owner/name"), None)
        assert str(tmp_path) in finding.message
        return finding

    assert look().status == "PASS" and "to be downloaded: owner/name" in look().message
    monkeypatch.setattr(machine, "HUB_ROOM_BYTES", 2**80)
    assert look().status == "WARN"
    monkeypatch.setattr(machine, "FULL_BYTES", 2**80)
    assert look().status == "FAIL"
    (tmp_path / "home/hub/models--owner--name").mkdir(parents=True)
    assert look().status == "PASS"


@pytest.mark.parametrize(
    ("hard", "status"), [(resource.RLIM_INFINITY, "PASS"), (65536, "PASS"), (4096, "WARN"), (1000, "FAIL")]
)
def test_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch, hard: int, status: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, hard))
    assert machine.check_descriptors().status == status
