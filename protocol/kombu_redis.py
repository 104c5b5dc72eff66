"""kombu's Redis transport (kombu 5.7.0) with two errors and one cost removed.

The first error: when kombu closes a connection it drops the connection's client, and raises AttributeError
when the connection is used later. Celery ends the worker for that, while it survives a connection error. Seen
when Redis is killed while tasks run.

The second: Celery also ends the worker for an error that Redis answers with (READONLY, OOM, MISCONF,
UNBLOCKED). Redis gives them when it is full, can't save, or was demoted to a replica, and takes commands
again later.

The cost: kombu makes a new client of redis-py, which sets up a table of some 200 commands, for every
message that it sends or receives. That is a fifth of a worker's time for a task that does nothing.
"""

from typing import Any

import redis
from kombu.transport import redis as kombu_redis


class ReconnectingChannel(kombu_redis.Channel):
    """A channel that raises a connection error once its connection is closed, and that keeps its client."""

    # When the channel is closed its unacknowledged messages would go back into the queue, while their tasks
    # run on.
    do_restore = False
    _client_of_pool: tuple[Any, Any] = (None, None)

    def _connparams(self, asynchronous: bool = False) -> Any:
        connection: Any = self.connection
        if connection is None or connection.client is None:
            raise redis.ConnectionError("this connection to the queue was closed")
        return super()._connparams(asynchronous)  # type: ignore[misc] # kombu's stubs leave it out

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous)  # type: ignore[misc]
        pool, client = self._client_of_pool
        # one client is enough for all threads: it takes a connection from the pool for each command
        if client is None or pool is not self.pool:
            client = super()._create_client()  # type: ignore[misc]
            self._client_of_pool = (self.pool, client)
        return client


class ReconnectingTransport(kombu_redis.Transport):
    """The transport for `redis` and `rediss` URLs (protocol.celery_app.create_celery)."""

    Channel = ReconnectingChannel
    # Celery reconnects after these, and goes on doing so, at most five times a second, while the error lasts
    connection_errors = (*kombu_redis.Transport.connection_errors, redis.ResponseError)
