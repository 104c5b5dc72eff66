"""scripts/fetch-smollm2 in a folder of its own, without its download: what it says and what it leaves behind."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deployment import ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script and an environment that is set up."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/fetch-smollm2", tmp_path / "scripts")
    setup = tmp_path / "scripts/setup"
    setup.write_text("#!/bin/sh\n")
    setup.chmod(0o755)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path


def fetch(clone: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / "scripts/fetch-smollm2"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_failed_download_is_one_line_and_leaves_nothing(clone: Path) -> None:
    (clone / "weights/.smollm2").mkdir(parents=True)  # what an attempt leaves that was killed
    done = fetch(clone)
    assert done.returncode == 1
    progress, error = done.stderr.splitlines()
    assert progress == "fetch-smollm2: downloading the weights, 93 MB (1 of 2)"
    assert error.startswith(
        "fetch-smollm2: pip could not install the packages: ERROR: No matching distribution"
    )
    assert [path.name for path in (clone / "weights").iterdir()] == [".lock"]


def test_weights_that_are_there_are_left_alone(clone: Path) -> None:
    (clone / "weights/smollm2-135m-instruct").mkdir(parents=True)
    done = fetch(clone)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
