"""workers.buffered_log: lines are written in batches, in order, and what can't be written is counted."""

import errno
import io
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from logs import JsonFormatter
from tests.deployment import wait_until
from workers import buffered_log
from workers.buffered_log import buffer_lines, flush_lines


class Stream(io.StringIO):
    """Counts the writes. Each waits until `may_write` is set; with `instead` it goes to that descriptor."""

    writes = 0
    instead: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.may_write = threading.Event()
        self.may_write.set()

    def write(self, text: str) -> int:
        self.writes += 1
        assert self.may_write.wait(60)
        return super().write(text) if self.instead is None else os.write(self.instead, text.encode())


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("buffered")
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers, logger.propagate = [], True


@pytest.fixture
def stream(logger: logging.Logger) -> Iterator[Stream]:
    """What the root's handler writes to."""
    stream = Stream()
    before, logging.root.handlers = logging.root.handlers, [logging.StreamHandler(stream)]
    yield stream
    logging.root.handlers = before


def test_lines_are_written_together_and_soon(logger: logging.Logger, stream: Stream) -> None:
    buffer_lines(logger)
    for number in range(100):
        logger.info("line %d", number)
    wait_until(lambda: "line 99" in stream.getvalue(), timeout_s=20, what="the lines are written")
    assert stream.getvalue().splitlines() == [f"line {number}" for number in range(100)]
    assert stream.writes <= 10


def test_at_the_exit_what_waits_is_written(
    logger: logging.Logger, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffered_log, "PAUSE_S", 3600)
    buffer_lines(logger)
    logger.info("last words")
    assert not stream.getvalue()
    flush_lines(logger)
    assert stream.getvalue() == "last words\n"
    logger.info("very last words")
    logging.shutdown([weakref.ref(handler) for handler in logger.handlers])
    assert stream.getvalue().endswith("very last words\n")


def test_the_format_is_that_of_the_other_handler(logger: logging.Logger, stream: Stream) -> None:
    buffer_lines(logger)
    logging.root.handlers[0].setFormatter(JsonFormatter("worker"))
    logger.info("line")
    flush_lines(logger)
    assert '"process":"worker"' in stream.getvalue()


@pytest.fixture(params=[errno.ENOSPC, errno.EPIPE, errno.EAGAIN], ids=lambda number: errno.errorcode[number])
def refusing(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor of which each write fails."""
    with ExitStack() as opened:
        if request.param == errno.ENOSPC:
            writer = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, writer = os.pipe()
            if request.param == errno.EPIPE:
                os.close(reader)
            else:
                opened.callback(os.close, reader)
                os.set_blocking(writer, False)
                with suppress(BlockingIOError):
                    while True:
                        os.write(writer, bytes(4096))
        opened.callback(os.close, writer)
        with pytest.raises(OSError) as caught:
            os.write(writer, b"x")
        assert caught.value.errno == request.param
        yield writer


MISSING = "up to %d lines are missing: they could not be written"


def test_a_write_that_fails_loses_its_lines_and_no_others(
    logger: logging.Logger, stream: Stream, refusing: int
) -> None:
    buffer_lines(logger)
    stream.instead = refusing
    logger.info("lost")
    wait_until(lambda: stream.writes == 1, timeout_s=20, what="the line can't be written")
    logger.info("lost too")
    flush_lines(logger)
    stream.instead = None
    logger.info("kept")
    wait_until(lambda: "kept" in stream.getvalue(), timeout_s=20, what="the next line is written")
    logger.info("last")
    flush_lines(logger)
    assert stream.getvalue().splitlines() == [MISSING % 2, "kept", "last"]


def test_a_reader_that_stalls_costs_lines_and_delays_nobody(
    logger: logging.Logger, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffered_log, "LINES_LIMIT", 2)
    buffer_lines(logger)
    logging.root.handlers[0].setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    stream.may_write.clear()
    logger.info("first")
    wait_until(lambda: stream.writes == 1, timeout_s=20, what="a write waits for the reader")
    for number in range(5):
        logger.info("line %d", number)
    assert not stream.getvalue()
    stream.may_write.set()
    flush_lines(logger)
    note = f"WARNING {MISSING % 3}"
    assert stream.getvalue().splitlines() == ["INFO first", note, "INFO line 0", "INFO line 1"]
