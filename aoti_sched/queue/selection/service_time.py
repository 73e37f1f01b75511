"""Service times: how long a run takes, learned from earlier runs."""

from __future__ import annotations

import math
from bisect import bisect_left

WINDOW = 32
"""The number of runs that are remembered."""

KNOWN_AFTER = 8
"""The number of runs after which a time is known."""

OUTLIERS = 10
"""The part of the remembered runs that may have taken longer than the bound: one in this many."""

PATIENCE = 1.0
"""The least seconds without a run of a size before a probe.

A probe runs a job that is predicted to be late, to correct a wrong prediction. Sizes that run
anyway need no probe.
"""

GRAIN = 2.0**-30
"""Seconds, about a nanosecond.

Times are kept as whole numbers of grains, so that their sums are exact in any order.
"""


class ServiceTime:
    """The service time of runs of one size class, by the last `WINDOW` runs.

    Attributes:
        bound: Seconds that a run will hardly exceed, a high quantile; infinite while unknown.
        typical: Seconds that half of the runs take at most; 0.0 while unknown.
        mean: Seconds per run, for sums of several runs; 0.0 while unknown.
        seen: When a run was last learned from, or probed.
    """

    __slots__ = ("_oldest", "_recent", "_sorted", "_total", "bound", "mean", "seen", "typical")

    def __init__(self) -> None:
        self._recent: list[int] = []  # in grains; once the list is full, the oldest is at `_oldest`
        self._oldest = 0
        self._sorted: list[int] = []
        self._total = 0
        self.bound = math.inf
        self.typical = 0.0
        self.mean = 0.0
        self.seen = 0.0

    def learn(self, seconds: float, now: float) -> None:
        self.seen = now
        grains = int(seconds / GRAIN + 0.5)
        recent, ordered = self._recent, self._sorted
        if len(recent) < WINDOW:
            recent.append(grains)
        else:
            oldest = recent[self._oldest]
            recent[self._oldest] = grains
            self._oldest = (self._oldest + 1) % WINDOW
            ordered.pop(bisect_left(ordered, oldest))
            self._total -= oldest
        ordered.insert(bisect_left(ordered, grains), grains)
        self._total += grains
        count = len(ordered)
        if count >= KNOWN_AFTER:
            self.bound = ordered[count - count // OUTLIERS - 1] * GRAIN
            self.typical = ordered[count // 2] * GRAIN
            self.mean = self._total // count * GRAIN


class ServiceTimes:
    """A runner's service times by the size of the inputs, in classes of powers of two.

    A model is fast on small inputs and slow on large ones, so times learned on one size say little
    about another.
    """

    __slots__ = ("_by_class",)

    def __init__(self) -> None:
        self._by_class: dict[int, ServiceTime] = {}

    def bound(self, size: int) -> float:
        """Return the seconds that a run on `size` bytes will hardly exceed; inf while unknown."""
        known = self._by_class.get(size.bit_length())
        return math.inf if known is None else known.bound

    def grown(self, size: int) -> float:
        """Return the bound of a run on `size` bytes, extrapolated where it is not known.

        The bound of the nearest smaller size that is known is scaled by the sizes: a run on larger
        inputs is assumed to take no longer per byte.

        Returns:
            Seconds; infinite while no smaller size is known either.
        """
        known = self.bound(size)
        if known < math.inf:
            return known
        bits = size.bit_length()
        nearest = max(
            (smaller for smaller in self._by_class if smaller < bits and self._knows(smaller)),
            default=-1,
        )
        return math.inf if nearest < 0 else self._by_class[nearest].bound * 2.0 ** (bits - nearest)

    def one_larger_is_short(self, size: int, limit: float, more: float) -> bool:
        """Return whether a run on inputs larger than `size` bytes is known to be short.

        A run on smaller inputs takes no longer.

        Args:
            size: The bytes.
            limit: Seconds below which a run is short.
            more: Seconds that the limit is higher for inputs twice as large, three times as much
                for inputs four times as large, and so on.
        """
        bits = size.bit_length()
        for larger, known in self._by_class.items():
            if larger > bits and known.bound < limit + (2.0 ** (larger - bits) - 1) * more:
                return True
        return False

    def typical(self, size: int) -> float:
        """Return the median seconds of runs on `size` bytes; 0.0 while too little is known."""
        known = self._by_class.get(size.bit_length())
        return 0.0 if known is None else known.typical

    def mean(self, size: int) -> float:
        """Return the mean seconds of runs on `size` bytes; 0.0 while too little is known."""
        known = self._by_class.get(size.bit_length())
        return 0.0 if known is None else known.mean

    def knows(self, size: int) -> bool:
        """Return whether enough runs on inputs of about `size` bytes have been seen."""
        return self.bound(size) < math.inf

    def should_probe(self, size: int, now: float) -> bool:
        """Return whether to run a job that is predicted to take too long, and note the probe then.

        A probe can correct a wrong prediction. A probe is due when no run of the size was seen for
        `PATIENCE` seconds, and for 8 times the bound.
        """
        known = self._by_class[size.bit_length()]
        if now - known.seen < max(PATIENCE, 8 * known.bound):
            return False
        known.seen = now
        return True

    def _knows(self, bits: int) -> bool:
        return self._by_class[bits].bound < math.inf

    def learn(self, size: int, seconds: float, now: float) -> None:
        known = self._by_class.get(size.bit_length())
        if known is None:
            known = self._by_class[size.bit_length()] = ServiceTime()
        known.learn(seconds, now)

    def forget(self, size: int) -> None:
        """Forget the times of runs on inputs of about `size` bytes, and of larger ones."""
        bits = size.bit_length()
        for larger in [known for known in self._by_class if known >= bits]:
            del self._by_class[larger]
