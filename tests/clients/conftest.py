"""One service for all clients, and how tests start the clients that have an environment of their own.

The chat models are real ones whose answers are written beforehand (tests/scripted_chat.py), so that a test
sees what a client makes of a certain answer.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.clients.scripts import SCRIPTS, THINKING_SCRIPTS
from tests.deployment import ROOT, free_port
from tests.engines import chat_templates as templates
from tests.scripted_chat import save_scripted_model
from tests.security.conftest import KeyedDeployment

FOLDER = ROOT / "tests/clients"
KEY = "sk-clients"
ABSENT = "absent"
"""A model that no worker serves."""

CATALOGUE = """
project = "Clients"
[[models]]
name = "scripted"
tasks = ["chat"]
weights = "{scripted}"
workers = [[]]
[models.engine]
torch_threads = 1
[[models]]
name = "thinking"
tasks = ["chat"]
weights = "{thinking}"
workers = [[]]
[models.engine]
torch_threads = 1
[[models]]
name = "shapes"
tasks = ["generation", "edit"]
weights = "{root}/demo/models/shapes"
workers = [[]]
[models.engine]
torch_threads = 1
[[models]]
name = "echo"
tasks = ["chat"]
weights = "echo:"
workers = [[]]
[[models]]
name = "echo-images"
tasks = ["generation"]
weights = "echo:"
workers = [[]]
[[models]]
name = "absent"
tasks = ["chat"]
weights = "echo:"
"""


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedDeployment]:
    """Three chat models, of which echo fails on demand, and two image models, of which echo-images does so,
    behind a key. Tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("clients")
    catalogue = CATALOGUE.format(
        scripted=save_scripted_model(folder / "scripted", templates.HERMES, SCRIPTS),
        thinking=save_scripted_model(folder / "thinking", templates.QWEN3, THINKING_SCRIPTS),
        root=ROOT,
    )
    with KeyedDeployment(folder / "service", catalogue=catalogue, redis_server=None, **_access()) as service:
        service.key = KEY
        yield service.start("scripted", "thinking", "shapes", "echo", "echo-images")


@pytest.fixture(scope="session")
def limited(service: KeyedDeployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedDeployment]:
    """A web process beside the other whose rate limit is used up: each request for an answer gets 429."""
    folder = tmp_path_factory.mktemp("limited")
    catalogue = service.catalogue.read_text()
    access = _access(RATE_LIMIT="1/day")
    with KeyedDeployment(folder, catalogue=catalogue, redis_server=service.redis, **access) as limited:
        limited.key = KEY
        limited.start_web()
        # counted, although there is nobody to answer it
        assert limited.chat("Hello!", ABSENT)[0] == 503
        yield limited


def _access(**more: str) -> dict[str, str]:
    return {"API_KEYS": KEY, "NODE_BIND": f"127.0.0.1:{free_port()}", **more}


def set_up(group: str) -> None:
    """Install a group of clients of scripts/setup-clients, unless it is installed."""
    done = subprocess.run(
        [ROOT / "scripts/setup-clients", group], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(done.stderr.strip(), pytrace=False)


def check_client(service: KeyedDeployment, limited: KeyedDeployment, command: Sequence[str | Path]) -> None:
    """Run the tests of a client in a process of its own. Fails with their output if one of them fails."""
    # no proxy, no key and no configuration of the machine's user
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment |= {
        "HOME": str(limited.folder),
        "SERVICE_URL": f"{service.url}/v1",
        "LIMITED_URL": f"{limited.url}/v1",
        "SERVICE_KEY": KEY,
        "ABSENT_MODEL": ABSENT,
        # LiteLLM downloads a table of prices otherwise
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
