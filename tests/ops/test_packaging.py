"""Files that the other tests don't run: pins, systemd's unit, the compose file, Dockerfiles, gunicorn's
settings."""

import configparser
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from catalogue import Catalogue
from config import EXIT_CONFIGURATION, Settings
from supervise.plan import make_plan
from supervise.redis_server import EmbeddedRedis
from tests.deployment import ROOT, free_port


def seconds(duration: str) -> float:
    """Docker's "90s" or "30m"."""
    return float(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def workers(compose: dict[str, Any]) -> list[dict[str, Any]]:
    return [service for name, service in compose["services"].items() if name.startswith("worker-")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned_exactly(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r "))]
    assert lines
    for line in lines:
        assert re.fullmatch(r'[\w.-]+==[\w.]+(; sys_platform == "linux")?', line), line
        # nvidia-ml-py reads the driver's figures and has nothing to do with torch
        assert not re.match("nvidia-(?!ml-py=)", line), "torch requires its own platform packages"
        # the tests compile the GPU's kernels with a build of torch that doesn't bring triton
        assert not line.startswith("triton") or path.name == "requirements-dev.txt", line


UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))


def read_unit(path: Path) -> configparser.SectionProxy:
    """The [Service] section of a unit of systemd. Of several values of a name it has the last."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.read_string(path.read_text())
    return parser["Service"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_run_what_exists_and_stop_it_in_order(path: Path) -> None:
    unit = read_unit(path)
    command = Path(unit["ExecStart"].split()[0]).relative_to(unit["WorkingDirectory"])
    # what pip makes in the environment is not in the checkout
    assert str(command) in (".venv/bin/gunicorn", ".venv/bin/celery") or os.access(ROOT / command, os.X_OK)
    assert unit["KillMode"] == "mixed"
    assert unit["Restart"] == "on-failure" and unit["RestartPreventExitStatus"] == str(EXIT_CONFIGURATION)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_units(path: Path, tmp_path: Path) -> None:
    # it also looks for the command and the user
    text = path.read_text().replace("/opt/modelservice/.venv/bin", str(Path(sys.executable).parent))
    copy = tmp_path / path.name
    copy.write_text(text.replace("/opt/modelservice", str(ROOT)).replace("User=modelservice", "User=root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_units_give_time_to_stop() -> None:
    file = ROOT / "models.example.toml"
    redis = EmbeddedRedis(
        "redis-server", 1, configuration=Path("c"), url="redis://127.0.0.1:1", url_file=Path("u")
    )
    settings = Settings(flower_basic_auth="user:password")
    plan = make_plan(settings, Catalogue.from_file(file), file, redis)
    web, worker, whole = (float(read_unit(path)["TimeoutStopSec"]) for path in UNITS)
    assert whole > sum(max(s.stop_timeout_s for s in group) for group in plan.groups)
    assert web > runpy.run_path(str(ROOT / "gunicorn.conf.py"))["graceful_timeout"]
    assert worker >= settings.drain_s + 15


def kubernetes(kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind in the example for Kubernetes, by name."""
    objects = yaml.safe_load_all((ROOT / "deploy/kubernetes/modelservice.yaml").read_text())
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def pods() -> dict[str, dict[str, Any]]:
    return {name: found["spec"]["template"] for name, found in kubernetes("Deployment").items()}


def test_kubernetes_has_a_valid_catalogue_and_known_settings(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(kubernetes("ConfigMap")["modelservice"]["data"]["models.toml"])
    models = {model.name for model in Catalogue.from_file(tmp_path / "models.toml").models}
    known = {field.upper() for field in Settings.model_fields} | {"REDIS_PASSWORD"}
    served = set()
    for name, pod in pods().items():
        (container,) = pod["spec"]["containers"]
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        if name != "modelservice-redis":
            assert set(variables) <= known
        served |= {variables["WORKER_MODEL"]} if "WORKER_MODEL" in variables else set()
    assert served == models


def test_kubernetes_gives_time_to_stop_and_selects_the_pods() -> None:
    found = pods()
    conf = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    assert found["modelservice-web"]["spec"]["terminationGracePeriodSeconds"] > conf["graceful_timeout"]
    (worker,) = found["modelservice-worker-chat"]["spec"]["containers"]
    drain = next(float(variable["value"]) for variable in worker["env"] if variable["name"] == "DRAIN_S")
    assert found["modelservice-worker-chat"]["spec"]["terminationGracePeriodSeconds"] >= drain + 15
    for name, deployment in kubernetes("Deployment").items():
        assert deployment["spec"]["selector"]["matchLabels"] == found[name]["metadata"]["labels"]
    for service in kubernetes("Service").values():
        assert any(
            service["spec"]["selector"].items() <= pod["metadata"]["labels"].items() for pod in found.values()
        )


def test_the_compose_file_is_valid() -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    command: list[str | Path] = [tool, "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_containers_have_time_to_drain(compose: dict[str, Any]) -> None:
    conf = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    for worker in workers(compose):
        assert seconds(worker["stop_grace_period"]) >= float(worker["environment"]["DRAIN_S"]) + 15
    assert seconds(compose["services"]["web"]["stop_grace_period"]) > conf["graceful_timeout"]


def test_everything_stays_on_the_loopback(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["network_mode"] == "host" and "ports" not in service
    redis = compose["configs"]["redis"]["content"]
    assert "bind 127.0.0.1\n" in redis and "requirepass ${REDIS_PASSWORD}" in redis
    assert "--address=127.0.0.1" in compose["services"]["flower"]["command"]
    assert "--web.listen-address=127.0.0.1:9090" in compose["services"]["prometheus"]["command"]
    assert compose["services"]["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_flower_and_monitoring_are_in_profiles(compose: dict[str, Any]) -> None:
    found = {
        name: service["profiles"] for name, service in compose["services"].items() if "profiles" in service
    }
    assert found == {"flower": ["flower"], "prometheus": ["monitoring"], "grafana": ["monitoring"]}


def test_compose_has_the_workers_of_the_example_catalogue(compose: dict[str, Any]) -> None:
    catalogue = Catalogue.from_file(ROOT / "models.example.toml")
    wanted = [(m.name, tuple(map(str, gpus))) for m in catalogue.models for gpus in m.workers or ()]
    found = [
        (
            worker["environment"]["WORKER_MODEL"],
            tuple(worker["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]),
        )
        for worker in workers(compose)
    ]
    assert sorted(found) == sorted(wanted)
    for (_, gpus), worker in zip(found, workers(compose), strict=True):
        sharing = sum(gpus == other for _, other in found)
        assert float(worker["environment"].get("WORKER_GPU_SHARE", 1)) * sharing == 1
    nodes = [worker["command"][-1] for worker in workers(compose)]
    assert len(set(nodes)) == len(nodes), "Flower merges workers of one name"


def test_compose_sets_nothing_that_settings_do_not_know(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name not in ("redis", "grafana"):
            known = {field.upper() for field in Settings.model_fields} | {"NODE_NAME", "HF_TOKEN"}
            assert set(service.get("environment", {})) <= known


def test_every_setting_reaches_the_containers(compose: dict[str, Any]) -> None:
    of_one_container = {
        "WORKER_MODEL",
        "WORKER_CID",
        "WORKER_GPU_SHARE",
        "FLOWER_BASIC_AUTH",
        "CUDA_VISIBLE_DEVICES",
    }
    wanted = {field.upper() for field in Settings.model_fields} - of_one_container
    for service in [compose["services"]["web"], *workers(compose)]:
        assert wanted <= set(service["environment"])


def test_every_container_has_an_init_process(compose: dict[str, Any]) -> None:
    assert all(service["init"] is True for service in compose["services"].values())


def test_weights_beside_the_catalogue_are_mounted(compose: dict[str, Any]) -> None:
    for worker in workers(compose):
        folders = {mount["target"] for mount in worker["volumes"] if isinstance(mount, dict)}
        catalogue = Path(worker["environment"]["MODELS_FILE"])
        assert folders == {str(catalogue), str(catalogue.parent / "weights")}


def test_the_operator_may_name_files_without_a_dot(compose: dict[str, Any]) -> None:
    """In the short form of a mount, a source without "/" is the name of a volume."""
    for service in compose["services"].values():
        assert not [m for m in service.get("volumes", []) if isinstance(m, str) and "${" in m]


def copied(name: str) -> list[str]:
    """Return what a Dockerfile copies into the image, as it is written there."""
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    return [part for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for part in line.split()]


@pytest.mark.parametrize("name", ["web", "worker"])
def test_images_have_all_modules_that_they_import(name: str) -> None:
    own = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    present = {path.rstrip("/").removesuffix(".py") for path in copied(name)}
    for path in copied(name):
        for file in [ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("*.py"):
            for module in re.findall(r"^ *(?:from|import) (\w+)", file.read_text(), re.MULTILINE):
                assert module not in own or module in present, f"{file} imports {module}"


@pytest.mark.parametrize("name", ["web", "worker"])
def test_dockerfiles_copy_what_exists(name: str) -> None:
    allowed = (ROOT / ".dockerignore").read_text()
    for path in copied(name):
        assert (ROOT / path).exists(), path
        assert f"!{path}" in allowed or path.startswith("requirements"), f"{path} is missing in .dockerignore"


def test_gunicorn_listens_for_the_node_only_with_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIND", "127.0.0.1:1")
    monkeypatch.setenv("NODE_BIND", "127.0.0.1:2")
    monkeypatch.delenv("API_KEYS", raising=False)
    assert runpy.run_path(str(ROOT / "gunicorn.conf.py"))["bind"] == ["127.0.0.1:1"]
    monkeypatch.setenv("API_KEYS", "key")
    conf = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    assert conf["bind"] == ["127.0.0.1:1", "127.0.0.1:2"]
    assert conf["keepalive"] > 90 and conf["max_requests"] == 0 and conf["control_socket_disable"]


def test_a_wrong_catalogue_ends_gunicorn_as_a_wrong_setting_does(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "wsgi:app"],
        cwd=ROOT,
        env={**os.environ, "BIND": f"127.0.0.1:{free_port()}", "MODELS_FILE": str(tmp_path / "missing.toml")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EXIT_CONFIGURATION
    assert done.stderr.startswith("web: ") and "missing.toml" in done.stderr
    assert done.stderr.count("\n") == 1


def test_gunicorn_raises_the_soft_limit_of_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = f"""
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
runpy.run_path("gunicorn.conf.py")
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == hard
