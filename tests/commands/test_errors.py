"""What every command does without a service: one line and a status when it can't work, and nothing is
started."""

import subprocess
import sys
from pathlib import Path

import pytest

from config import EXIT_CONFIGURATION, EXIT_TEMPORARY
from tests.commands.conftest import flask, succeeds
from tests.deployment import ECHO_CATALOGUE, ROOT, Deployment, RedisServer

COMMANDS = [
    ("workers", "list"),
    ("workers", "drain", "--all"),
    ("workers", "resume", "--all"),
    ("requests", "list"),
]


@pytest.fixture
def service(tmp_path: Path, redis_server: RedisServer) -> Deployment:
    """A deployment of which nothing runs but Redis."""
    catalogue = ECHO_CATALOGUE.format(step_ms=20, slots=2)
    return Deployment(tmp_path, catalogue=catalogue, redis_server=redis_server, NAMESPACE=tmp_path.name)


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_without_redis(service: Deployment, words: tuple[str, ...]) -> None:
    # a node, and image links on the loopback: what the service would warn of is no part of a command's output
    environment = {"REDIS_URL": "redis://:secret@127.0.0.1:1/0", "NODE_URL": "http://127.0.0.1:1"}
    done = flask(service, *words, **environment)
    assert (done.returncode, done.stdout) == (EXIT_TEMPORARY, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: REDIS_URL: Redis can't be reached: ") and "secret" not in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("BIND", "nowhere", "environment: BIND: "),
        ("MODELS_FILE", "/missing.toml", "/missing.toml: No such file"),
    ],
)
def test_with_wrong_settings(service: Deployment, variable: str, value: str, reason: str) -> None:
    done = flask(service, "workers", "list", **{variable: value})
    assert (done.returncode, done.stdout) == (EXIT_CONFIGURATION, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {reason}")


@pytest.mark.slow
def test_no_worker_is_a_line(service: Deployment) -> None:
    assert succeeds(service, "workers", "list") == "no worker runs\n"
    assert succeeds(service, "workers", "drain", "--all") == "no worker runs\n"
    assert succeeds(service, "workers", "resume", "--all") == "no worker is under drain\n"


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_starts_no_threads_and_patches_nothing(service: Deployment, words: tuple[str, ...]) -> None:
    code = (
        "import sys, threading\n"
        "from flask.cli import main\n"
        "started, start = [], threading.Thread.start\n"
        "def note(thread):\n    started.append(thread.name)\n    start(thread)\n"
        "threading.Thread.start = note\n"
        f"sys.argv = ['flask', '--app', 'wsgi', *{words!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "patched = getattr(sys.modules.get('gevent.monkey'), 'saved', {})\n"
        "print(started, patched, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=service.environment(),
        capture_output=True,
        text=True,
        timeout=340,
        check=True,
    )
    assert done.stderr == "[] {} False\n"
