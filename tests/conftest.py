"""Fixtures for all tests, and how `pytest -n N` distributes the tests over its processes."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from protocol.names import Keys
from tests.deployment import ROOT, RedisServer

TOGETHER = {
    f"tests/e2e/test_{name}.py": "demo"
    for name in ("batching", "completions", "openai_client", "refusals", "standard")
}
TOGETHER |= {f"tests/clients/test_{name}.py": "clients" for name in ("node", "openai_python", "python")}
TOGETHER |= {f"tests/console/test_{name}.py": "console" for name in ("docs", "operators", "page", "view")}
"""Files whose tests share one service: file to the name of its unit."""
APART = {f"tests/faults/test_{name}.py" for name in ("node", "redis", "same_cid", "web", "workers")}
"""Files in which each test starts a service of its own."""

collect_ignore = [] if sys.platform == "linux" else ["engines/test_chat_gpu_kernels.py"]
"""Triton exists for Linux only."""

_numbers = itertools.count()


def unit_of(nodeid: str) -> str:
    """Return the unit of a test, by default its file. The tests of a unit run one after another."""
    path = nodeid.partition("::")[0]
    return nodeid if path in APART else TOGETHER.get(path, path)


class UnitScheduling(LoadScopeScheduling):
    """Gives each process the next unit when it has finished one."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> UnitScheduling:
    """Schedule by unit, in the order of collection. xdist's `loadgroup` does not work with pytest 9.2."""
    config.option.loadscopereorder = False
    return UnitScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the units with slow tests first under `pytest -n`: begun last, they would end long after all.

    A test with a trained model may be the one that downloads it, and gets the time for it.
    """
    for item in items:
        if {"smollm2", "minilm"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(900))
    if hasattr(config, "workerinput"):
        slow = {unit_of(item.nodeid) for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: unit_of(item.nodeid) not in slow)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real redis-server for tests that do not break it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_client(redis_server: RedisServer) -> Any:
    """A client of that server. What a test writes, it writes under its own `keys`."""
    return redis_server.client


@pytest.fixture
def keys() -> Keys:
    """A namespace that no other test has."""
    return Keys.of(f"test{next(_numbers)}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a trained model. The first test ever to use it downloads it."""
    return fetched("fetch-smollm2", "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a trained embedding model.

    The first test ever to use it downloads it.
    """
    return fetched("fetch-minilm", "all-minilm-l6-v2")


def fetched(script: str, folder: str) -> Path:
    """Return a folder of weights/, which the script makes if it is missing."""
    done = subprocess.run([ROOT / "scripts" / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ROOT / "weights" / folder
