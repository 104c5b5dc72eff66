"""Real memory, real kernel."""

import sys
from pathlib import Path

import numpy as np
import pytest

from workers.engines import huge_pages
from workers.engines.huge_pages import HUGE, use_huge_pages

SIZE = 16 * HUGE


def huge_bytes(array: np.ndarray) -> int:
    """How much of the array's memory is in huge pages, as the kernel says."""
    found, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            head = line.split()[0]
            if not head.endswith(":"):
                start, end = (int(address, 16) for address in head.split("-"))
                inside = start < array.ctypes.data + array.nbytes and end > array.ctypes.data
            elif inside and head == "AnonHugePages:":
                found += int(line.split()[1]) * 1024
    return found


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these calls")


@ON_LINUX
def test_what_was_written_moves_and_keeps_its_content():
    # small ones beside each other, as the weights of a small model are
    arrays = [np.full(HUGE // 4, at % 251, np.uint8) for at in range(SIZE // (HUGE // 4))]
    assert use_huge_pages() > 0
    assert all((array == at % 251).all() for at, array in enumerate(arrays))


@ON_LINUX
def test_a_large_array_is_in_huge_pages_afterwards():
    # numpy would ask for huge pages itself
    array = np.frombuffer(bytearray(b"\7") * SIZE, np.uint8)
    before = huge_bytes(array)
    moved = use_huge_pages()
    # the kernel may find no room for some
    assert huge_bytes(array) > before and moved > 0
    assert (array == 7).all()


@ON_LINUX
def test_what_was_never_written_takes_no_memory():
    reserved = np.zeros(SIZE, np.uint8)
    use_huge_pages()
    assert huge_bytes(reserved) <= SIZE // 4
    assert not reserved.any()


def test_a_system_without_these_calls_goes_on(monkeypatch):
    monkeypatch.setattr(huge_pages, "MAPS", Path("/absent"))
    assert use_huge_pages() == 0
