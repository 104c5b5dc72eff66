"""A job on its way from web to a worker: admit, claim, end. Each is one atomic call in Redis.

Times are Redis' own (seconds), so that clocks of several machines don't matter. Celery's queue carries the
request id; the worker that gets the claim generates it, and a copy of the message that can't get the claim
is harmless.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from celery import Celery

from catalogue import TASKS
from config import Settings
from protocol import jobs
from protocol.connections import RedisClient, queue_errors
from protocol.errors import Overloaded
from protocol.jobs import Job
from protocol.names import Keys
from protocol.redis_memory import MEMORY_ROOM
from protocol.task_messages import TaskMessages

JOB_GRACE_S = 30
"""How long a job outlives its deadline, for a worker that ends it late."""

CLAIM_GRACE_S = 120
"""How long a claim outlives the longest deadline: no late copy of a message may run the request again."""

MAX_WAITING_BYTES = 256 * 2**20
"""Images of the waiting jobs of one model; an edit or a chat can have 20 MiB."""

# Stores a job, adds it to the waiting ones and queues its message. Refuses it by the number of waiting
# requests, or, where the workers' rate is known, by the time that they will take. A job with images is also
# refused by the bytes of the images that wait, and where Redis has no room for them. Returns {1, admission
# time}, or {0, waiting requests, estimated wait in s}; the wait is -1 if the images are the reason. The keys
# of the waiting jobs are built here, which Redis allows everywhere but in a cluster.
_ADMIT = (
    MEMORY_ROOM
    + """
local waiting_key, job_key, queue_key = KEYS[1], KEYS[2], KEYS[3]
local request_id, message = ARGV[1], ARGV[2]
local deadline_s, grace_s, max_waiting = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local rate, job_prefix = tonumber(ARGV[6]), ARGV[7]
local bytes, max_bytes = tonumber(ARGV[8]), tonumber(ARGV[9])
local first_field = 10

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
redis.call('ZREMRANGEBYSCORE', waiting_key, '-inf', now)
local waiting, wait_s = redis.call('ZCARD', waiting_key), 0
if rate > 0 and waiting > 0 then
  local work = 0
  for _, id in ipairs(redis.call('ZRANGE', waiting_key, 0, -1)) do
    work = work + tonumber(redis.call('HGET', job_prefix .. id, 'work') or 0)
  end
  wait_s = work / rate
end
if waiting >= max_waiting or wait_s > deadline_s / 2 then
  return {0, waiting, math.ceil(wait_s)}
end
if bytes > 0 then
  local total = bytes
  for _, id in ipairs(redis.call('ZRANGE', waiting_key, 0, -1)) do
    total = total + tonumber(redis.call('HGET', job_prefix .. id, 'bytes') or 0)
  end
  if total > max_bytes or (memory_room() or bytes) < bytes then return {0, waiting, -1} end
end

local ttl, deadline = math.ceil(deadline_s) + grace_s, now + deadline_s
redis.call('ZADD', waiting_key, deadline, request_id)
redis.call('EXPIRE', waiting_key, ttl)
redis.call('HSET', job_key, 'admitted', now, 'deadline', deadline, 'bytes', bytes, unpack(ARGV, first_field))
redis.call('EXPIRE', job_key, ttl)
redis.call('LPUSH', queue_key, message)
return {1, tostring(now)}
"""
)

# Queues another message for a job that still exists and waits. Returns 1 if it did.
_RESEND = """
local waiting_key, job_key, queue_key = KEYS[1], KEYS[2], KEYS[3]
local request_id, message = ARGV[1], ARGV[2]
if redis.call('EXISTS', job_key) == 0 or not redis.call('ZSCORE', waiting_key, request_id) then return 0 end
redis.call('LPUSH', queue_key, message)
return 1
"""

# Gives a job to one incarnation, again to the same one. Returns {seconds left, fields of the job}, or {}
# when there is nothing to do: claimed by another, ended, cancelled or past its deadline.
_CLAIM = """
local claim_key, job_key, cancel_key, waiting_key, youngest_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local running_key = KEYS[6]
local request_id, incarnation_id, ttl = ARGV[1], ARGV[2], ARGV[3]

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local owner = redis.call('GET', claim_key)
if owner and owner ~= incarnation_id then return {} end

