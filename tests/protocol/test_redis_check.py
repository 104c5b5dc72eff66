"""The check of a given REDIS_URL, against real servers and one that stands in for old versions."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

from config import ConfigurationError
from protocol.redis_check import RedisUnavailable, check_redis
from tests.deployment import RedisServer, free_port, wait_until


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server whose configuration tests may change."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def changed(own: RedisServer) -> Iterator[redis.Redis]:
    yield own.client
    own.client.config_set("maxmemory", "0")
    own.client.config_set("min-replicas-to-write", "0")
    own.client.execute_command("REPLICAOF", "NO", "ONE")


def test_a_server_that_takes_writes_passes_and_keeps_nothing(own: RedisServer) -> None:
    check_redis(own.url, "Test")
    wait_until(lambda: not own.client.keys("Test:*"), timeout_s=10, what="nothing is left")


def test_a_full_server_refuses(own: RedisServer, changed: redis.Redis) -> None:
    changed.config_set("maxmemory", "1")
    with pytest.raises(RedisUnavailable, match=r"refuses writes: .*maxmemory"):
        check_redis(own.url, "Test")


def test_a_replica_refuses(own: RedisServer, changed: redis.Redis) -> None:
    changed.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    with pytest.raises(RedisUnavailable, match=r"refuses writes: .*read only replica"):
        check_redis(own.url, "Test")


def test_a_server_without_enough_replicas_refuses(own: RedisServer, changed: redis.Redis) -> None:
    changed.config_set("min-replicas-to-write", "1")
    with pytest.raises(RedisUnavailable, match="refuses writes"):
        check_redis(own.url, "Test")


def test_a_database_that_the_server_lacks(own: RedisServer) -> None:
    with pytest.raises(ConfigurationError, match="DB index is out of range"):
        check_redis(own.url.rpartition("/")[0] + "/4711", "Test")


def test_a_wrong_password(own: RedisServer) -> None:
    port = own.client.connection_pool.connection_kwargs["port"]
    with pytest.raises(ConfigurationError) as caught:
        check_redis(f"redis://user:hidden@127.0.0.1:{port}/0", "Test")
    assert "invalid username-password pair" in str(caught.value) and "hidden" not in str(caught.value)


class _Commands(socketserver.StreamRequestHandler):
    """Answers HELLO as `hello` and everything else with OK."""

    hello = b""

    def handle(self) -> None:
        while line := self.rfile.readline():
            parts = []
            for _ in range(int(line[1:])):
                size = int(self.rfile.readline()[1:])
                parts.append(self.rfile.read(size + 2)[:size])
            self.wfile.write(self.hello if parts[0] == b"HELLO" else b"+OK\r\n")


@contextmanager
def server(hello: bytes) -> Iterator[str]:
    handler = type("Commands", (_Commands,), {"hello": hello})
    with socketserver.TCPServer(("127.0.0.1", 0), handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield f"redis://127.0.0.1:{listener.server_address[1]}/0"
        listener.shutdown()
        thread.join()


def pairs(*texts: str) -> bytes:
    return b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%s\r\n" % (len(t), t.encode()) for t in texts)


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (b"-ERR unknown command `HELLO`, with args beginning with: `2`\r\n", "below 6; 6.2 or later"),
        (pairs("server", "redis", "version", "6.0.16"), "6.0.16; 6.2 or later"),
        (pairs("server", "redis", "version", "7.2.0", "mode", "cluster"), "is a cluster"),
    ],
)
def test_servers_that_can_not_be_used(hello: bytes, message: str) -> None:
    with server(hello) as url, pytest.raises(ConfigurationError, match=message):
        check_redis(url, "Test")


def test_later_versions_pass() -> None:
    with server(pairs("server", "valkey", "version", "10.0.1", "mode", "standalone")) as url:
        check_redis(url, "Test")
