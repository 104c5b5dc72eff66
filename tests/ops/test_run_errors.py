"""`scripts/run` with a wrong configuration: one line that says what is wrong, a status, nothing started."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import ConfigurationError
from supervise.runtime_folder import runtime_folder
from tests.deployment import ROOT, free_port

CATALOGUE = """
project = "Test"
[[models]]
name = "echo"
tasks = ["chat"]
weights = "{weights}"
workers = {workers}
"""


def run(*arguments: str | Path, cwd: Path = ROOT, **env: str) -> tuple[int, str]:
    """Return the exit status and the line on stderr. stdout must stay empty: nothing may be started."""
    own = {"BIND": f"127.0.0.1:{free_port()}", **env}
    done = subprocess.run(
        [ROOT / "scripts" / "run", *arguments],
        cwd=cwd,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr.strip()


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def catalogue(folder: Path, weights: str = "echo:", workers: str = "[[]]") -> Path:
    path = folder / "models.toml"
    path.write_text(CATALOGUE.format(weights=weights, workers=workers))
    return path


def test_missing_catalogue(tmp_path: Path) -> None:
    status, line = run("absent.toml", cwd=tmp_path)
    assert status == 78
    assert line == f"run: {tmp_path}/absent.toml: No such file or directory; MODELS_FILE names the catalogue"


def test_broken_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text("project = ")
    status, line = run(path)
    assert status == 78
    assert line.startswith(f"run: {path}: not TOML:")


def test_wrong_key_in_the_catalogue(tmp_path: Path) -> None:
    path = catalogue(tmp_path)
    path.write_text(path.read_text() + "[models.engine]\nbatch_size = 3\n")
    status, line = run(path)
    assert status == 78
    assert str(path) in line and "batch_size" in line


def test_port_taken(tmp_path: Path, taken: str) -> None:
    assert run(catalogue(tmp_path), BIND=taken) == (1, f"run: BIND: {taken} is in use by another program")


def test_node_port_taken(tmp_path: Path, taken: str) -> None:
    status, line = run(catalogue(tmp_path), API_KEYS="secret", NODE_BIND=taken)
    assert (status, line) == (1, f"run: NODE_BIND: {taken} is in use by another program")


@pytest.mark.parametrize("bind", ["1088", "127.0.0.1:http", ":1088", "127.0.0.1:70000"])
def test_bind_is_no_address(tmp_path: Path, bind: str) -> None:
    status, line = run(catalogue(tmp_path), BIND=bind)
    assert (status, line) == (
        78,
        f"run: environment: BIND: {bind!r} is not host:port, such as 127.0.0.1:1088 or [::1]:1088",
    )


def test_address_of_another_machine(tmp_path: Path) -> None:
    status, line = run(catalogue(tmp_path), BIND="192.0.2.1:1088")
    assert (status, line) == (78, "run: BIND: 192.0.2.1:1088: Cannot assign requested address")


@pytest.mark.parametrize("weights", ["./absent", "some/where/else"])
def test_weights_folder_missing(tmp_path: Path, weights: str) -> None:
    path = catalogue(tmp_path, weights=weights)
    status, line = run(path)
    assert status == 78
    assert line.startswith(f"run: {path}: weights of 'echo': there is no folder {weights}")


def test_an_absolute_weights_folder_may_be_on_a_disk_that_is_not_mounted_yet(tmp_path: Path) -> None:
    path = catalogue(tmp_path, weights="/absent/model")
    line = f"run: {path}: weights of 'echo': there is no folder /absent/model"
    assert run(path) == (1, line)


def test_weights_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    status, line = run(catalogue(tmp_path, weights="weights"))
    assert status == 78
    assert line.endswith(f"the folder {tmp_path}/weights has no config.json")


def test_an_embedding_model_may_have_its_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """The preflight accepts the weights, and goes on to the GPUs."""
    path = catalogue(tmp_path, weights="weights", workers="[[7]]")
    path.write_text(path.read_text().replace("chat", "embedding"))
    (tmp_path / "weights").mkdir()
    status, line = run(path, CUDA_VISIBLE_DEVICES="0")
    assert (status, line) == (
        78,
        f"run: {path}: weights of 'echo': the folder {tmp_path}/weights has no config.json or modules.json",
    )
    (tmp_path / "weights" / "modules.json").touch()
    status, line = run(path, CUDA_VISIBLE_DEVICES="0")
    assert status == 78 and "GPU 7 does not exist" in line


def test_gpu_that_is_not_there(tmp_path: Path) -> None:
    path = catalogue(tmp_path, workers="[[0], [2]]")
    status, line = run(path, CUDA_VISIBLE_DEVICES="0,1")
    assert status == 78
    assert line == f"run: {path}: workers of 'echo': GPU 2 does not exist, CUDA_VISIBLE_DEVICES=0,1 lists 2"


def test_several_gpus_for_an_engine_that_uses_one(tmp_path: Path) -> None:
    path = catalogue(tmp_path, workers="[[0, 1]]")
    status, line = run(path, CUDA_VISIBLE_DEVICES="0,1")
    assert status == 78
    assert line == (
        f"run: {path}: workers of 'echo': [0, 1] gives one worker 2 GPUs, and the engines use one;"
        " write [0], [1] for a worker on each"
    )


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; the error comes from the same write."""
    script = f'ulimit -f 0; exec "{ROOT}/scripts/run" "{catalogue(tmp_path)}"'
    bind = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "BIND": bind}, capture_output=True, text=True, check=False
    )
    folder = ROOT / ".run" / bind.rpartition(":")[2]
    line = f"run: {folder}/redis.conf: File too large; scripts/run keeps its lock and the embedded Redis's files there\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_runtime_folder_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigurationError, match="Not a directory; scripts/run keeps its lock"),
        runtime_folder(tmp_path / "file", 1088),
    ):
        pass


