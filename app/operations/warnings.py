"""Finds what works but needs the operator's attention: shown by GET /readyz."""

from collections.abc import Iterator, Sequence

from redis.exceptions import RedisError, ResponseError

from app.dispatch.worker_view import WorkerView
from catalogue import ModelEntry
from config import Settings
from protocol.alarms import Alarms
from protocol.connections import RedisClient
from protocol.drains import Drains


class Warnings:
    """Finds what to warn of. A look makes a few round trips to Redis."""

    def __init__(
        self,
        settings: Settings,
        models: Sequence[ModelEntry],
        worker_view: WorkerView,
        client: RedisClient,
        alarms: Alarms,
        drains: Drains,
    ) -> None:
        self._of_settings = settings.warnings()
        self._models = models
        self._worker_view = worker_view
        self._redis = client
        self._alarms = alarms
        self._drains = drains
        self._eviction: str | None = None

    def __call__(self) -> list[str]:
        """Return the warnings, one sentence each."""
        found = [*self._of_settings, *self._of_redis(), *self._of_processes()]
        return [*found, *self._of_models(), *self._of_node()]

    def _of_redis(self) -> Iterator[str]:
        if self._eviction is None:
            try:
                self._eviction = eviction_policy(self._redis)
            except RedisError:
                return  # the status of /readyz says that it can't be reached
        if self._eviction not in ("", "noeviction"):
            yield (
                f"maxmemory-policy of Redis is {self._eviction}: it may remove requests and leases; "
                "set it to noeviction"
            )

    def _of_processes(self) -> list[str]:
        """What the supervisors of all machines tell of processes that do not come up, and who is under
        drain."""
        if not self._worker_view.reachable:
            return []
        try:
            return [*self._alarms.current(), *map(_drained, self._drains.names())]
        except RedisError:
            return []  # the status of /readyz says so from the next second on

    def _of_models(self) -> Iterator[str]:
        for entry in self._models:
            listed = len(entry.workers or ((),))
            ready = sum(r.model == entry.name and r.state == "ready" for r in self._worker_view.records())
            # a model without any is named as missing already
            if 0 < ready < listed:
                yield f"{entry.name} has {ready} ready of {listed} workers; /v1/workers and the log say why"

    def _of_node(self) -> Iterator[str]:
        for record in self._worker_view.records():
            if record.state == "ready" and not record.registered and record.last_error:
                yield f"worker {record.cid} of {record.model} is not registered: {record.last_error}"


def _drained(name: str) -> str:
    return f"worker {name} is under drain; `flask --app wsgi workers resume {name}` lets it serve again"


def eviction_policy(client: RedisClient) -> str:
    """Return Redis' maxmemory-policy, "" if this user may not ask. Raises redis.RedisError."""
    try:
        found = client.config_get("maxmemory-policy")
    except ResponseError:
        return ""
    return str(found.get("maxmemory-policy", ""))
