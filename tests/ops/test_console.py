"""The shared output: readers that stall, that are gone, and that can't print every letter."""

import json
import os
from collections.abc import Iterator

import pytest

from logs import json_line
from supervise import console as console_module
from supervise.console import Console, LineWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose numbers stay taken until the test is over: a writer's thread may still use them."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def close_end(end: int) -> None:
    """Close one end of a pipe, but keep its number: another file that got it would be written to."""
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), end)


def read_to_end(pipe: tuple[int, int]) -> list[str]:
    close_end(pipe[1])
    with os.fdopen(pipe[0], "rb", closefd=False) as reader:
        return reader.read().decode().splitlines()


def test_lines_that_a_stalled_reader_leaves_no_room_for_are_dropped_and_counted(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "PENDING_LIMIT", 200_000)
    writer = LineWriter(pipe[1])
    for _ in range(5000):
        writer.write("x" * 99)  # none of these may block, though the pipe holds 64 KiB only
    got = b""
    while b"dropped" not in got or not got.endswith(b"\n"):
        got += os.read(pipe[0], 65536)
    *lines, note = got.decode().splitlines()
    assert set(lines) == {"x" * 99}
    assert note == f"run | {5000 - len(lines)} lines were dropped: nobody read this output"
    writer.write("after")
    writer.close(10)
    assert read_to_end(pipe) == ["after"]


def test_a_stalled_reader_does_not_delay_the_end(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1])
    writer.write("x" * 1_000_000)
    writer.close(0.05)
    close_end(pipe[0])
    writer.close(10)  # else its thread would write the rest into whatever has the pipe's number next


def test_a_descriptor_that_does_not_block_gets_all_lines(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    writer = LineWriter(pipe[1])
    writer.write("x" * 200_000)
    got = b""
    while not got.endswith(b"\n"):
        got += os.read(pipe[0], 65536)
    assert len(got) == 200_001
    writer.close(10)


def test_a_reader_that_is_gone_is_no_error(pipe: tuple[int, int]) -> None:
    close_end(pipe[0])
    writer = LineWriter(pipe[1])
    writer.write("nobody reads this")
    writer.write("nor this")
    writer.close(10)


def test_letters_that_the_encoding_lacks_are_escaped(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1], "ascii")
    writer.write("Pfäd \udcff")
    writer.close(10)
    assert read_to_end(pipe) == ["Pf\\xe4d \\udcff"]


def test_each_line_begins_with_the_name_of_its_process(pipe: tuple[int, int]) -> None:
    console = Console(pipe[1])
    web, worker = console.printer("web"), console.printer("worker-1")
    web("a")
    worker("b")
    console.close()
    assert read_to_end(pipe) == ["web      | a", "worker-1 | b"]


def test_as_json_each_line_is_an_object_with_the_name_of_its_process(pipe: tuple[int, int]) -> None:
    console = Console(pipe[1], as_json=True)
    already = json_line("worker-1", "b")
    console.printer("redis")("a")
    console.printer("worker-1")(already)
    console.printer("run", "ERROR")("ALARM: c")
    console.close()
    lines = read_to_end(pipe)
    assert lines[1] == already
    found = [json.loads(line) for line in lines]
    assert [(line["process"], line["level"], line["message"]) for line in found] == [
        ("redis", "INFO", "a"),
        ("worker-1", "INFO", "b"),
        ("run", "ERROR", "ALARM: c"),
    ]


def test_as_json_dropped_lines_are_counted_in_an_object(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "PENDING_LIMIT", 10)
    writer = LineWriter(pipe[1], as_json=True)
    writer.write("x" * 99)
    writer.close(10)
    (line,) = read_to_end(pipe)
    assert json.loads(line)["message"] == "1 lines were dropped: nobody read this output"
