"""Checks the Redis that REDIS_URL names: it must be reachable, recent enough, and take writes."""

import re
from typing import Any

import redis
from redis.exceptions import NoPermissionError

from addresses import without_password
from config import ConfigurationError

TIMEOUT_S = 3.0
OLDEST_VERSION = (6, 2)
"""SET has GET together with EX since 6.2."""


class RedisUnavailable(Exception):
    """Raised for what may pass: the server can't be reached, or refuses writes. The message is one line."""


class RedisRefusesWrites(RedisUnavailable):
    """Raised for a server that answers and takes no writes: it is full, or a replica."""


def check_redis(url: str, namespace: str) -> str:
    """Check the server; returns its version. Raises ConfigurationError or RedisUnavailable."""
    shown = f"REDIS_URL: {without_password(url)}"
    client = redis.Redis.from_url(
        url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=None, protocol=2
    )
    with client:
        try:
            version = _check_server(_hello(client), shown)
            _check_write(client, namespace, shown)
            return version
        except redis.AuthenticationError as error:
            raise ConfigurationError(f"{shown}: {error}") from error
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise RedisUnavailable(f"{shown} can't be reached: {error}") from error
        except redis.ResponseError as error:  # a database that it does not have, for example
            raise ConfigurationError(f"{shown}: {error}") from error


def _hello(client: redis.Redis) -> dict[str, str]:
    """Return what the server says of itself, nothing before Redis 6. A restricted user may not call INFO."""
    try:
        reply: Any = client.execute_command("HELLO", "2")
    except redis.ResponseError as error:
        if "unknown command" in str(error):
            return {}
        raise
    texts = [part.decode() if isinstance(part, bytes) else str(part) for part in reply]
    return dict(zip(texts[::2], texts[1::2], strict=False))


def _check_server(hello: dict[str, str], shown: str) -> str:
    version = hello.get("version", "below 6")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_VERSION:
        raise ConfigurationError(f"{shown}: its version is {version}; 6.2 or later is needed")
    if hello.get("mode") == "cluster":
        raise ConfigurationError(f"{shown} is a cluster; a single server is needed")
    return version


def _check_write(client: redis.Redis, namespace: str, shown: str) -> None:
    """Write a key that expires at once: a full Redis and a replica answer reads."""
    try:
        client.set(f"{namespace}:preflight", b"", px=1)
    except NoPermissionError:
        raise
    except redis.ResponseError as error:
        raise RedisRefusesWrites(f"{shown} refuses writes: {str(error).rstrip('.')}") from error
