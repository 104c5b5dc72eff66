"""Measures how much work this worker finishes in a second while it has as much to do as it can take.

Only such times tell how long waiting requests will wait: light traffic shows how often requests come, and not
how fast they could be finished.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0
"""Older measurements don't count."""
ENOUGH_S = 10.0
"""Seconds under full load before there is a rate."""
FREE_S = 0.1
"""Slots may have been free for this long between two looks, until the next request was taken from the
queue."""


class Throughput:
    """Counts work per second over the intervals between two looks in which every slot was busy and requests
    waited.

    Thread safe: requests start and end in the threads of their tasks, looks come from the heartbeat.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots = slots
        self._clock = clock
        self._lock = threading.Lock()
        self._running = 0
        self._free_since: float | None = clock()
        self._free_s = 0.0
        self._work = 0.0
        self._looked_at = clock()
        self._was_loaded = False
        self._intervals: deque[tuple[float, float, float]] = deque()
        """(end, seconds, work)"""

    def started(self) -> None:
        """Note that a slot was taken."""
        with self._lock:
            self._running += 1
            if self._running >= self.slots and self._free_since is not None:
                self._free_s += self._clock() - self._free_since
                self._free_since = None

    def ended(self, work: float) -> None:
        """Note that a slot is free again.

        `work`: what was finished (protocol.jobs.work_of), 0 if the request failed.
        """
        with self._lock:
            self._running -= 1
            self._work += work
            if self._running < self.slots and self._free_since is None:
                self._free_since = self._clock()

    def look(self, waiting: int) -> None:
        """End an interval. `waiting`: requests of the model that no worker has claimed."""
        with self._lock:
            now = self._clock()
            free_s, work = self._free_s, self._work
            if self._free_since is not None:
                free_s += now - self._free_since
                self._free_since = now
            is_loaded = waiting > 0
            if is_loaded and self._was_loaded and free_s <= FREE_S:
                self._intervals.append((now, now - self._looked_at, work))
            self._free_s = self._work = 0.0
            self._looked_at, self._was_loaded = now, is_loaded
            while self._intervals and now - self._intervals[0][0] > WINDOW_S:
                self._intervals.popleft()

    @property
    def rate(self) -> float:
        """Work per second, 0 if it is not known."""
        with self._lock:
            seconds = sum(seconds for _, seconds, _ in self._intervals)
            work = sum(work for _, _, work in self._intervals)
        return work / seconds if seconds >= ENOUGH_S else 0.0
