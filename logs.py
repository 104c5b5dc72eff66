"""The lines of all logs: text for people, or JSON objects for programs (LOG_FORMAT).

Below everything else: gunicorn's master, workers and the supervisor use it. It imports neither Flask nor
Celery.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import msgspec

_encode = msgspec.json.Encoder(enc_hook=str).encode
_LINE_SEPARATORS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\u0085\u2028\u2029"}


class Entry:
    """A log message with fields: `log.info(Entry("request", status=200))`. Fields that are None are left out.

    In text it is `request status=200`, in JSON each field is a key of the object.
    """

    __slots__ = ("fields", "name")

    def __init__(self, name: str, **fields: object) -> None:
        self.name = name
        self.fields = {key: value for key, value in fields.items() if value is not None}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={_plain(value)}" for key, value in self.fields.items())])


def _plain(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and not set(' "=') & set(text) and text else json.dumps(text)


class JsonFormatter(logging.Formatter):
    """Formats records as JSON objects: time (UTC), level, process, pid, logger, message, fields,
    exception."""

    def __init__(self, process: str) -> None:
        """`process`: "web", or the worker's name, without its host."""
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        message: Any = record.msg
        entry = message if isinstance(message, Entry) else None
        line: dict[str, Any] = {
            "time": _time(record.created),
            "level": record.levelname,
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": entry.name if entry else record.getMessage(),
        }
        if entry:
            line |= entry.fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return _dump(line)


def json_line(process: str, message: str, level: str = "INFO") -> str:
    """Return a line for what was not logged: what another program has printed, or a process's last words."""
    return _dump({"time": _time(time.time()), "level": level, "process": process, "message": message})


def message_of(line: str) -> str:
    """Return the message of a line of JSON, and any other line as it is."""
    found = _parse(line)
    return line if found is None else found


def is_json_line(line: str) -> bool:
    """Whether a line is a JSON object with a message."""
    return _parse(line) is not None


def print_failure(process: str, reason: str, *, as_json: bool) -> None:
    """Tell on standard error why a process ends before it has a log."""
    line = json_line(process, reason, "CRITICAL") if as_json else f"{process}: {reason}"
    print(line, file=sys.stderr, flush=True)


def use_json(process: str, loggers: Iterable[logging.Logger] = (logging.root,)) -> None:
    """Let the handlers of `loggers` write JSON, and log warnings and exceptions that nobody handles."""
    formatter = JsonFormatter(process)
    for logger in loggers:
        for handler in logger.handlers:
            handler.setFormatter(formatter)
    logging.captureWarnings(True)
    log = logging.getLogger("uncaught")
    sys.excepthook = lambda kind, error, trace: log.critical(
        "%s", kind.__name__, exc_info=(kind, error, trace)
    )
    threading.excepthook = lambda args: log.critical(
        "%s in thread %s",
        args.exc_type.__name__,
        args.thread.name if args.thread else "?",
        exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback),
    )


def _parse(line: str) -> str | None:
    if not line.startswith("{"):
        return None
    try:
        message = json.loads(line)["message"]
    except (ValueError, KeyError):
        return None
    return message if isinstance(message, str) else None


def _dump(line: dict[str, Any]) -> str:
    # some readers split lines at these
    return _encode(line).decode().translate(_LINE_SEPARATORS)


def _time(seconds: float) -> str:
    whole = int(seconds)
    milliseconds = int((seconds - whole) * 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"
