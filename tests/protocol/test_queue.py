"""protocol.queue.JobQueue on a real Redis: admission, claims and ends of jobs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import redis

import protocol.queue
from config import Settings
from protocol.celery_app import create_celery
from protocol.errors import Overloaded, QueueUnavailable
from protocol.jobs import ChatJob, ImageJob, Job, SamplingParams
from protocol.names import Keys
from protocol.queue import JobQueue, UnreadableJob
from tests.deployment import RedisServer, free_port

MODEL = "m"


def chat(name: str) -> ChatJob:
    return ChatJob(
        id=name, model=MODEL, messages=[{"role": "user", "content": "hi"}], sampling=SamplingParams()
    )


@pytest.fixture
def queue(redis_server: RedisServer, keys: Keys) -> JobQueue:
    return JobQueue(
        redis_server.client, keys, create_celery(Settings(redis_url=redis_server.url), keys), claim_ttl_s=100
    )


def admit(queue: JobQueue, job: Job, *, deadline_s: float = 60, max_waiting: int = 3) -> float:
    return queue.admit(job, web_id="w", deadline_s=deadline_s, max_waiting=max_waiting)


def test_a_job_arrives_unchanged_with_its_images(queue: JobQueue) -> None:
    job = ImageJob(
        id="p", model=MODEL, task="edit", prompt="é", image=b"\x00\xff", mask=b"m", width=64, seed=3
    )
    admit(queue, job)
    claimed = queue.claim("p", MODEL, "incarnation_id")
    assert claimed is not None
    assert claimed.job == job
    assert claimed.web_id == "w"
    assert 50 < claimed.remaining_s <= 60


def test_only_one_incarnation_gets_a_claim_and_may_repeat_it(queue: JobQueue) -> None:
    admit(queue, chat("a"))
    assert queue.claim("a", MODEL, "incarnation_id-1") is not None
    assert queue.claim("a", MODEL, "incarnation_id-2") is None
    assert queue.claim("a", MODEL, "incarnation_id-1") is not None


def test_the_queue_is_bounded_and_a_claim_makes_room(queue: JobQueue) -> None:
    for name in "abc":
        admit(queue, chat(name))
    with pytest.raises(Overloaded) as refusal:
        admit(queue, chat("d"))
    assert refusal.value.retry_after_s
    queue.claim("a", MODEL, "incarnation_id")
    admit(queue, chat("d"))


def test_a_request_that_nobody_cancels_stops_counting_at_its_deadline(queue: JobQueue) -> None:
    for name in "abc":
        admit(queue, chat(name), deadline_s=0.05)
    time.sleep(0.06)
    admit(queue, chat("d"))


def test_late_cancelled_and_ended_jobs_can_not_be_claimed(queue: JobQueue) -> None:
    admit(queue, chat("late"), deadline_s=0.02)
    time.sleep(0.03)
    assert queue.claim("late", MODEL, "incarnation_id") is None
    admit(queue, chat("left"))
    queue.cancel("left", MODEL)
    assert queue.claim("left", MODEL, "incarnation_id") is None
    assert queue.cancelled(["left", "other"]) == {"left"}
    admit(queue, chat("over"))
    assert queue.claim("over", MODEL, "incarnation_id") is not None
    queue.end("over", MODEL)
    assert queue.claim("over", MODEL, "incarnation_id") is None, (
        "a redelivered task must not be generated twice"
    )


def test_the_wait_is_estimated_from_the_work_that_waits(queue: JobQueue) -> None:
    def admit_images(name: str, n: int, rate: float) -> None:
        job = ImageJob(id=name, model=MODEL, task="generation", prompt="p", n=n, num_inference_steps=1)
        queue.admit(job, web_id="w", deadline_s=20, max_waiting=100, rate=rate)

    # ten images of one step each second: a hundred waiting ones take as long as half the deadline
    admit_images("a", 60, rate=10)
    admit_images("b", 41, rate=10)
    with pytest.raises(Overloaded) as refusal:
        admit_images("c", 1, rate=10)
    assert refusal.value.retry_after_s == 11
    admit_images("c", 1, rate=20)


def test_without_a_rate_only_the_number_of_waiting_requests_refuses(queue: JobQueue) -> None:
    for name in "abc":
        admit(queue, chat(name), deadline_s=0.5)
    with pytest.raises(Overloaded):
        admit(queue, chat("d"), deadline_s=0.5)


def test_a_refused_request_leaves_nothing_behind(queue: JobQueue, keys: Keys, redis_client: Any) -> None:
    admit(queue, chat("a"), max_waiting=1)
    before = sorted(redis_client.keys(keys.prefix + "*"))
    with pytest.raises(Overloaded):
        admit(queue, chat("b"), max_waiting=1)
    assert sorted(redis_client.keys(keys.prefix + "*")) == before
    assert redis_client.llen(keys.queue_list(MODEL)) == 1


def test_every_key_has_a_ttl(queue: JobQueue, keys: Keys, redis_client: Any) -> None:
    admit(queue, chat("a"))
    queue.claim("a", MODEL, "incarnation_id")
    queue.cancel("a", MODEL)
    admit(queue, chat("b"))
    lasting = [
        name.decode()
        for name in redis_client.keys(keys.prefix + "*")
        if redis_client.ttl(name) < 0 and b"_kombu" not in name
    ]
    assert lasting == [keys.queue_list(MODEL)], "only Celery's own list of ids has none"


def test_the_message_in_the_queue_is_the_id_alone(queue: JobQueue, keys: Keys, redis_client: Any) -> None:
    job = ChatJob(
        id="a", model=MODEL, messages=[{"role": "user", "content": "s3cret"}], sampling=SamplingParams()
    )
    admit(queue, job)
    (message,) = redis_client.lrange(keys.queue_list(MODEL), 0, -1)
    assert b"s3cret" not in message


def test_an_unreachable_redis_is_queue_unavailable(keys: Keys) -> None:
    from protocol.connections import connect_redis

    settings = Settings(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    queue = JobQueue(connect_redis(settings), keys, create_celery(settings, keys), claim_ttl_s=100)
    with pytest.raises(QueueUnavailable):
        admit(queue, chat("a"))
    with pytest.raises(QueueUnavailable):
        queue.send_again("a", MODEL)


def test_a_message_can_be_sent_again_while_its_job_waits(
    queue: JobQueue, keys: Keys, redis_client: Any
) -> None:
    admit(queue, chat("a"))
    assert queue.send_again("a", MODEL)
    first, second = redis_client.lrange(keys.queue_list(MODEL), 0, -1)
    assert json.loads(first)["headers"]["id"] == json.loads(second)["headers"]["id"] == "a"
    tags = {json.loads(message)["properties"]["delivery_tag"] for message in (first, second)}
    assert len(tags) == 2, "kombu keeps unacknowledged messages by their tags"
    queue.claim("a", MODEL, "w")
    assert not queue.send_again("a", MODEL)
    queue.end("a", MODEL)
    assert not queue.send_again("a", MODEL)
    assert redis_client.llen(keys.queue_list(MODEL)) == 2


def test_a_job_of_another_version_names_its_web_process(
    queue: JobQueue, keys: Keys, redis_client: Any
) -> None:
    admit(queue, chat("a"))
    redis_client.hset(keys.job("a"), "body", b'{"type": "video", "id": "a"}')
    with pytest.raises(UnreadableJob) as error:
        queue.claim("a", MODEL, "w")
    assert error.value.web_id == "w" and error.value.remaining_s > 50


def edit(name: str, size: int) -> ImageJob:
    return ImageJob(
        id=name, model=MODEL, task="edit", prompt="p", image=bytes(size // 2), mask=bytes(size // 2)
    )


def test_the_images_that_wait_are_bounded_in_bytes(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol.queue, "MAX_WAITING_BYTES", 1000)
    admit(queue, edit("a", 600))
    with pytest.raises(Overloaded, match="images wait") as refusal:
        admit(queue, edit("b", 402))
    assert refusal.value.retry_after_s == 5
    admit(queue, edit("c", 400))
    admit(queue, chat("d"))
    assert queue.claim("a", MODEL, "incarnation_id") is not None
    admit(queue, edit("b", 402), max_waiting=9)


def test_images_are_refused_where_redis_has_no_room_and_chats_are_not(tmp_path: Path, keys: Keys) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        client = server.client
        celery = create_celery(Settings(redis_url=server.url), keys)
        queue = JobQueue(client, keys, celery, claim_ttl_s=100)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 20_000_000)
        admit(queue, edit("a", 1_000_000), max_waiting=9)
        for number in range(140):
            client.set(f"other{number}", b"x" * 100_000)
        with pytest.raises(Overloaded, match="images wait"):
            admit(queue, edit("b", 1_000_000), max_waiting=9)
        admit(queue, chat("c"), max_waiting=9)
    finally:
        server.stop()


def test_a_cancel_lasts_as_long_as_a_message_can_be_redelivered(
    queue: JobQueue, keys: Keys, redis_client: Any
) -> None:
    admit(queue, chat("a"))
    queue.claim("a", MODEL, "w")
    queue.cancel("a", MODEL)
    assert redis_client.ttl(keys.cancel("a")) > 90 and redis_client.ttl(keys.claim("a")) > 90


def test_a_cancel_that_comes_before_the_admission_counts(queue: JobQueue) -> None:
    """Redis stalled: the answer of the admission was lost, and the cancel overtook it."""
    queue.cancel("a", MODEL)
    admit(queue, chat("a"))
    assert queue.claim("a", MODEL, "w") is None


@contextmanager
def in_use(client: redis.Redis) -> Iterator[None]:
    """Take the only connection of a client."""
    connection = client.connection_pool.get_connection()
    try:
        yield
    finally:
        client.connection_pool.release(connection)


@pytest.fixture
def clients(redis_server: RedisServer) -> tuple[redis.Redis, redis.Redis]:
    """Two clients with one connection each: for requests, and for what no request waits for."""

    def connect() -> redis.Redis:
        pool = redis.BlockingConnectionPool(
            port=redis_server.port, max_connections=1, timeout=cast(Any, 0.05)
        )
        return redis.Redis.from_pool(pool)

    return connect(), connect()


@pytest.fixture
def own(redis_server: RedisServer, keys: Keys, clients: tuple[redis.Redis, redis.Redis]) -> JobQueue:
    """A queue with these clients."""
    celery = create_celery(Settings(redis_url=redis_server.url), keys)
    return JobQueue(clients[0], keys, celery, claim_ttl_s=100, background=clients[1])


def test_what_may_have_been_admitted_is_cancelled_when_redis_answers(
    queue: JobQueue, own: JobQueue, clients: tuple[redis.Redis, redis.Redis]
) -> None:
    own.cancel_later("a", MODEL)
    with in_use(clients[1]), pytest.raises(redis.ConnectionError):
        own.sweep()
    admit(queue, chat("a"))
    own.sweep()
    assert queue.claim("a", MODEL, "w") is None and queue.cancelled(["a"]) == {"a"}


def test_requests_that_use_all_connections_keep_up_nothing_else(
    queue: JobQueue, own: JobQueue, clients: tuple[redis.Redis, redis.Redis], keys: Keys, redis_client: Any
) -> None:
    admit(queue, chat("a"))
    redis_client.rpush(keys.replay("b"), b"event")
    with in_use(clients[0]):
        assert own.send_again("a", MODEL)
        own.cancel_later("a", MODEL)
        own.forget("b")
        own.sweep()
    assert queue.cancelled(["a"]) == {"a"}
    assert not redis_client.exists(keys.replay("b"))
