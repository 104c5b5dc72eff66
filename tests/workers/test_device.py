"""workers.device with a program in the place of nvidia-smi."""

from pathlib import Path

import pytest

from config import Settings
from workers import device
from workers.engines.base import TemporaryLoadError

BROKEN = "echo 'Unable to determine the device handle'; exit 9"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the driver's GPUs, with one GPU."""
    folder = tmp_path / "gpus"
    (folder / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(device, "DRIVER_GPUS", folder)
    return folder


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr("workers.device.shutil.which", lambda name: str(tool))


def settings(visible: str | None = "0") -> Settings:
    return Settings(cuda_visible_devices=visible)


def test_the_gpus_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "echo GPU-1; echo GPU-2")
    assert device.visible_gpus(settings("1,0")) == ["GPU-2", "GPU-1"]
    assert device.visible_gpus(settings(None)) == ["GPU-1"]


@pytest.mark.usefixtures("driver")
def test_a_driver_in_trouble_may_pass_and_the_cpu_is_no_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, BROKEN)
    with pytest.raises(TemporaryLoadError, match="status 9: Unable to determine the device handle"):
        device.visible_gpus(settings())
    assert device.visible_gpus(settings("")) == [], "a worker on the CPU asks no driver"


@pytest.mark.usefixtures("driver")
def test_a_driver_that_does_not_answer_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(device, "NVIDIA_SMI_S", 0.1)
    with pytest.raises(TemporaryLoadError, match="did not answer"):
        device.visible_gpus(settings())


def test_a_machine_without_a_driver_has_no_gpu(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, BROKEN)
    (driver / "0000:01:00.0").rmdir()
    assert device.visible_gpus(settings()) == []
