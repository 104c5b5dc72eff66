"""A Redis with users who have passwords and only the rights of docs/deployment.md, without and with TLS."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

from config import Settings
from protocol.celery_app import create_celery
from protocol.connections import connect_redis
from protocol.kombu_redis import ReconnectingTransport
from protocol.names import Keys
from tests.deployment import Deployment, free_port, wait_until
from tests.security.conftest import CATALOGUE, HI, Certificates, GuardedRedis, KeyedDeployment, tls_redis

# Each process may use the keys and channels of its namespace, and no command that affects or shows others.
COMMANDS = (
    "-@all +@read +@write +@connection +@transaction +@pubsub +eval +evalsha +script|load +script|exists +time"
    " -@dangerous +info -scan -randomkey"
)
WEB = f"~Test:* resetchannels &Test:out:* {COMMANDS}"
# Redis compares the pattern of a subscription literally; the 0 is the number of the database.
WORKER = f"~Test:* resetchannels &Test:* &Test:/0.celery.pidbox &Test:/0.celeryev/worker.* {COMMANDS}"
PASSWORDS = {"web": "p/w@:1 ", "worker": "ü#?&%2f"}
HARMLESS = {"client"}
"""redis-py sends its name and version with CLIENT SETINFO and ignores an error."""

needs_tls = pytest.mark.skipif(
    tls_redis() is None, reason="no redis-server with TLS (apt-get install redis-server)"
)


def acl_password(password: str) -> str:
    return "#" + hashlib.sha256(password.encode()).hexdigest()


@pytest.fixture(scope="module", params=["users", pytest.param("users over TLS", marks=needs_tls)])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Web and two workers as two users of one Redis. Tests share it and must leave it as it is."""
    folder: Path = tmp_path_factory.mktemp("guarded")
    tls = Certificates.make(folder / "tls") if "TLS" in request.param else None
    users = [
        f"user {name} on {acl_password(PASSWORDS[name])} {rules}"
        for name, rules in (("web", WEB), ("worker", WORKER))
    ]
    server = GuardedRedis(
        folder / "redis", "user default off", *users, user="web", password=PASSWORDS["web"], tls=tls
    )
    service = KeyedDeployment(
        folder,
        catalogue=CATALOGUE,
        redis_server=server,
        API_KEYS="k",
        RATE_LIMIT="100/second",
        NODE_BIND=f"127.0.0.1:{free_port()}",
    )
    service.key = "k"
    with service:
        try:
            server.start()
            service.start_web()
            workers_url = server.url_of("worker", PASSWORDS["worker"])
            for model in ("echo", "echo-images"):
                service.start_worker(model, REDIS_URL=workers_url)
            service.wait_ready("echo", "echo-images")
            yield service
        finally:
            server.stop()


def as_user(guarded: Deployment, user: str) -> redis.Redis:
    assert isinstance(guarded.redis, GuardedRedis)
    return connect_redis(Settings(redis_url=guarded.redis.url_of(user, PASSWORDS[user])))


def test_everything_works_with_these_rights(guarded: Deployment) -> None:
    assert guarded.chat("Hi", "echo", max_tokens=3)[0] == 200
    stream = guarded.stream("Hi", "echo", max_tokens=3)
    assert stream.text() == "0 1 2 " and stream.done
    check_resumption(guarded)
    status, answer = guarded.post("/v1/images/generations", {"model": "echo-images", "prompt": "x"})
    assert status == 200, answer
    link = answer["data"][0]["url"].removeprefix(guarded.url)
    response, connection = guarded.request("GET", link)
    assert response.status == 200 and response.read().startswith(b"\x89PNG")
    connection.close()
    # By then leases have been renewed and cancellations read; the request monitor and kombu have run, too.
    begun = asked_for_work(guarded)
    wait_until(lambda: asked_for_work(guarded) >= begun + 8, timeout_s=60, what="workers ask for work")
    denied = {
        (entry["username"], entry["object"])
        for entry in guarded.redis.client.acl_log()
        if entry["object"] not in HARMLESS
    }
    assert not denied
    for process in guarded.workers.values():
        process.check_alive()
        assert "permission" not in process.log.read_text().lower()
    assert guarded.web is not None and "permission" not in guarded.web.log.read_text().lower()


