"""When to repeat a call that failed."""

import random


class Backoff:
    """Waits that double with each failure in a row, from `first_s` to `max_s`.

    Each is shortened at random by up to half. That keeps workers that failed together from retrying
    together. `retry_at`: when the next attempt may start, by the clock that `failed` is given.
    """

    def __init__(self, first_s: float, max_s: float) -> None:
        self.retry_at = 0.0
        self._first_s = first_s
        self._max_s = max_s
        self._failures = 0

    def failed(self, now: float) -> None:
        """Put the next attempt off: one has failed at `now`."""
        longest_s = min(self._max_s, self._first_s * 2 ** min(self._failures, 16))
        self._failures += 1
        self.retry_at = now + longest_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Let the next attempt start at once: one succeeded, or what is attempted has changed."""
        self._failures, self.retry_at = 0, 0.0
