"""Fixtures that everybody shares: one real redis-server for the run, a clean namespace for each test."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.names import Keys
from tests.deployment import RedisServer

_numbers = itertools.count()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real redis-server for tests that don't break it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_client(redis_server: RedisServer) -> Any:
    """A client of that server; whatever a test writes, it writes under its own `keys`."""
    return redis_server.client


@pytest.fixture
def keys() -> Keys:
    """A namespace that no other test has."""
    return Keys.of(f"test{next(_numbers)}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
