"""kombu's Redis transport with one mistake less: what touches a closed connection is told so.

kombu drops a connection's client when it closes it, and then trips over the missing client (AttributeError) when unacked
messages are to be restored or a task that ended meanwhile is to be acknowledged. Celery takes that for a bug and ends the
worker; a lost connection it survives. Seen with Redis killed while tasks run (kombu 5.7.0).
"""

from typing import Any

import redis
from kombu.transport import redis as kombu_redis


class SurvivingChannel(kombu_redis.Channel):
    """A channel that raises a connection error where its connection is gone."""

    def _connparams(self, asynchronous: bool = False) -> Any:
        connection: Any = self.connection
        if connection is None or connection.client is None:
            raise redis.ConnectionError("this connection to the queue was closed")
        return super()._connparams(asynchronous)  # type: ignore[misc] # kombu's stubs leave it out


class SurvivingTransport(kombu_redis.Transport):
    """Stands in kombu's table of transports for `redis` and `rediss`."""

    Channel = SurvivingChannel
