"""Estimate: how long a run takes, learned from the runs there were."""

from __future__ import annotations

import math
from bisect import bisect_left

WINDOW = 32
"""Runs that are remembered."""

KNOWN_AFTER = 8
"""Runs after which something is known."""

OUTLIERS = 10
"""One in so many of the remembered runs may have taken longer than the bound."""

PATIENCE = 1.0
"""Seconds, at least, without a run of a kind, while jobs are given up since runs of that kind
are believed to take too long. Then one is run all the same. A kind that runs anyway needs no
such try.
"""

GRAIN = 2.0**-30
"""Seconds, about a nanosecond.

Times are whole numbers of it, so that their sums are exact, in whatever order.
"""


class ServiceTime:
    """The service time of one kind of run, by the last `WINDOW` runs."""

    __slots__ = ("_oldest", "_recent", "_sorted", "_total", "bound", "mean", "seen", "typical")

    def __init__(self) -> None:
        self._recent: list[int] = []  # in grains; once it is full, the oldest is at `_oldest`
        self._oldest = 0
        self._sorted: list[int] = []
        self._total = 0
        self.bound = math.inf
        """Seconds that a run will hardly exceed, a high quantile; infinite while too little is
        known.
        """
        self.typical = 0.0
        """Seconds that half of the runs take at most; 0.0 while too little is known."""
        self.mean = 0.0
        """Seconds that so many runs take one by one, per run: what sums are made of.

        0.0 while too little is known.
        """
        self.seen = 0.0  # when a run was last learned of, or tried

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

    A model that takes inputs of many sizes is quick with small ones and slow with large ones; what
    was learned of the one says nothing of the other.
    """

    __slots__ = ("_by_class",)

    def __init__(self) -> None:
        self._by_class: dict[int, ServiceTime] = {}

    def bound(self, size: int) -> float:
        """Seconds that a run on inputs of `size` bytes will hardly exceed; infinite while too
        little is known.
        """
        known = self._by_class.get(size.bit_length())
        return math.inf if known is None else known.bound

    def grown(self, size: int) -> float:
        """`bound`, and where that is not known, what the nearest smaller size makes likely: a
        run takes no longer per byte.
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
        """Whether a run on larger inputs than of `size` bytes is known to stay below the limit,
        which is as much higher for each that it is twice as large: a run on smaller inputs
        takes no longer.
        """
        bits = size.bit_length()
        for larger, known in self._by_class.items():
            if larger > bits and known.bound < limit + (2.0 ** (larger - bits) - 1) * more:
                return True
        return False

    def typical(self, size: int) -> float:
        """Seconds that half of the runs on inputs of `size` bytes take at most; 0.0 while too
        little is known.
        """
        known = self._by_class.get(size.bit_length())
        return 0.0 if known is None else known.typical

    def mean(self, size: int) -> float:
        """Seconds that a run on inputs of `size` bytes takes on an average; 0.0 while too
        little is known.
        """
        known = self._by_class.get(size.bit_length())
        return 0.0 if known is None else known.mean

    def knows(self, size: int) -> bool:
        """Whether enough runs on inputs of about `size` bytes have been seen."""
        return self.bound(size) < math.inf

    def should_probe(self, size: int, now: float) -> bool:
        """Whether to run a job that is believed to take too long all the same, so that a wrong
        belief can be corrected.
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
        """What was known of inputs of this size, and of larger ones, is not true any more."""
        bits = size.bit_length()
        for larger in [known for known in self._by_class if known >= bits]:
            del self._by_class[larger]
