"""Real memory, real kernel."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployment import ROOT
from tests.engines.tiny_chat import CONFIGS, make_engine, save_model
from workers.engines import huge_pages
from workers.engines.chat import build
from workers.engines.huge_pages import HUGE, use_huge_pages


def can_collapse() -> bool:
    """Whether the kernel has MADV_COLLAPSE, and may use it."""
    version = [int(number) for number in re.findall(r"\d+", platform.release())[:2]]
    return version >= [6, 1] and "[never]" not in huge_pages.ENABLED.read_text()


needs_collapse = pytest.mark.skipif(
    platform.system() != "Linux" or not can_collapse(), reason="Linux before 6.1, or huge pages are forbidden"
)


# In a process of its own: the kernel joins neighbouring regions, and counts by region.
PROGRAM = """
import mmap
from pathlib import Path
from workers.engines.huge_pages import HUGE, use_huge_pages

def kib(what):
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))

memory = mmap.mmap(-1, 32 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(memory), {step}):
    memory[at] = at // {step} % 251
before = kib("Rss")
use_huge_pages()
assert all(memory[at] == at // {step} % 251 for at in range(0, len(memory), {step}))
print(kib("AnonHugePages"), kib("Rss") - before)
"""


def after_a_write_in_each(step: int) -> tuple[int, int]:
    """Return KiB in huge pages, and KiB that were added, with 64 MiB of which a byte was written each `step`
    bytes."""
    command = [sys.executable, "-c", PROGRAM.format(step=step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    in_huge_pages, added = map(int, done.stdout.split())
    return in_huge_pages, added


@needs_collapse
def test_what_was_written_is_in_huge_pages_and_keeps_its_content():
    in_huge_pages, _ = after_a_write_in_each(4096)
    # the kernel may find no room for some
    assert in_huge_pages >= 8 * HUGE // 1024


@needs_collapse
def test_what_was_hardly_written_takes_no_more_memory():
    _, added = after_a_write_in_each(HUGE)
    assert added <= 8 * HUGE // 1024


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
