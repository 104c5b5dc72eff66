"""A histogram of the seconds between two tokens of a stream."""

from bisect import bisect_left
from itertools import accumulate

BOUNDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets, in seconds. One more has no bound."""


class TokenGaps:
    """Written by the engine thread only. A reader in another thread may be a step behind."""

    __slots__ = ("_counts", "seconds")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0
        """Sum of all gaps."""

    def add(self, seconds: float, count: int) -> None:
        """Add a gap that `count` streams had in one step."""
        self._counts[bisect_left(BOUNDS, seconds)] += count
        self.seconds += seconds * count

    def buckets(self) -> list[tuple[str, float]]:
        """Return for each bound how many gaps were at most so long, as Prometheus wants them."""
        names = [*(str(bound) for bound in BOUNDS), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))
