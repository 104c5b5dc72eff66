"""Checks of Redis: the server itself, its eviction policy, and this machine's clock beside its clock."""

import time
from collections.abc import Callable, Iterator

from redis.exceptions import RedisError

from addresses import without_password
from app.commands.checks.finding import Finding, failed, passed, warned
from app.operations.warnings import eviction_policy
from config import ConfigurationError
from protocol.connections import RedisClient
from protocol.redis_check import RedisRefusesWrites, RedisUnavailable, check_redis

CLOCK_WARN_S = 2.0
CLOCK_FAIL_S = 60.0
EMBEDDED = "that of a running scripts/run is in .run/<port of BIND>/redis-url"


def check_server(url: str, namespace: str) -> Finding:
    """Whether Redis answers, is recent enough and takes writes."""
    try:
        version = check_redis(url, namespace)
    except RedisRefusesWrites as error:
        return failed("redis", f"{error}; give it more memory, or name a primary server in REDIS_URL")
    except RedisUnavailable as error:
        return failed("redis", f"{error}; start it, or set REDIS_URL ({EMBEDDED})")
    except ConfigurationError as error:
        return failed("redis", str(error))
    return passed("redis", f"{without_password(url)} answers and takes writes, version {version}")


def check_data(client: RedisClient) -> Iterator[Finding]:
    """The eviction policy and the clock of a Redis that answers."""
    try:
        yield _eviction(client)
        yield check_clock(client)
    except RedisError as error:
        yield failed("redis", f"REDIS_URL: Redis failed during the checks: {' '.join(str(error).split())}")


def _eviction(client: RedisClient) -> Finding:
    policy = eviction_policy(client)
    if not policy:
        return warned(
            "eviction", "this user may not read maxmemory-policy; ask Redis' owner whether it is noeviction"
        )
    if policy != "noeviction":
        return warned(
            "eviction",
            f"maxmemory-policy is {policy}: it may remove requests and leases; set it to noeviction",
        )
    return passed("eviction", "maxmemory-policy is noeviction")


def check_clock(client: RedisClient, now: Callable[[], float] = time.time) -> Finding:
    """How far this machine's clock is from that of Redis. Raises redis.RedisError."""
    before = now()
    seconds, micros = client.time()
    ahead_s = (before + now()) / 2 - (seconds + micros / 1e6)
    found = f"this machine's clock is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} Redis'"
    if abs(ahead_s) > CLOCK_FAIL_S:
        return failed("clock", f"{found}: certificates and times in logs are wrong; let NTP set it")
    if abs(ahead_s) > CLOCK_WARN_S:
        return warned("clock", f"{found}: times in logs don't fit together; let NTP set it")
    return passed("clock", found)
