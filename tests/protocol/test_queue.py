"""protocol.queue.JobQueue on a real Redis: admission, claims and ends of jobs."""

import time
from typing import Any

import pytest

from config import Settings
from protocol.connections import create_celery
from protocol.errors import Overloaded, QueueUnavailable
from protocol.jobs import ChatJob, ImageJob, Job, SamplingParams
from protocol.names import Keys
from protocol.queue import RATE_BUCKET_S, JobQueue
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
    queue.end("over", MODEL, completed=True)
    assert queue.claim("over", MODEL, "incarnation_id") is None, (
        "a redelivered task must not be generated twice"
    )


def test_the_estimate_refuses_only_after_measured_saturation(
    queue: JobQueue, keys: Keys, redis_client: Any
) -> None:
    now = int(redis_client.time()[0])
    for back in (1, 2):
        redis_client.set(f"{keys.completions(MODEL)}{now // RATE_BUCKET_S - back}", 1, ex=60)
    admit(queue, chat("a"), deadline_s=20, max_waiting=100)
    admit(queue, chat("b"), deadline_s=20, max_waiting=100)
    # two buckets with one completion each are too few; four make a rate of 10 s for each waiting request
    for back in (1, 2, 3, 4):
        redis_client.set(f"{keys.completions(MODEL)}{now // RATE_BUCKET_S - back}", 1, ex=60)
    with pytest.raises(Overloaded) as refusal:
        admit(queue, chat("c"), deadline_s=20, max_waiting=100)
    assert refusal.value.retry_after_s == 20


def test_completions_count_only_while_others_wait(queue: JobQueue, keys: Keys, redis_client: Any) -> None:
    admit(queue, chat("a"))
    queue.claim("a", MODEL, "incarnation_id")
    queue.end("a", MODEL, completed=True)
    assert not redis_client.keys(keys.completions(MODEL) + "*")
    admit(queue, chat("b"))
    admit(queue, chat("c"))
    queue.claim("b", MODEL, "incarnation_id")
    queue.end("b", MODEL, completed=True)
    assert len(redis_client.keys(keys.completions(MODEL) + "*")) == 1


def test_every_key_has_a_ttl(queue: JobQueue, keys: Keys, redis_client: Any) -> None:
    admit(queue, chat("a"))
    queue.send("a", MODEL, expires_s=10)
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
    queue.send("a", MODEL, expires_s=10)
    (message,) = redis_client.lrange(keys.queue_list(MODEL), 0, -1)
    assert b"s3cret" not in message


def test_an_unreachable_redis_is_queue_unavailable(keys: Keys) -> None:
    from protocol.connections import connect_redis

    settings = Settings(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    queue = JobQueue(connect_redis(settings), keys, create_celery(settings, keys), claim_ttl_s=100)
    with pytest.raises(QueueUnavailable):
        admit(queue, chat("a"))
    with pytest.raises(QueueUnavailable):
        queue.send("a", MODEL, expires_s=10)
