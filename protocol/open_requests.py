"""What an operator may know and do about open requests: list them without their prompts, and cancel one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from protocol.connections import RedisClient
from protocol.names import Keys

BY_OPERATOR = b"operator"
"""Value of the cancel mark of a request that an operator has cancelled. Others mean that nobody waits for
it."""


class OpenRequest(NamedTuple):
    """One admitted request that has not ended.

    `incarnation_id`: of the worker that runs it, "" while it waits.
    """

    id: str
    model: str
    incarnation_id: str
    age_s: float


class OpenRequests:
    """Reads and cancels requests of all web processes. Methods raise redis.RedisError.

    `mark_ttl_s`: how long a cancellation is remembered, longer than every deadline.
    """

    def __init__(self, client: RedisClient, keys: Keys, *, mark_ttl_s: int) -> None:
        self._redis = client
        self._keys = keys
        self._mark_ttl_s = mark_ttl_s

    def of_models(self, models: Sequence[str]) -> list[OpenRequest]:
        """Return the open requests of these models, the oldest of each model first. Takes two round trips."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.time()
            for model in models:
                pipe.zrange(self._keys.running(model), 0, -1)
                pipe.zrange(self._keys.waiting(model), 0, -1)
            (seconds, micros), *members = pipe.execute()
        by_model = zip(models, members[::2], members[1::2], strict=True)
        ids = [(key.decode(), model) for model, *lists in by_model for keys in lists for key in keys]
        now, found = seconds + micros / 1e6, []
        for (request_id, model), (admitted, claim) in zip(ids, self._look_up(ids), strict=True):
            # without its job it has ended, or its client has disconnected
            if admitted is not None:
                incarnation_id = claim.decode() if claim else ""
                found.append(OpenRequest(request_id, model, incarnation_id, now - float(admitted)))
        return sorted(found, key=lambda request: (models.index(request.model), -request.age_s))

    def cancel(self, request_id: str, models: Sequence[str]) -> bool:
        """Cancel a request of one of these models; False if none of them has it.

        What waits is not run any more, what runs ends within two seconds. Its client gets
        `CancelledByOperator`.
        """
        for request in self.of_models(models):
            if request.id == request_id:
                with self._redis.pipeline(transaction=True) as pipe:
                    # the job stays: without it the web process would take the request for lost
                    pipe.set(self._keys.cancel(request_id), BY_OPERATOR, ex=self._mark_ttl_s)
                    pipe.zrem(self._keys.waiting(request.model), request_id)
                    pipe.execute()
                return True
        return False

    def cancelled_by_operator(self, request_id: str) -> bool:
        """Whether an operator has cancelled a request."""
        return self._redis.get(self._keys.cancel(request_id)) == BY_OPERATOR

    def _look_up(self, ids: Sequence[tuple[str, str]]) -> list[tuple[Any, Any]]:
        """Return admission time and claim of each, None where there is none."""
        with self._redis.pipeline(transaction=False) as pipe:
            for request_id, _ in ids:
                pipe.hget(self._keys.job(request_id), "admitted")
                pipe.get(self._keys.claim(request_id))
            replies = pipe.execute()
        return list(zip(replies[::2], replies[1::2], strict=True))
