"""A job on its way from web to a worker: admit, send, claim, end. Each is one atomic call in Redis.

Times are Redis' own (seconds), so that clocks of several machines don't matter. Celery's queue carries the
request id; the worker that gets the claim generates it, and a copy of the message that can't get the claim
is harmless.
"""

from collections import deque
from typing import NamedTuple

import msgspec
from celery import Celery

from protocol import jobs
from protocol.connections import RedisClient, queue_errors
from protocol.errors import Overloaded
from protocol.jobs import Job
from protocol.names import GENERATE_TASK, Keys

JOB_GRACE_S = 30
"""How long a job outlives its deadline, for a worker that ends it late."""
RATE_BUCKET_S = 10
RATE_BUCKETS = 6
"""The wait is estimated from the completions of the last RATE_BUCKETS x RATE_BUCKET_S seconds."""
SATURATED_S = 30
"""So many of those seconds must have had completions while others waited, or there is no estimate."""

# Stores a job and adds it to the waiting ones; refuses it by their number or by the estimated wait.
# Returns {1, admission time}, or {0, waiting requests, estimated wait in s}.
# The keys of the buckets are built here, which Redis allows everywhere but in a cluster.
_ADMIT = """
local waiting_key, job_key = KEYS[1], KEYS[2]
local request_id, deadline_s = ARGV[1], tonumber(ARGV[2])
local max_waiting, grace_s = tonumber(ARGV[3]), tonumber(ARGV[4])
local bucket_prefix, bucket_s = ARGV[5], tonumber(ARGV[6])
local buckets, saturated_s = tonumber(ARGV[7]), tonumber(ARGV[8])
local first_field = 9

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6

local finished, measured_s, current = 0, 0, math.floor(now / bucket_s)
for back = 1, buckets do
  local count = tonumber(redis.call('GET', bucket_prefix .. (current - back)) or 0)
  finished = finished + count
  if count > 0 then measured_s = measured_s + bucket_s end
end

redis.call('ZREMRANGEBYSCORE', waiting_key, '-inf', now)
local waiting, wait_s = redis.call('ZCARD', waiting_key), 0
if measured_s >= saturated_s then wait_s = waiting * measured_s / finished end
if waiting >= max_waiting or wait_s > deadline_s / 2 then
  return {0, waiting, math.ceil(wait_s)}
end

local ttl, deadline = math.ceil(deadline_s) + grace_s, now + deadline_s
redis.call('ZADD', waiting_key, deadline, request_id)
redis.call('EXPIRE', waiting_key, ttl)
redis.call('HSET', job_key, 'admitted', now, 'deadline', deadline, unpack(ARGV, first_field))
redis.call('EXPIRE', job_key, ttl)
return {1, tostring(now)}
"""

# Gives a job to one incarnation, again to the same one. Returns {seconds left, fields of the job}, or {}
# when there is nothing to do: claimed by another, ended, cancelled or past its deadline.
_CLAIM = """
local claim_key, job_key, cancel_key, waiting_key, youngest_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
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
return {tostring(deadline - now), redis.call('HGETALL', job_key)}
"""

# Deletes a job, and counts it in the current bucket if it was completed while others waited.
_END = """
local job_key, waiting_key = KEYS[1], KEYS[2]
local completed, bucket_prefix = ARGV[1] == '1', ARGV[2]
local bucket_s, buckets = tonumber(ARGV[3]), tonumber(ARGV[4])

redis.call('DEL', job_key)
if completed and redis.call('ZCARD', waiting_key) > 0 then
  local bucket_key = bucket_prefix .. math.floor(tonumber(redis.call('TIME')[1]) / bucket_s)
  redis.call('INCR', bucket_key)
  redis.call('EXPIRE', bucket_key, bucket_s * (buckets + 3))
end
"""


class Claimed(NamedTuple):
    """A job that this worker has claimed, and no other can claim."""

    job: Job
    web_id: str
    remaining_s: float


