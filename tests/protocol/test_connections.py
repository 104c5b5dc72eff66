"""protocol.connections on a real Redis: how connections are looked at before they are used."""

from collections.abc import Iterator
from typing import Any

import pytest

from config import Settings
from protocol.connections import RedisClient, connect_redis
from protocol.names import Keys
from tests.deployment import RedisServer


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[RedisClient]:
    with connect_redis(Settings(redis_url=redis_server.url)) as client:
        yield client


def test_a_connection_that_redis_has_closed_is_replaced(client: RedisClient, redis_client: Any) -> None:
    before = client.client_id()
    redis_client.client_kill_filter(_id=str(before))
    # without the look this command would fail: it is never repeated
    assert client.client_id() != before


def test_a_silent_channel_is_no_message(client: RedisClient, redis_client: Any, keys: Keys) -> None:
    with client.pubsub() as pubsub:
        pubsub.subscribe(keys.channel("w"))
        assert pubsub.get_message(timeout=60)["type"] == "subscribe"
        assert pubsub.get_message(timeout=0) is None
        assert pubsub.get_message(timeout=0.01) is None
        # longer than redis-py reads at once
        sent = [b"a", b"b" * 200_000, b"c"]
        for data in sent:
            redis_client.publish(keys.channel("w"), data)
        assert [pubsub.get_message(timeout=60)["data"] for _ in sent] == sent
        assert pubsub.get_message(timeout=0) is None
