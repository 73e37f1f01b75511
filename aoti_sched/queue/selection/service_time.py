"""Service times: how long a run takes, learned from earlier runs.

A run's time depends on the size of its inputs, padding included. Times are kept by classes of
sizes. The points (mean size, median time) of the classes make a curve, from which the time of any
size is estimated: between two points along the line through them, beyond the last point with as
many seconds per byte as there.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import Final

WINDOW: Final = 32
"""The number of runs that are remembered."""

KNOWN_AFTER: Final = 8
"""The number of runs after which a time is known."""

OUTLIERS: Final = 10
"""The part of the remembered runs that may have taken longer than the bound: one in this many."""

PATIENCE: Final = 1.0
"""The least seconds without a run of a size before a probe.

A probe runs a job that is predicted to be late, to correct a wrong prediction. Sizes that run
anyway need no probe.
"""

STALE: Final = 10.0
"""The least seconds without a run of a size before a time that hinders batches is disbelieved.

The time must also be that of 100 runs: so wrong beliefs cost at most a hundredth of the device.
"""

BELIEVED: Final = 4
"""The number of runs after which a time may hinder batches. One slow run shows nothing."""

FALLS: Final = 8
"""Rows per second fall where a byte takes longer than at the best smaller size, by one part in this
many. Smaller differences are noise.
"""

UNNOTICED: Final = 1 << 20
"""Grains: a batch that takes no longer, about a millisecond, disturbs no caller.

A launch costs a tenth of that beside the run, so such a batch pays whatever the rows per second.
"""

NO_LIMIT: Final = 1 << 62
"""Grains that no run takes: more than a hundred years."""

GRAIN: Final = 2.0**-30
"""Seconds, about a nanosecond.

