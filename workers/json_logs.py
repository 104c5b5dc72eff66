"""The lines of a worker as JSON objects, those that Celery prints without its log included
(LOG_FORMAT=json)."""

import logging
import os
from typing import Any, TextIO

import celery.apps.worker
from celery.signals import celeryd_init

from logs import json_line, use_json


def write_json() -> None:
    """Call this before the worker is made: Celery warns of things before it has set up its log."""
    celeryd_init.connect(_begin, weak=False)


def format_handlers(worker: str) -> None:
    """Let the handlers that Celery has made write JSON. `worker`: Celery's name of this process."""
    use_json(_name(worker), [logging.root, logging.getLogger("celery.task")])


def _begin(sender: str, instance: Any, **_: object) -> None:
    logging.basicConfig()  # until Celery replaces the handler
    format_handlers(sender)
    instance.quiet = True  # without the banner

    def say(message: str, file: TextIO | None = None) -> None:
        # called by handlers of signals, which must not take a lock
        os.write(2, f"{json_line(_name(sender), message)}\n".encode())

    celery.apps.worker.safe_say = say  # type: ignore[attr-defined]  # the module has no types


def _name(worker: str) -> str:
    """The worker's name without its host, as `scripts/run` shows it."""
    return worker.partition("@")[0]
