"""The way of a job from web to a worker: admit, send, claim, end. Each is one atomic call in Redis.

Times are Redis' own (seconds), so that clocks of several machines don't matter. What the queue itself (Celery) carries
is the request id; whoever takes the claim works on it, and a copy of the message that can't take it is harmless.
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
RATE_BUCKET_S = 10

_ADMIT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local deadline_s = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local waiting = redis.call('ZCARD', KEYS[1])
local finished, saturated_s, bucket = 0, 0, math.floor(now / 10)
for back = 1, 6 do
    local count = tonumber(redis.call('GET', ARGV[5] .. (bucket - back)) or 0)
    finished = finished + count
    if count > 0 then saturated_s = saturated_s + 10 end
end
local wait_s = 0
if saturated_s >= 30 then wait_s = waiting * saturated_s / finished end
if waiting >= tonumber(ARGV[3]) or wait_s > deadline_s / 2 then
    return {0, waiting, math.ceil(wait_s)}
end
local ttl = math.ceil(deadline_s) + tonumber(ARGV[4])
redis.call('ZADD', KEYS[1], now + deadline_s, ARGV[1])
redis.call('EXPIRE', KEYS[1], ttl)
redis.call('HSET', KEYS[2], 'admitted', now, 'deadline', now + deadline_s, unpack(ARGV, 6))
redis.call('EXPIRE', KEYS[2], ttl)
return {1, tostring(now)}
"""

_CLAIM = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[2] then return {} end
local admitted = tonumber(redis.call('HGET', KEYS[2], 'admitted') or 0)
local deadline = tonumber(redis.call('HGET', KEYS[2], 'deadline') or 0)
redis.call('ZREM', KEYS[4], ARGV[1])
if now >= deadline or redis.call('EXISTS', KEYS[3]) == 1 then return {} end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
if admitted > tonumber(redis.call('GET', KEYS[5]) or 0) then
    redis.call('SET', KEYS[5], string.format('%.6f', admitted), 'EX', ARGV[3])
end
return {tostring(deadline - now), redis.call('HGETALL', KEYS[2])}
"""

_END = """
redis.call('DEL', KEYS[1])
if ARGV[1] == '1' and redis.call('ZCARD', KEYS[2]) > 0 then
    local bucket = KEYS[3] .. math.floor(tonumber(redis.call('TIME')[1]) / 10)
    redis.call('INCR', bucket)
    redis.call('EXPIRE', bucket, 90)
end
"""


class Claimed(NamedTuple):
    """A job that this worker, and no other, now works on."""

    job: Job
    web_id: str
    remaining_s: float


class JobQueue:
    """Both ends of the queue. Raises QueueUnavailable where a caller waits, redis.RedisError where a worker does."""

    def __init__(self, client: RedisClient, keys: Keys, celery: Celery, *, claim_ttl_s: int) -> None:
        self._redis = client
        self._keys = keys
        self._celery = celery
        self._claim_ttl_s = claim_ttl_s
        self._admit = client.register_script(_ADMIT)
        self._claim = client.register_script(_CLAIM)
        self._end = client.register_script(_END)
        self._answered: deque[str] = deque()

    def admit(self, job: Job, *, web_id: str, deadline_s: float, max_waiting: int) -> float:
        """Take a job in if the line is short enough; returns its admission time (Redis clock, seconds).

        Refused by length, and by estimate only where completions under saturation were measured for half a minute
        within the last one: then when waiting / rate exceeds half the deadline. Raises Overloaded, QueueUnavailable.
        """
        body, files = jobs.encode(job)
        fields: list[bytes | str] = ["body", body, "web", web_id]
        for name, data in files.items():
            fields += [name, data]
        keys = [self._keys.waiting(job.model), self._keys.job(job.id)]
        args = [job.id, deadline_s, max_waiting, JOB_GRACE_S, self._keys.completions(job.model), *fields]
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

        A failed publish is ambiguous (the message may have been queued): the caller cancels the id.
        """
        with queue_errors():
            self._celery.send_task(
                GENERATE_TASK,
                args=[request_id],
                task_id=request_id,
                queue=self._keys.queue(model),
                expires=expires_s,
                ignore_result=True,
                # nobody replies; left out, Celery computes an address for each thread and keeps it
                reply_to="none",
            )

    def cancel(self, request_id: str, model: str) -> None:
        """Nobody waits any more: a worker drops the job at its claim or within a second while it runs."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(self._keys.cancel(request_id), b"1", ex=self._claim_ttl_s)
            pipe.zrem(self._keys.waiting(model), request_id)
            pipe.delete(self._keys.job(request_id), self._keys.replay(request_id))
            pipe.execute()

    def forget(self, request_id: str) -> None:
        """Its answer is complete on this side: nobody reads the replay list again. `sweep` deletes it."""
        self._answered.append(request_id)

    def sweep(self) -> None:
        """Delete the replay lists of what was forgotten since the last time: they outweigh everything else in Redis."""
        if answered := [self._answered.popleft() for _ in range(len(self._answered))]:
            self._redis.unlink(*map(self._keys.replay, answered))

    def claim(self, request_id: str, model: str, incarnation_id: str) -> Claimed | None:
        """Take a job for this incarnation; None when another has it, or nobody waits for it any more.

        Repeating the call with the same `incarnation_id` is safe: a worker that lost the answer may ask again.
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
        """A claimed job is over. Completions count for the estimate only while others wait: idle says nothing of speed."""
        key = self._keys
        self._end(
            keys=[key.job(request_id), key.waiting(model), key.completions(model)],
            args=["1" if completed else "0"],
        )

    def cancelled(self, request_ids: list[str]) -> set[str]:
        """Those of `request_ids` that were cancelled."""
        if not request_ids:
            return set()
        found = self._redis.mget([self._keys.cancel(request_id) for request_id in request_ids])
        return {request_id for request_id, mark in zip(request_ids, found, strict=True) if mark is not None}


JobError = msgspec.ValidationError
"""What `claim` raises for a job of another version of this service."""
