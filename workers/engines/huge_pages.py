"""Moves the memory of a loaded model to huge pages, on Linux.

A decode step of few rows on a CPU reads all weights once, and with pages of 4 KiB the processor looks up one
of them for every 64 reads. Most weights of a small model are less than 2 MiB each, so that no allocator would
give them huge pages of their own; but they lie side by side, and the kernel can join what is there already.
"""

import ctypes
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

MAPS = Path("/proc/self/maps")
HUGE = 2 * 1024 * 1024
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
"""Of Linux's madvise(2); Python's mmap has the first alone."""
_OWN = re.compile(r"(\w+)-(\w+) rw-p \w+ 00:00 0\s*(\[heap\])?$")
"""A line of /proc/self/maps for memory that belongs to no file."""


def use_huge_pages() -> int:
    """Move what this process has allocated to huge pages. Returns how many bytes were moved.

    Takes one or two seconds for a gigabyte. Contents and addresses stay as they are. Memory that was reserved
    and never written, as most of a new KV cache, stays so and gets huge pages when it is written. Returns 0
    where the kernel can't do it: Linux before 6.1, other systems.
    """
    try:
        maps = MAPS.read_text()
    except OSError:
        return 0
    began, moved = time.monotonic(), 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _regions(maps):
        libc.madvise(start, end - start, _MADV_HUGEPAGE)
        for at in range(start, end, HUGE):
            # it fails where nothing was written, where another thread has freed the memory since, and where
            # the kernel finds no room
            if libc.madvise(at, HUGE, _MADV_COLLAPSE) == 0:
                moved += HUGE
    log.debug("%d MiB of memory moved to huge pages in %.1f s", moved // 2**20, time.monotonic() - began)
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