class JobQueue:
    """Both ends of the queue. `admit` and `send` raise QueueUnavailable, the others redis.RedisError."""

    def __init__(self, client: RedisClient, keys: Keys, celery: Celery, *, claim_ttl_s: int) -> None:
        self._redis = client
        self._keys = keys
        self._celery = celery
        self._claim_ttl_s = claim_ttl_s
        self._admit = client.register_script(_ADMIT)
        self._claim = client.register_script(_CLAIM)
        self._end = client.register_script(_END)
        self._forgotten: deque[str] = deque()

    def admit(self, job: Job, *, web_id: str, deadline_s: float, max_waiting: int) -> float:
        """Admit a job if the queue is short enough; returns its admission time (Redis clock, seconds).

        Raises Overloaded when `max_waiting` requests wait, or when the wait, estimated from the rate of
        completions, would exceed half the deadline. There is an estimate only after SATURATED_S of
        completions while others waited. Raises QueueUnavailable.
        """
        body, files = jobs.encode(job)
        fields: list[bytes | str] = ["body", body, "web", web_id]
        for name, data in files.items():
            fields += [name, data]
        keys = [self._keys.waiting(job.model), self._keys.job(job.id)]
        rate = (self._keys.completions(job.model), RATE_BUCKET_S, RATE_BUCKETS, SATURATED_S)
        args = [job.id, deadline_s, max_waiting, JOB_GRACE_S, *rate, *fields]
        with queue_errors():
            admitted, *rest = self._admit(keys=keys, args=args)
        if not admitted:
            waiting, wait_s = rest
            raise Overloaded(
                f"{waiting} requests wait for model {job.model!r} already; try again later",
                retry_after_s=min(60, max(1, wait_s)),
            )
        return float(rest[0])

    def send(self, request_id: str, model: str, *, expires_s: float) -> None:
        """Queue an admitted job for any worker of its model. Raises QueueUnavailable.

        A message that failed may have been queued all the same, so the request must then be cancelled.
        """
        with queue_errors():
            self._celery.send_task(
                GENERATE_TASK,
                args=[request_id],
                task_id=request_id,
                queue=self._keys.queue(model),
                expires=expires_s,
                ignore_result=True,
                # there are no replies; without this Celery computes an address for each thread and keeps it
                reply_to="none",
            )

    def cancel(self, request_id: str, model: str) -> None:
        """Cancel a request: a worker drops it at its claim, or within a second while it runs."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(self._keys.cancel(request_id), b"1", ex=self._claim_ttl_s)
            pipe.zrem(self._keys.waiting(model), request_id)
            pipe.delete(self._keys.job(request_id), self._keys.replay(request_id))
            pipe.execute()

    def forget(self, request_id: str) -> None:
        """Note that a request's events have all been read; `sweep` deletes its replay list."""
        self._forgotten.append(request_id)

    def sweep(self) -> None:
        """Delete the replay lists of forgotten requests: before they expire they would fill most of Redis."""
        if forgotten := [self._forgotten.popleft() for _ in range(len(self._forgotten))]:
            self._redis.unlink(*map(self._keys.replay, forgotten))

    def claim(self, request_id: str, model: str, incarnation_id: str) -> Claimed | None:
        """Claim a job; None if another incarnation has it, or if it has ended, was cancelled or is too late.

        Safe to repeat with the same `incarnation_id`, by a worker that has lost the answer. Raises JobError.
        """
        key = self._keys
        names = [
            key.claim(request_id),
            key.job(request_id),
            key.cancel(request_id),
            key.waiting(model),
            key.youngest_claimed(model),
        ]
        answer = self._claim(keys=names, args=[request_id, incarnation_id, self._claim_ttl_s])
        if not answer:
            return None
        flat = answer[1]
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        files = {name: fields[name.encode()] for name in ("image", "mask") if name.encode() in fields}
        return Claimed(jobs.decode(fields[b"body"], files), fields[b"web"].decode(), float(answer[0]))

    def end(self, request_id: str, model: str, *, completed: bool) -> None:
        """Delete a claimed job that has ended. A completed one counts for the estimate if others wait."""
        key = self._keys
        self._end(
            keys=[key.job(request_id), key.waiting(model)],
            args=["1" if completed else "0", key.completions(model), RATE_BUCKET_S, RATE_BUCKETS],
        )

    def cancelled(self, request_ids: list[str]) -> set[str]:
        """Return those of `request_ids` that were cancelled."""
        if not request_ids:
            return set()
        found = self._redis.mget([self._keys.cancel(request_id) for request_id in request_ids])
        return {request_id for request_id, mark in zip(request_ids, found, strict=True) if mark is not None}


JobError = msgspec.ValidationError
"""Raised by `JobQueue.claim` for a job that was written by another version of this service."""
