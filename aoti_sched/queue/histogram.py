"""Histograms of a runner's requests: how long they waited and ran, by how they ended.

The buckets are fixed, so that histograms of several runners, devices and processes can be added.
The upper bounds are powers of two and the values halfway between: 8, 12, 16, 24, 32 µs and so on.
An event costs some comparisons, from the bucket of the event before, and one increment.
"""

from __future__ import annotations

from math import inf

LEAST_SECONDS = 8e-6
"""The upper bound of the first bucket of seconds."""
LEAST_SIZE = 1.0
"""The upper bound of the first bucket of batch sizes."""
DOUBLINGS = 26
"""The last bound is 2**26 times the first: 537 seconds. One more bucket has what is larger."""


def bounds_from(least: float) -> list[float]:
    """Return the upper bounds of the buckets; a value that equals a bound is in its bucket."""
    bounds = [least * 2**power * step for power in range(DOUBLINGS) for step in (1.0, 1.5)]
    return [*bounds, least * 2**DOUBLINGS]


_SECONDS = [*bounds_from(LEAST_SECONDS), inf]
_SIZES = [*bounds_from(LEAST_SIZE), inf]


class Histogram:
    """Counts values in fixed buckets.

    Attributes:
        least: The upper bound of the first bucket.
        counts: Values in each bucket; the last bucket has no upper bound.
        sum: All values together.
        max: The largest value; 0.0 without values.
    """

    __slots__ = ("_bounds", "_last", "counts", "least", "max", "sum")

    def __init__(self, least: float) -> None:
        self.least = least
        self._bounds = _SECONDS if least == LEAST_SECONDS else _SIZES
        self._last = 0  # the bucket of the value before; most values lie near it
        self.counts = [0] * len(self._bounds)
        self.sum = 0.0
        self.max = 0.0

    def add(self, value: float) -> None:
        bounds, counts, bucket = self._bounds, self.counts, self._last
        while value > bounds[bucket]:
            bucket += 1
        while bucket > 0 and value <= bounds[bucket - 1]:
            bucket -= 1
        self._last = bucket
        counts[bucket] = counts[bucket] + 1  # compiled, `+=` is a call
        self.sum += value
        if value > self.max:  # noqa: PLR1730 -- compiled, max() is a call
            self.max = value


class Ended:
    """The histograms of the requests of one priority that ended in the same way.

    Attributes:
        queue: Seconds from submission to the start of the run, or to the end without a run.
        run: Seconds of the runs that are over.
        total: Seconds from submission to the end.
        batch_size: How many requests shared each of the runs in `run`.
    """

    __slots__ = ("batch_size", "queue", "run", "total")

    def __init__(self) -> None:
        self.queue = Histogram(LEAST_SECONDS)
        self.run = Histogram(LEAST_SECONDS)
        self.total = Histogram(LEAST_SECONDS)
        self.batch_size = Histogram(LEAST_SIZE)


class Histograms:
    """The histograms of a runner, made when a request of their kind ends first.

    Args:
        states: The number of states that a job may end in.
        classes: The number of priority classes.
    """

    __slots__ = ("_ended", "_states")

    def __init__(self, states: int, classes: int) -> None:
        self._states = states
        self._ended: list[Ended | None] = [None] * (states * classes)

    def of(self, state: int, priority: int) -> Ended:
        """Return the histograms of the jobs of a class that ended in a state."""
        index = priority * self._states + state
        ended = self._ended[index]
        if ended is None:
            ended = self._ended[index] = Ended()
        return ended

    def each(self) -> list[tuple[int, int, Ended]]:
        """Return those that were made, with the state and the priority of their jobs."""
        return [
            (index % self._states, index // self._states, ended)
            for index, ended in enumerate(self._ended)
            if ended is not None
        ]
