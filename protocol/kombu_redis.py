"""kombu's Redis transport with one mistake and one cost less (kombu 5.7.0).

kombu drops a connection's client when it closes it, and then trips over the missing client (AttributeError) when unacked
messages are to be restored or a task that ended meanwhile is to be acknowledged. Celery takes that for a bug and ends the
worker; a lost connection it survives. Seen with Redis killed while tasks run.

kombu also makes a new client of redis-py, which is a table of some 200 commands, for every message that it sends, takes or
acknowledges: a fifth of a worker's time on a task that does nothing.
"""

from typing import Any

import redis
from kombu.transport import redis as kombu_redis


class ReconnectingChannel(kombu_redis.Channel):
    """A channel that raises a connection error where its connection is gone, and keeps its client."""

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
        # a client has no connection of its own: it takes one from the pool for each command, from any thread
        if client is None or pool is not self.pool:
            client = super()._create_client()  # type: ignore[misc]
            self._client_of_pool = (self.pool, client)
        return client


class ReconnectingTransport(kombu_redis.Transport):
    """Stands in kombu's table of transports for `redis` and `rediss`."""

    Channel = ReconnectingChannel
