"""Real memory, real kernel."""

import mmap
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from tests.engines.tiny_chat import CONFIGS, make_engine, save_model
from workers.engines import huge_pages
from workers.engines.chat import build
from workers.engines.huge_pages import HUGE, use_huge_pages

SIZE = 16 * HUGE


def can_collapse() -> bool:
    """Whether the kernel has MADV_COLLAPSE, and may use it."""
    version = [int(number) for number in re.findall(r"\d+", platform.release())[:2]]
    return version >= [6, 1] and "[never]" not in huge_pages.ENABLED.read_text()


needs_collapse = pytest.mark.skipif(
    platform.system() != "Linux" or not can_collapse(), reason="Linux before 6.1, or huge pages are forbidden"
)


def in_kib(array: np.ndarray, what: str) -> int:
    """How much of the regions of an array's memory is `what`, of /proc/self/smaps."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            start, end = (int(address, 16) for address in head.split("-"))
            inside = start < array.ctypes.data + array.nbytes and end > array.ctypes.data
        elif inside and head == f"{what}:":
            found += int(line.split()[1])
    return found


def reserve() -> np.ndarray:
    """Memory that was not written yet. numpy would ask for huge pages itself, and malloc write zeros."""
    return np.frombuffer(mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


@needs_collapse
def test_what_was_written_is_in_huge_pages_and_keeps_its_content():
    memory = reserve()
    for at in range(0, SIZE, 4096):
        memory[at] = at // 4096 % 251
    expected = memory.copy()
    use_huge_pages()
    # the kernel may find no room for some
    assert in_kib(memory, "AnonHugePages") >= SIZE // 4 // 1024
    assert np.array_equal(memory, expected)


@needs_collapse
def test_what_was_hardly_written_takes_no_more_memory():
    memory = reserve()
    memory[::HUGE] = 1
    before = in_kib(memory, "Rss")
    use_huge_pages()
    assert in_kib(memory, "Rss") <= before + 2 * HUGE // 1024


@pytest.mark.parametrize("name", ["MAPS", "ENABLED"])
def test_a_system_without_these_calls_goes_on(monkeypatch, name):
    monkeypatch.setattr(huge_pages, name, Path("/absent"))
    assert use_huge_pages() == 0


def test_nothing_is_moved_where_huge_pages_are_forbidden(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "enabled")
    huge_pages.ENABLED.write_text("always madvise [never]\n")
    assert use_huge_pages() == 0


def test_an_engine_on_a_cpu_moves_its_memory_once_it_is_loaded(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(build, "use_huge_pages", lambda: calls.append(1))
    engine, _ = make_engine(save_model(tmp_path, CONFIGS["llama"]()))
    engine.close()
    assert calls == [1]
