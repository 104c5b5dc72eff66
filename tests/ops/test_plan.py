"""The processes for a catalogue: names, GPUs, environment, and the files of the embedded Redis."""

import asyncio
import stat
import subprocess
from pathlib import Path

import pytest
import redis

from catalogue import Catalogue
from config import Settings
from supervise.plan import Plan, make_plan
from supervise.redis_server import EmbeddedRedis
from tests.deployment import ROOT


def plan_for(models: list[dict[str, object]], settings: Settings | None = None) -> Plan:
    catalogue = Catalogue.model_validate(
        {"project": "P", "models": [{"tasks": ["chat"], "weights": "echo:", **m} for m in models]}
    )
    return make_plan(settings or Settings(), catalogue, Path("/somewhere/models.toml"), None)


def gpus(plan: Plan) -> list[str]:
    return [spec.env["CUDA_VISIBLE_DEVICES"] for spec in plan.workers]


def test_one_process_for_each_worker_of_each_model() -> None:
    plan = plan_for([{"name": "a/b", "workers": [[0], [1, 2]]}, {"name": "c", "workers": [[]]}])
    assert [spec.name for spec in plan.workers] == ["a-b-1", "a-b-2", "c-1"]
    assert [spec.env["WORKER_MODEL"] for spec in plan.workers] == ["a/b", "a/b", "c"]
    assert plan.workers[0].argv[-2:] == ("-n", "a-b-1@%h")
    assert gpus(plan) == ["0", "1,2", ""]
    assert {spec.env["MODELS_FILE"] for spec in plan.workers + plan.web} == {"/somewhere/models.toml"}


def test_models_with_the_same_slug_get_different_names() -> None:
    plan = plan_for([{"name": "a:b"}, {"name": "a+b"}])
    assert len({spec.name for spec in plan.workers}) == 2


def test_gpu_indices_count_in_the_operators_own_list() -> None:
    plan = plan_for(
        [{"name": "m", "workers": [[1], []]}, {"name": "n"}], Settings(cuda_visible_devices="4,GPU-77")
    )
    assert gpus(plan) == ["GPU-77", "", "4"]


def test_workers_that_share_a_gpu_share_its_memory() -> None:
    plan = plan_for([{"name": "m", "workers": [[0], [0], [1], []]}, {"name": "n"}])
    assert [float(spec.env["WORKER_GPU_SHARE"]) for spec in plan.workers] == pytest.approx(
        [1 / 3, 1 / 3, 1, 1, 1 / 3]
    )


def test_gpu_indices_are_those_of_nvidia_smi() -> None:
    assert plan_for([{"name": "m"}]).workers[0].env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_single_worker_keeps_the_given_cid_and_several_make_their_own() -> None:
    settings = Settings(worker_cid="mine")
    assert plan_for([{"name": "m"}], settings).workers[0].env.get("WORKER_CID") != ""
    assert [
        s.env["WORKER_CID"] for s in plan_for([{"name": "m", "workers": [[], []]}], settings).workers
    ] == ["", ""]


def test_flower_only_with_a_password() -> None:
    assert plan_for([{"name": "m"}]).flower == ()
    flower = plan_for([{"name": "m"}], Settings(flower_basic_auth="u:p")).flower[0]
    assert "--address=127.0.0.1" in flower.argv and not any("u:p" in part for part in flower.argv)


def test_a_worker_has_time_to_drain() -> None:
    assert plan_for([{"name": "m"}], Settings(drain_s=60)).workers[0].stop_timeout_s > 60


def test_the_demo_catalogue_has_two_chat_workers_and_one_for_images() -> None:
    catalogue = Catalogue.from_file(ROOT / "models.toml")
    plan = make_plan(Settings(), catalogue, ROOT / "models.toml", None)
    assert [spec.name for spec in plan.workers] == ["demo-chat-1", "demo-chat-2", "demo-shapes-1"]
    assert gpus(plan) == ["", "", ""]


def test_the_password_of_the_embedded_redis_is_only_in_private_files(tmp_path: Path) -> None:
    server = EmbeddedRedis.prepare(tmp_path)
    for path in (server.configuration, server.url_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    password = redis.connection.parse_url(server.url)["password"]
    assert server.url_file.read_text().strip() == server.url
    assert len(password) >= 24 and not any(password in part for part in server.argv)
    server.remove_files()
    assert not list(tmp_path.iterdir())


def test_the_embedded_redis_starts_in_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    folder = tmp_path / 'ein Pfäd "mit" \\ allem'
    folder.mkdir()
    server = EmbeddedRedis.prepare(folder)
    with subprocess.Popen(server.argv, stdout=subprocess.DEVNULL) as process:
        try:
            assert asyncio.run(server.wait())
            with redis.Redis.from_url(server.url) as client:
                assert client.config_get("dir") == {"dir": str(folder)}
        finally:
            process.terminate()


@pytest.mark.parametrize(
    "line", ["bind 127.0.0.1", 'save ""', "appendonly no", "maxmemory-policy noeviction"]
)
def test_the_embedded_redis_is_on_the_loopback_and_writes_nothing(tmp_path: Path, line: str) -> None:
    assert line in EmbeddedRedis.prepare(tmp_path).configuration.read_text().splitlines()


def test_workers_tell_each_other_nothing_unless_flower_listens() -> None:
    without, with_flower = (
        plan_for([{"name": "m"}]),
        plan_for([{"name": "m"}], Settings(flower_basic_auth="u:p")),
    )
    assert "--without-gossip" in without.workers[0].argv
    assert "--without-gossip" not in with_flower.workers[0].argv
