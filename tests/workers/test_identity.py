"""The cid of a worker without WORKER_CID: what it depends on."""

import pytest

from catalogue import Catalogue
from config import Settings
from workers import services

CATALOGUE = Catalogue.model_validate(
    {
        "project": "P",
        "models": [{"name": name, "tasks": ["chat"], "weights": "echo:"} for name in ("one", "other")],
    }
)


@pytest.fixture(params=[["GPU-1"], ["GPU-1", "GPU-2"], []], ids=["a GPU", "two GPUs", "the CPU"])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = request.param
    monkeypatch.setattr(services, "visible_gpus", lambda settings: found)
    return found


def cid(node_name: str, number: int = 0, **settings: str) -> str:
    given = Settings.model_validate({"service_id": "s", **settings})
    return services.identify(given, CATALOGUE, CATALOGUE.models[number], "P", node_name).cid


def test_workers_of_one_model_on_the_same_gpus_have_different_cids(gpus: list[str]) -> None:
    assert cid("one-1@h") != cid("one-2@h")


def test_a_restart_keeps_the_cid(gpus: list[str]) -> None:
    assert cid("one-1@h") == cid("one-1@h")


def test_models_and_services_have_different_cids(gpus: list[str]) -> None:
    assert len({cid("w@h"), cid("w@h", 1), cid("w@h", service_id="t")}) == 3


def test_a_given_cid_is_kept(gpus: list[str]) -> None:
    assert cid("one-1@h", worker_cid="mine") == "mine"