local admitted = tonumber(redis.call('HGET', job_key, 'admitted') or 0)
local deadline = tonumber(redis.call('HGET', job_key, 'deadline') or 0)
redis.call('ZREM', waiting_key, request_id)
if now >= deadline or redis.call('EXISTS', cancel_key) == 1 then return {} end

redis.call('SET', claim_key, incarnation_id, 'EX', ttl)
if admitted > tonumber(redis.call('GET', youngest_key) or 0) then
  redis.call('SET', youngest_key, string.format('%.6f', admitted), 'EX', ttl)
end
-- for operators; what lost workers have left is removed
redis.call('ZREMRANGEBYSCORE', running_key, '-inf', now - ttl)
redis.call('ZADD', running_key, deadline, request_id)
redis.call('EXPIRE', running_key, ttl)
return {tostring(deadline - now), redis.call('HGETALL', job_key)}
"""


def claim_ttl_s(settings: Settings) -> int:
    """Return for how many seconds a claim is kept."""
    return int(max(task.deadline_s(settings) for task in TASKS.values())) + CLAIM_GRACE_S


class Claimed(NamedTuple):
    """A job that this worker has claimed, and no other can claim. `queued_s`: since its admission."""

    job: Job
    web_id: str
    remaining_s: float
    queued_s: float


class UnreadableJob(Exception):
    """A claimed job that this version can't read: it was written by another one.

    Its client waits for an answer.
    """

    def __init__(self, web_id: str, remaining_s: float, reason: str) -> None:
        super().__init__(reason)
        self.web_id = web_id
        self.remaining_s = remaining_s


class JobQueue:
    """Both ends of the queue. `admit` and `send_again` raise QueueUnavailable, the others redis.RedisError.

    `background`: the client for what no request waits for (`send_again`, `sweep`); by default the same. A
    burst of requests may use all connections of `client`.
    """

    def __init__(
        self,
        client: RedisClient,
        keys: Keys,
        celery: Celery,
        *,
        claim_ttl_s: int,
        background: RedisClient | None = None,
    ) -> None:
        self._redis = client
        self._background = background or client
        self._keys = keys
        self._messages = TaskMessages(celery)
        self._claim_ttl_s = claim_ttl_s
        self._admit = client.register_script(_ADMIT)
        self._resend = self._background.register_script(_RESEND)
        self._claim = client.register_script(_CLAIM)
        self._forgotten: deque[str] = deque()
        self._uncertain: deque[tuple[str, str]] = deque()

    def prepare(self, models: Iterable[str]) -> None:
        """Make ready to admit jobs of these models."""
        self._messages.prepare(map(self._keys.queue, models))

    def admit(
        self, job: Job, *, web_id: str, deadline_s: float, max_waiting: int, rate: float = 0.0
    ) -> float:
        """Admit and queue a job in one step; returns its admission time (Redis clock, seconds).

        `rate` is the work (protocol.jobs.work_of) that the model's workers finish in a second, 0 if it is not
        known. Raises Overloaded when `max_waiting` requests wait, when what waits will take longer than half
        the deadline, or when there is no room for the job's images. Raises QueueUnavailable; the job may then
        have been queued all the same, so it must be cancelled.
        """
        body, files = jobs.encode(job)
        fields: list[bytes | str | float] = ["body", body, "web", web_id, "work", jobs.work_of(job)]
        for name, data in files.items():
            fields += [name, data]
        message = self._messages.make(job.id, self._keys.queue(job.model))
        limits: list[float | str] = [deadline_s, JOB_GRACE_S, max_waiting, rate, self._keys.job("")]
        limits += [sum(map(len, files.values())), MAX_WAITING_BYTES]
        with queue_errors():
            admitted, *rest = self._admit(
                keys=self._waiting_keys(job.id, job.model), args=[job.id, message, *limits, *fields]
            )
        if not admitted:
            waiting, wait_s = rest
            if wait_s < 0:
                raise Overloaded(
                    f"too many images wait for model {job.model!r} already; try again later", retry_after_s=5
                )
            raise Overloaded(
                f"{waiting} requests wait for model {job.model!r} already; try again later",
                retry_after_s=min(60, max(1, wait_s)),
            )
        return float(rest[0])

    def send_again(self, request_id: str, model: str) -> bool:
        """Queue another message for a job that waits; False if it does not wait any more.

        Raises QueueUnavailable.
        """
        message = self._messages.make(request_id, self._keys.queue(model), copy=1)
        with queue_errors():
            return bool(self._resend(keys=self._waiting_keys(request_id, model), args=[request_id, message]))

    def cancel(self, request_id: str, model: str) -> None:
        """Cancel a request: a worker drops it at its claim, or within a second while it runs."""
        self._cancel(self._redis, request_id, model)

    def cancel_later(self, request_id: str, model: str) -> None:
        """Cancel a request of which it is not known whether it was admitted; `sweep` does it when Redis
        answers."""
        self._uncertain.append((request_id, model))

    def forget(self, request_id: str) -> None:
        """Note that a request's events have all been read; `sweep` deletes its replay list."""
        self._forgotten.append(request_id)

    def sweep(self) -> None:
        """Cancel what may have been admitted unnoticed, and delete the replay lists of forgotten requests.

        These would fill most of Redis before they expire.
        """
        while self._uncertain:
            self._cancel(self._background, *self._uncertain[0])
            self._uncertain.popleft()
        if forgotten := [self._forgotten.popleft() for _ in range(len(self._forgotten))]:
            self._background.unlink(*map(self._keys.replay, forgotten))

    def claim(self, request_id: str, model: str, incarnation_id: str) -> Claimed | None:
        """Claim a job; None if another incarnation has it, or if it has ended, was cancelled or is too late.

        Safe to repeat with the same `incarnation_id`, by a worker that has lost the answer. Raises
        UnreadableJob.
        """
        key = self._keys
        names = [
            key.claim(request_id),
            key.job(request_id),
            key.cancel(request_id),
            key.waiting(model),
            key.youngest_claimed(model),
            key.running(model),
        ]
        answer = self._claim(keys=names, args=[request_id, incarnation_id, self._claim_ttl_s])
        if not answer:
            return None
        remaining_s, flat = float(answer[0]), answer[1]
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        web_id = fields[b"web"].decode()
        files = {name: value for key, value in fields.items() if jobs.is_file(name := key.decode())}
        try:
            job = jobs.decode(fields[b"body"], files)
            queued_s = float(fields[b"deadline"]) - float(fields[b"admitted"]) - remaining_s
            return Claimed(job, web_id, remaining_s, queued_s)
        except msgspec.MsgspecError as error:
            raise UnreadableJob(web_id, remaining_s, str(error)) from error

    def end(self, request_id: str, model: str) -> None:
        """Delete a claimed job that has ended.

        A claim without a job and without a last event means a lost request.
        """
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.delete(self._keys.job(request_id))
            pipe.zrem(self._keys.running(model), request_id)
            pipe.execute()

    def waiting(self, model: str) -> int:
        """Return how many admitted requests of `model` no worker has claimed."""
        return int(self._redis.zcard(self._keys.waiting(model)))

    def is_waiting(self, request_id: str, model: str) -> bool:
        """Whether a request of `model` was admitted and not yet claimed."""
        return self._redis.zscore(self._keys.waiting(model), request_id) is not None

    def queued(self, model: str) -> int:
        """Return how many messages no worker of `model` has received."""
        return int(self._redis.llen(self._keys.queue_list(model)))

    def cancelled(self, request_ids: list[str]) -> set[str]:
        """Return those of `request_ids` that were cancelled."""
        if not request_ids:
            return set()
        found = self._redis.mget([self._keys.cancel(request_id) for request_id in request_ids])
        return {request_id for request_id, mark in zip(request_ids, found, strict=True) if mark is not None}

    def _cancel(self, client: RedisClient, request_id: str, model: str) -> None:
        with client.pipeline(transaction=False) as pipe:
            pipe.set(self._keys.cancel(request_id), b"1", ex=self._claim_ttl_s)
            pipe.zrem(self._keys.waiting(model), request_id)
            # the worker removes it at the end too, but may be lost
            pipe.zrem(self._keys.running(model), request_id)
            pipe.delete(self._keys.job(request_id), self._keys.replay(request_id))
            pipe.execute()

    def _waiting_keys(self, request_id: str, model: str) -> list[str]:
        return [self._keys.waiting(model), self._keys.job(request_id), self._keys.queue_list(model)]