Times are kept as whole numbers of grains, so that their sums are exact in any order.
"""


class ServiceTime:
    """The service time of runs of one size class, by the last `WINDOW` runs.

    Attributes:
        size: The mean size of the runs, at least 1.
        grains: The median time of the runs, in grains, at least 1. Known after one run.
        runs: How many runs are remembered.
        bound: Seconds that a run will hardly exceed, a high quantile; infinite while unknown.
        typical: Seconds that half of the runs take at most; 0.0 while unknown.
        mean: Seconds per run, for sums of several runs; 0.0 while unknown.
        seen: When a run was last learned from, or probed.
    """

    __slots__ = (
        "_oldest",
        "_recent",
        "_sizes",
        "_sorted",
        "_total",
        "_total_size",
        "bound",
        "grains",
        "mean",
        "runs",
        "seen",
        "size",
        "typical",
    )

    def __init__(self) -> None:
        self._recent: list[int] = []  # in grains; once the list is full, the oldest is at `_oldest`
        self._sizes: list[int] = []  # of the same runs
        self._oldest = 0
        self._sorted: list[int] = []
        self._total = 0
        self._total_size = 0
        self.size = 1
        self.grains = 1
        self.runs = 0
        self.bound = math.inf
        self.typical = 0.0
        self.mean = 0.0
        self.seen = 0.0

    def learn(self, size: int, seconds: float, now: float) -> None:
        """Learn from a run on `size` bytes, a size of this class."""
        self.seen = now
        grains = int(seconds / GRAIN + 0.5)
        recent, ordered = self._recent, self._sorted
        if len(recent) < WINDOW:
            recent.append(grains)
            self._sizes.append(size)
        else:
            oldest = recent[self._oldest]
            recent[self._oldest] = grains
            self._total_size -= self._sizes[self._oldest]
            self._sizes[self._oldest] = size
            self._oldest = (self._oldest + 1) % WINDOW
            ordered.pop(bisect_left(ordered, oldest))
            self._total -= oldest
        ordered.insert(bisect_left(ordered, grains), grains)
        self._total += grains
        self._total_size += size
        count = len(ordered)
        self.size = self._total_size // count
        self.grains = max(1, ordered[(count - 1) // 2])
        self.runs = count
        if count >= KNOWN_AFTER:
            self.bound = ordered[count - count // OUTLIERS - 1] * GRAIN
            self.typical = ordered[count // 2] * GRAIN
            self.mean = self._total // count * GRAIN


class ServiceTimes:
    """A runner's service times by the size of the inputs, in classes of powers of two.

    A model is fast on small inputs and slow on large ones, so times learned on one size say little
    about another. No inputs count as one byte.
    """

    __slots__ = ("_by_class", "_classes")

    def __init__(self) -> None:
        self._by_class: dict[int, ServiceTime] = {}
        self._classes: list[int] = []  # those of `_by_class`, rising

    def bound(self, size: int) -> float:
        """Return the seconds that a run on `size` bytes will hardly exceed; inf while unknown."""
        known = self._by_class.get(_class_of(size))
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
        bits = _class_of(size)
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
        bits = _class_of(size)
        for larger, known in self._by_class.items():
            if larger > bits and known.bound < limit + (2.0 ** (larger - bits) - 1) * more:
                return True
        return False

    def typical(self, size: int) -> float:
        """Return the median seconds of runs on `size` bytes; 0.0 while too little is known."""
        known = self._by_class.get(_class_of(size))
        return 0.0 if known is None else known.typical

    def mean(self, size: int) -> float:
        """Return the mean seconds of runs on `size` bytes; 0.0 while too little is known."""
        known = self._by_class.get(_class_of(size))
        return 0.0 if known is None else known.mean

    def knows(self, size: int) -> bool:
        """Return whether enough runs on inputs of about `size` bytes have been seen."""
        return self.bound(size) < math.inf

    def should_probe(self, size: int, now: float) -> bool:
        """Return whether to run a job that is predicted to take too long, and note the probe then.

        A probe can correct a wrong prediction. A probe is due when no run of the size was seen for
        `PATIENCE` seconds, and for 8 times the bound.
        """
        known = self._by_class[_class_of(size)]
        if now - known.seen < max(PATIENCE, 8 * known.bound):
            return False
        known.seen = now
        return True

    def _knows(self, bits: int) -> bool:
        return self._by_class[bits].bound < math.inf

    def estimate(self, size: int) -> int:
        """Estimate the grains of a run on `size` bytes, by the curve.

        Below the smallest point, the line through the two smallest ones is followed, to no less
        than as many seconds per byte as there.

        Returns:
            Grains, at least 1; 0 while nothing is known.
        """
        size = max(1, size)
        below: ServiceTime | None = None
        for bits in self._classes:
            known = self._by_class[bits]
            if known.size < size:
                below = known
                continue
            if below is None:
                return self._below_all(size, known)
            more = (known.grains - below.grains) * (size - below.size)
            return below.grains + more // (known.size - below.size)
        return 0 if below is None else max(1, below.grains * size // below.size)

    def _below_all(self, size: int, least: ServiceTime) -> int:
        """Estimate the grains of a run that is at most as large as the smallest point, `least`."""
        proportional = max(1, least.grains * size // least.size)
        if len(self._classes) == 1:
            return proportional
        second = self._by_class[self._classes[1]]
        less = (second.grains - least.grains) * (least.size - size)
        line = least.grains - less // (second.size - least.size)
        return max(proportional, min(line, least.grains))

    def largest(self, size: int, limit: int, now: float) -> int:
        """Return to which size a run may grow: within a limit, and while bytes per second rise.

        A point that hinders the growth is disregarded if it has fewer than `BELIEVED` runs, or is
        `STALE`.

        Args:
            size: The bytes from which the run grows. Their time is known.
            limit: Grains that the run may take.
            now: The present time.

        Returns:
            Bytes, at least `size`.
        """
        size = max(1, size)
        at, grains = size, self.estimate(size)
        if grains >= limit:
            return size
        best_size, best_grains = at, grains
        for bits in self._classes:
            known = self._by_class[bits]
            if known.size <= at:
                continue
            falls = known.grains > UNNOTICED and (
                known.grains * best_size * FALLS > best_grains * known.size * (FALLS + 1)
            )
            if falls or known.grains > limit:
                is_stale = now - known.seen >= max(STALE, 100 * known.grains * GRAIN)
                if is_stale or known.runs < BELIEVED:
                    continue
                room = at + (known.size - at) * (limit - grains) // (known.grains - grains)
                if falls and at.bit_length() == bits:
                    return at
                # Where the rate falls, other sizes of the class before are still good.
                return min(room, (1 << at.bit_length()) - 1) if falls else room
            at, grains = known.size, known.grains
            if grains * best_size < best_grains * at:
                best_size, best_grains = at, grains
        return at * limit // grains

    def learn(self, size: int, seconds: float, now: float) -> None:
        size = max(1, size)
        bits = size.bit_length()
        known = self._by_class.get(bits)
        if known is None:
            known = self._by_class[bits] = ServiceTime()
            insort(self._classes, bits)
        known.learn(size, seconds, now)

    def forget(self, size: int) -> None:
        """Forget the times of runs on inputs of about `size` bytes, and of larger ones."""
        bits = _class_of(size)
        for larger in [known for known in self._classes if known >= bits]:
            del self._by_class[larger]
            self._classes.remove(larger)


def _class_of(size: int) -> int:
    return max(1, size).bit_length()