def test_a_second_start_in_the_same_folder_touches_nothing(tmp_path: Path) -> None:
    port = free_port()
    with runtime_folder(ROOT / ".run", port) as folder:
        (folder / "redis-url").write_text("of the first")
        status, line = run(catalogue(tmp_path), BIND=f"127.0.0.1:{port}")
        assert status == 1
        assert line == f"run: BIND: scripts/run already serves port {port} ({folder} is locked)"
        assert (folder / "redis-url").read_text() == "of the first"
        (folder / "redis-url").unlink()
    assert not folder.exists()


def test_no_ipv4_loopback(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    command = ["unshare", "-rn", str(ROOT / "scripts" / "run"), str(catalogue(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = "run: 127.0.0.1: Network is unreachable; the embedded Redis listens there\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_letters_that_the_output_cannot_print(tmp_path: Path) -> None:
    status, line = run("Pfäd.toml", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert status == 78
    assert line.startswith(f"run: {tmp_path}/Pf\\xe4d.toml: No such file")


def test_sigterm_before_anything_is_started(tmp_path: Path) -> None:
    """A Redis that never answers holds the checks up."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        environment = {**os.environ, "BIND": f"127.0.0.1:{free_port()}", "REDIS_URL": url}
        with subprocess.Popen([ROOT / "scripts" / "run", catalogue(tmp_path)], env=environment) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0


def test_redis_unreachable(tmp_path: Path) -> None:
    port = free_port()
    status, line = run(catalogue(tmp_path), REDIS_URL=f"redis://:hidden@127.0.0.1:{port}/0")
    assert status == 1
    assert line.startswith(f"run: REDIS_URL: redis://…@127.0.0.1:{port}/0 can't be reached:")
    assert "hidden" not in line


def test_redis_url_is_no_url(tmp_path: Path) -> None:
    status, line = run(catalogue(tmp_path), REDIS_URL="localhost")
    assert status == 78
    assert line.startswith("run: environment: REDIS_URL: must begin with redis://")


def test_wrong_setting(tmp_path: Path) -> None:
    status, line = run(catalogue(tmp_path), DRAIN_S="soon")
    assert status == 78
    assert line.startswith("run: environment: DRAIN_S:")


def test_gunicorn_by_itself_names_a_wrong_setting() -> None:
    done = subprocess.run(
        [ROOT / ".venv/bin/gunicorn", "wsgi:app"],
        cwd=ROOT,
        env={**os.environ, "DRAIN_S": "soon"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.startswith("web: environment: DRAIN_S:") and done.stderr.count("\n") == 1


def test_flower_does_not_start_without_a_password() -> None:
    done = subprocess.run(
        [ROOT / ".venv/bin/python", ROOT / "flowerconfig.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1 and "FLOWER_BASIC_AUTH" in done.stderr


def test_flower_names_a_wrong_setting() -> None:
    done = subprocess.run(
        [ROOT / ".venv/bin/python", ROOT / "flowerconfig.py"],
        env={**os.environ, "DRAIN_S": "soon"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.startswith("flower: environment: DRAIN_S:") and done.stderr.count("\n") == 1
