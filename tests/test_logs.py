"""The lines of logs: entries with fields as text and as JSON."""

import json
import logging
import re
import sys
from typing import Any

from logs import Entry, JsonFormatter, is_json_line, json_line, message_of


def record(message: object, *arguments: object, **more: Any) -> logging.LogRecord:
    return logging.LogRecord(
        "name", logging.WARNING, "file", 1, message, arguments, **{"exc_info": None, **more}
    )


def test_an_entry_is_text_of_pairs_without_what_is_none() -> None:
    entry = Entry(
        "job", status=200, seconds=0.5, model="a b", empty="", quoted='x"y', broken="x\ny", none=None
    )
    assert str(entry) == r'job status=200 seconds=0.5 model="a b" empty="" quoted="x\"y" broken="x\ny"'


def test_as_json_each_field_of_an_entry_is_a_key() -> None:
    line = JsonFormatter("web").format(record(Entry("request", status=200, model="a b", none=None)))
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found.pop("pid") > 0
    assert found == {
        "level": "WARNING",
        "process": "web",
        "logger": "name",
        "message": "request",
        "status": 200,
        "model": "a b",
    }


def test_an_exception_is_on_the_same_line() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        line = JsonFormatter("web").format(record("failed: %s", "x\u2028y\u0085", exc_info=sys.exc_info()))
    assert len(line.splitlines()) == 1
    found = json.loads(line)
    assert found["message"] == "failed: x\u2028y\u0085"
    assert found["exception"].startswith("Traceback") and found["exception"].endswith("ValueError: wrong")


def test_lines_of_other_programs_are_told_from_those_that_are_json() -> None:
    line = json_line("redis", '# out of "memory"', "ERROR")
    assert is_json_line(line) and message_of(line) == '# out of "memory"'
    for other in ("plain", "{", '{"a": 1}', '{"message": 1}', '["message"]', ""):
        assert not is_json_line(other) and message_of(other) == other
