"""The transport of the queue on a real Redis: what kombu does with messages that are not acknowledged."""

from collections.abc import Iterator
from typing import Any

import pytest

from config import Settings
from protocol.celery_app import consume, create_celery
from protocol.names import Keys
from protocol.task_messages import TaskMessages
from tests.deployment import RedisServer

MODEL = "m"


class Consumer:
    """A consumer of the queue, as in a Celery worker with two slots."""

    def __init__(self, redis_server: RedisServer, keys: Keys) -> None:
        self.received: list[Any] = []
        self._redis, self._keys = redis_server.client, keys
        celery = create_celery(Settings(redis_url=redis_server.url), keys)
        self._messages = TaskMessages(celery)
        self.connection: Any = celery.connection_for_read()
        channel: Any = self.connection.channel()
        channel.basic_qos(prefetch_count=2)
        consume(celery, keys, MODEL, concurrency=2)
        self.consumer: Any = celery.amqp.TaskConsumer(channel, on_message=self.received.append)
        self.consumer.consume()

    def send(self, *names: str) -> None:
        for name in names:
            message = self._messages.make(name, self._keys.queue(MODEL))
            self._redis.lpush(self._keys.queue_list(MODEL), message)

    def drain(self) -> None:
        """Receive until nothing has come for a second."""
        while True:
            try:
                self.connection.drain_events(timeout=1)
            except TimeoutError:
                return

    def queued(self) -> int:
        return int(self._redis.llen(self._keys.queue_list(MODEL)))


@pytest.fixture
def consumer(redis_server: RedisServer, keys: Keys) -> Iterator[Consumer]:
    made = Consumer(redis_server, keys)
    yield made
    made.connection.close()


def test_no_more_messages_are_received_than_are_acknowledged(consumer: Consumer) -> None:
    consumer.send("a", "b", "c")
    consumer.drain()
    assert [message.headers["id"] for message in consumer.received] == ["a", "b"]
    assert consumer.queued() == 1
    consumer.received[0].ack()
    consumer.drain()
    assert consumer.received[-1].headers["id"] == "c"


def test_a_received_message_is_nowhere_in_redis(consumer: Consumer, redis_client: Any, keys: Keys) -> None:
    consumer.send("a")
    consumer.drain()
    assert len(consumer.received) == 1
    assert not [key for key in redis_client.keys(f"{keys.prefix}*") if b"_kombu.binding" not in key]


def test_messages_of_running_tasks_do_not_return_when_the_connection_ends(consumer: Consumer) -> None:
    consumer.send("a", "b")
    consumer.drain()
    consumer.connection.close()
    assert consumer.queued() == 0
