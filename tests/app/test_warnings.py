"""What /readyz warns of, with a real Redis."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from app.dispatch.worker_view import WorkerView
from app.operations.warnings import Warnings
from catalogue import Catalogue
from config import Settings
from protocol.alarms import Alarms
from protocol.drains import Drains
from protocol.leases import Leases
from protocol.names import Keys
from tests.deployment import RedisServer
from tests.records import worker_record

CATALOGUE = Catalogue.model_validate(
    {
        "project": "P",
        "models": [{"name": "echo", "tasks": ["chat"], "weights": "echo:", "workers": [[], []]}],
    }
)


class Bench:
    """Warnings on real leases. `warnings()` takes a new look at them first."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self.leases = Leases(client, keys)
        self.view = WorkerView(self.leases)
        self.alarms = Alarms(client, keys)
        self.drains = Drains(client, keys)
        self._warnings = Warnings(
            Settings(node_url=""), CATALOGUE.models, self.view, client, self.alarms, self.drains
        )

    def worker(self, cid: str, **fields: Any) -> None:
        self.leases.renew_worker(worker_record(cid, **({"node": "n", "state": "ready"} | fields)))

    def warnings(self) -> list[str]:
        self.view.refresh()
        return self._warnings()


@pytest.fixture
def bench(redis_client: Any, keys: Keys) -> Bench:
    return Bench(redis_client, keys)


def test_nothing_to_warn_of(bench: Bench) -> None:
    bench.worker("one", registered=True)
    bench.worker("two", registered=True)
    assert bench.warnings() == []


def test_a_refusal_of_the_node(bench: Bench) -> None:
    bench.worker("one", registered=True)
    bench.worker("two", last_error="could not register: code 1001")
    assert bench.warnings() == ["worker two of echo is not registered: could not register: code 1001"]


@pytest.mark.parametrize("state", ["loading", "draining"])
def test_a_worker_that_is_not_ready_beside_one_that_is(bench: Bench, state: str) -> None:
    bench.worker("one")
    bench.worker("two", state=state)
    assert bench.warnings() == ["echo has 1 ready of 2 workers; /v1/workers and the log say why"]


def test_an_alarm_of_a_supervisor(bench: Bench) -> None:
    bench.worker("one")
    bench.worker("two")
    bench.alarms.renew({"echo-3 on gpu7 does not run: no such folder"})
    assert bench.warnings() == ["echo-3 on gpu7 does not run: no such folder"]


def test_a_worker_under_drain(bench: Bench) -> None:
    bench.worker("one")
    bench.worker("two")
    bench.drains.add(["echo-2@h"])
    (warning,) = bench.warnings()
    assert warning == (
        "worker echo-2@h is under drain; `flask --app wsgi workers resume echo-2@h` lets it serve again"
    )
    bench.drains.remove(["echo-2@h"])
    assert bench.warnings() == []


def test_a_worker_that_has_ended(bench: Bench) -> None:
    bench.worker("one")
    assert bench.warnings() == ["echo has 1 ready of 2 workers; /v1/workers and the log say why"]


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.client
    server.stop()


def test_a_redis_that_may_remove_requests(own: redis.Redis, keys: Keys) -> None:
    own.config_set("maxmemory-policy", "volatile-ttl")
    assert [warning for warning in Bench(own, keys).warnings() if "volatile-ttl" in warning]


def test_a_redis_that_may_not_be_asked(own: redis.Redis, keys: Keys) -> None:
    own.config_set("maxmemory-policy", "volatile-ttl")
    own.execute_command("ACL", "SETUSER", "default", "-config")
    assert Bench(own, keys).warnings() == []
