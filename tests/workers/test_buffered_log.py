"""workers.buffered_log: lines are written in batches, all of them, in order."""

import io
import logging
import weakref
from collections.abc import Iterator

import pytest

from logs import JsonFormatter
from tests.deployment import wait_until
from workers import buffered_log
from workers.buffered_log import buffer_lines, flush_lines


class Stream(io.StringIO):
    """Counts the writes."""

    writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


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
