"""Which processes do not come up: they are printed, and told to the web processes for /readyz."""

import os
import re
from collections.abc import Callable, Collection

from redis.exceptions import RedisError

from config import EXIT_CONFIGURATION
from logs import message_of
from supervise.console import PrintLine
from supervise.process import Process, Spec, describe_status

FAILED_STARTS = 3
"""A worker that has ended this often in a row without having been ready is an alarm; it is restarted all the
same."""
REPEAT_S = 600.0
"""How often an alarm that lasts is printed again."""
LONGEST_REASON = 300
_LOG_PREFIX = re.compile(r"^(\[[^\]]*\]\s*)+")  # time and level in the logs of Celery and gunicorn

Publish = Callable[[Collection[str], Collection[str]], None]
"""protocol.alarms.Alarms.renew: takes the alarms that last and those that have ended."""


class ProcessAlarms:
    """Counts the failed starts of `workers`, and remembers the processes that are not restarted."""

    def __init__(self, workers: Collection[Spec], publish: Publish, print_line: PrintLine) -> None:
        self._names = {spec.name for spec in workers}
        self._publish = publish
        self._print = print_line
        self._failed_starts: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self._printed: dict[str, float] = {}
        self._published: set[str] = set()

    def exited(self, process: Process, status: int) -> None:
        """Note that a process has ended by itself."""
        name = process.spec.name
        where = f"{name} on {os.uname().nodename}"
        if status == EXIT_CONFIGURATION:
            self._texts[name] = f"{where} does not run: {reason_of(process)}; correct it and restart"
        elif name in self._names:
            self._failed_starts[name] = self._failed_starts.get(name, 0) + 1
            if self._failed_starts[name] >= FAILED_STARTS:
                last = f"{describe_status(status)}: {reason_of(process)}"
                self._texts[name] = f"{where} ends again and again before it is ready; it {last}"

    def became_ready(self, process: Process) -> None:
        """Note that a worker is ready."""
        self._failed_starts.pop(process.spec.name, None)
        self._texts.pop(process.spec.name, None)

    def tell(self, now: float) -> None:
        """Print what is new or was printed REPEAT_S ago, and publish all. `now`: seconds of any clock.

        Blocks.
        """
        texts = set(self._texts.values())
        self._printed = {text: at for text, at in self._printed.items() if text in texts}
        for text in sorted(texts):
            if now - self._printed.get(text, -REPEAT_S) >= REPEAT_S:
                self._printed[text] = now
                self._print(f"ALARM: {text}")
        ended = self._published - texts
        if not texts and not ended:
            return
        try:
            self._publish(texts, ended)
        except RedisError:
            return  # /readyz says that it can't be reached; the next turn tries again
        self._published = texts


def reason_of(process: Process) -> str:
    """Return the last line that a process printed before it ended, "" if it printed none."""
    return _LOG_PREFIX.sub("", message_of(process.last_line))[:LONGEST_REASON]
