"""workers.gpu_watch and workers.nvml through nvidia-ml-py, with a library in the place of the driver's
(tests/gpu_stand_ins/nvml.c)."""

import ctypes
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pynvml
import pytest

from protocol.leases import GpuUsage
from tests.deployment import ROOT
from workers.gpu_watch import STALE_S, GpuWatch
from workers.nvml import NvmlReader

USAGE = GpuUsage(
    memory_used_bytes=3 * 2**30, memory_total_bytes=24 * 2**30, utilization=0.4, temperature_c=61
)


class EndOfTest(Exception):
    """Ends the loop of a GpuWatch."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = ROOT / "tests" / "gpu_stand_ins" / "nvml.c"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture
def figures(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file with the figures of GPU-1. Without it the driver does not answer."""
    file = tmp_path / "figures"
    file.write_text(f"{3 * 2**30} {24 * 2**30} 40 61")
    monkeypatch.setenv("NVML_STAND_IN", str(file))
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    pynvml._nvmlGetFunctionPointer_cache.clear()
    yield file
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.mark.usefixtures("figures")
def test_what_the_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gpu_watch.time.sleep", Mock(side_effect=[None, EndOfTest]))
    watch = GpuWatch(["GPU-1"])
    assert watch.usage is None
    with pytest.raises(EndOfTest):
        watch.run()
    assert watch.usage == USAGE


def test_a_slice_of_a_gpu_has_memory_alone(figures: Path) -> None:
    figures.write_text("1 2 -1 -1")
    assert NvmlReader("GPU-1").read() == GpuUsage(memory_used_bytes=1, memory_total_bytes=2)


def test_a_driver_that_goes_away_and_comes_back(figures: Path) -> None:
    reader = NvmlReader("GPU-1")
    assert reader.read() == USAGE
    figures.rename(figures.with_suffix(".gone"))
    assert reader.read() == "GPU is lost"
    assert reader.read() == "Driver Not Loaded", "the connection is made anew"
    figures.with_suffix(".gone").rename(figures)
    assert reader.read() == USAGE


def test_an_old_reading_is_not_told_and_a_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    watch = GpuWatch(["GPU-1"], clock=lambda: now)
    watch.note(USAGE)
    now = STALE_S - 1
    watch.note("gone")
    assert watch.usage == USAGE, "one missing reading is no news"
    now = STALE_S + 1
    watch.note("gone")
    assert watch.usage is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    watch.note(USAGE)
    assert watch.usage == USAGE


def test_a_worker_on_the_cpu_asks_no_driver(caplog: pytest.LogCaptureFixture) -> None:
    watch = GpuWatch([])
    watch.run()
    assert watch.usage is None and not caplog.records


def test_without_a_driver_there_is_a_reason() -> None:
    assert NvmlReader("GPU-1").read() == "NVML Shared Library Not Found"
