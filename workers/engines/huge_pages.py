"""Moves the memory of a loaded model to huge pages, on Linux.

A decode step of few rows on a CPU reads all weights once, and with pages of 4 KiB the processor looks up one
of them for every 64 reads. Most weights of a small model are less than 2 MiB each, so that no allocator would
give them huge pages of their own; but they lie side by side, and the kernel can join what is there already.
"""

import ctypes
import logging
import mmap
import re
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

MAPS = Path("/proc/self/maps")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = 2 * 1024 * 1024
_MADV_COLLAPSE = 25
"""Of Linux's madvise(2); Python's mmap lacks it."""
_OWN = re.compile(r"(\w+)-(\w+) rw-p \w+ 00:00 0\s*(\[heap\])?$")
"""A line of /proc/self/maps for memory that belongs to no file."""


def use_huge_pages() -> int:
    """Move what this process has allocated to huge pages. Returns how many bytes are in them afterwards.

    Takes one or two seconds for a gigabyte. Contents and addresses stay as they are, and what was reserved
    and not written, as most of a new KV cache, takes no memory. Does nothing, and returns 0, where the kernel
    can't do it (Linux before 6.1, other systems), or the administrator has forbidden it.
    """
    try:
        # names of files in it may be of any bytes
        maps, enabled = MAPS.read_text(errors="replace"), ENABLED.read_text()
    except OSError:
        return 0
    if "[never]" in enabled:
        return 0
    began, moved, memory = time.monotonic(), 0, _Memory()
    for start, end in _regions(maps):
        for at in range(start, end, HUGE):
            if memory.is_written(at) and memory.collapse(at):
                moved += HUGE
    log.debug("%d MiB of memory are in huge pages after %.1f s", moved // 2**20, time.monotonic() - began)
    return moved


def _regions(maps: str) -> Iterator[tuple[int, int]]:
    """The addresses of the huge pages, from the first to the end of the last, that fit into each region of
    the process's own memory."""
    for line in maps.splitlines():
        if found := _OWN.match(line):
            start, end = int(found[1], 16), int(found[2], 16)
            start, end = -(-start // HUGE) * HUGE, end // HUGE * HUGE
            if start < end:
                yield start, end


class _Memory:
    """The kernel's calls, for a huge page at an address."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._resident = (ctypes.c_ubyte * (HUGE // mmap.PAGESIZE))()

    def is_written(self, at: int) -> bool:
        """Whether at least half of its small pages are in memory: moving adds the others."""
        known = self._libc.mincore(at, HUGE, self._resident) == 0
        return known and bytes(self._resident).count(1) >= len(self._resident) // 2

    def collapse(self, at: int) -> bool:
        """Move it. Returns False where another thread has freed it since, or the kernel finds no room."""
        return bool(self._libc.madvise(at, HUGE, _MADV_COLLAPSE) == 0)