def check_resumption(guarded: Deployment) -> None:
    """Begin a stream that can be resumed, and read it again while the first connection is open."""
    body = {"model": "echo", "messages": HI, "max_tokens": 3, "stream": True}
    headers = {"Content-Type": "application/json", "X-Resumable": "true"}
    first, connection = guarded.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
    with closing(connection):
        assert first.readline() == b"id: 1\n"
        request_id = json.loads(first.readline().removeprefix(b"data: "))["id"]
        again, other = guarded.request("GET", f"/v1/chat/completions/{request_id}/events")
        with closing(other):
            assert again.status == 200 and again.read().endswith(b"data: [DONE]\n\n")


def asked_for_work(guarded: Deployment) -> int:
    """How often workers have asked for a task."""
    return int(guarded.redis.client.info("commandstats")["cmdstat_brpop"]["calls"])


@pytest.mark.parametrize("user", ["web", "worker"])
def test_nothing_else_is_allowed(guarded: Deployment, user: str) -> None:
    client = as_user(guarded, user)
    assert client.set("Test:mine", 1, ex=60)
    for command in [
        ("GET", "Other:job"),
        ("SET", "Other:job", "x"),
        ("DEL", "Test", "Other:job"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("CONFIG", "GET", "*"),
        ("SCRIPT", "FLUSH"),
        ("SAVE",),
        ("SHUTDOWN",),
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("ACL", "LIST"),
        ("MONITOR",),
        ("SLAVEOF", "NO", "ONE"),
        ("PUBLISH", "Other:out:x", "x"),
        ("EVAL", "return redis.call('GET', 'Other:job')", "0"),
        ("EVAL", "return redis.call('FLUSHALL')", "0"),
    ]:
        with pytest.raises(redis.ResponseError, match=r"(?i)permission|NOPERM|can't (run|access)|ACL"):
            client.execute_command(*command)
    with pytest.raises(redis.ResponseError, match=r"(?i)perm"), client.pubsub() as pubsub:
        pubsub.psubscribe("*")
        pubsub.get_message(timeout=5)
        pubsub.get_message(timeout=5)
    client.close()
    guarded.redis.client.acl_log_reset()


def test_no_access_without_the_right_password(guarded: Deployment) -> None:
    assert isinstance(guarded.redis, GuardedRedis)
    for user, password in (("web", "wrong"), ("web", ""), ("default", ""), ("nobody", PASSWORDS["web"])):
        with connect_redis(Settings(redis_url=guarded.redis.url_of(user, password))) as client:
            with pytest.raises(redis.RedisError):
                client.ping()


def test_both_clients_of_a_url_check_the_certificate(guarded: Deployment, tmp_path: Path) -> None:
    """redis-py and Celery connect only if the right authority has signed the certificate."""
    url = guarded.redis.url
    right = Settings(redis_url=url)
    with create_celery(right, Keys.of("Test")).connection() as connection:
        connection.ensure_connection(max_retries=1)
        assert isinstance(connection.transport, ReconnectingTransport)
    if not url.startswith("rediss:"):
        return
    other = Certificates.make(tmp_path / "other")
    wrong = Settings(redis_url=url.replace(url.partition("ssl_ca_certs=")[2], str(other.ca)))
    with pytest.raises(redis.ConnectionError, match="certificate verify failed"):
        connect_redis(wrong).ping()
    with create_celery(wrong, Keys.of("Test")).connection() as connection:
        with pytest.raises(Exception, match="certificate verify failed"):
            connection.ensure_connection(max_retries=1, interval_start=0)
    unprotected = redis.Redis(port=guarded.redis.port, socket_timeout=5)
    with pytest.raises(redis.RedisError):
        unprotected.ping()
    unprotected.close()


def test_a_disabled_user_is_no_500(guarded: Deployment) -> None:
    """While the user is disabled, requests fail as if Redis were away."""
    admin = guarded.redis.client
    admin.execute_command("ACL", "SETUSER", "web", "off")
    admin.execute_command("CLIENT", "KILL", "USER", "web")
    body = {"model": "echo", "messages": HI, "max_tokens": 1}
    wait_until(
        lambda: guarded.post("/v1/chat/completions", body)[0] == 503,
        timeout_s=20,
        what="requests are refused",
    )
    admin.execute_command("ACL", "SETUSER", "web", "on")
    wait_until(
        lambda: guarded.post("/v1/chat/completions", body)[0] == 200, timeout_s=20, what="requests are served"
    )
