"""Histograms of a runner's requests: how long they waited and ran, by how they ended.

The buckets are fixed, so that histograms of several runners, devices and processes can be added.
The upper bounds are powers of two and the values halfway between: 8, 12, 16, 24, 32 µs and so on.
An event costs two comparisons and one increment where it falls into the bucket of the event before.
"""

from __future__ import annotations

from math import inf
from typing import Final

LEAST_SECONDS: Final = 8e-6
"""The upper bound of the first bucket of seconds."""
LEAST_SIZE: Final = 1.0
"""The upper bound of the first bucket of batch sizes."""
DOUBLINGS: Final = 26
"""The last bound is 2**26 times the first: 537 seconds. One more bucket has what is larger."""


def bounds_from(least: float) -> list[float]:
    """Return the upper bounds of the buckets; a value that equals a bound is in its bucket."""
    bounds = [least * 2**power * step for power in range(DOUBLINGS) for step in (1.0, 1.5)]
    return [*bounds, least * 2**DOUBLINGS]


_SECONDS = [*bounds_from(LEAST_SECONDS), inf]
_SIZES = [*bounds_from(LEAST_SIZE), inf]


class Histogram:
    """Counts values in fixed buckets.

    Most values fall into the bucket of the value before. Its bounds and its latest values are plain
    attributes: compiled, these cost a tenth of what the items of a list cost.

    Attributes:
        least: The upper bound of the first bucket.
        sum: All values together.
        max: The largest value; 0.0 without values.
    """

    __slots__ = (
        "_bounds",
        "_bucket",
        "_counts",
        "_high",
        "_latest",
        "_low",
        "least",
        "max",
        "sum",
    )

    def __init__(self, least: float) -> None:
        self.least = least
        self._bounds = _SECONDS if least == LEAST_SECONDS else _SIZES
        self._counts = [0] * len(self._bounds)
        self._bucket = 0  # of the value before
        self._low = -inf
        self._high = self._bounds[0]
        self._latest = 0  # values of this bucket that its count does not have yet
        self.sum = 0.0
        self.max = 0.0

    @property
    def counts(self) -> list[int]:
        """The number of values in each bucket; the last bucket has no upper bound."""
        counts = list(self._counts)
        counts[self._bucket] += self._latest
        return counts

    def add(self, value: float) -> None:
        if not self._low < value <= self._high:
            self._go_to(value)
        self._latest += 1
        self.sum += value
        if value > self.max:  # noqa: PLR1730 -- compiled, max() is a call
            self.max = value

    def _go_to(self, value: float) -> None:
        """Go to the bucket of a value, from one that does not have it."""
        bounds, counts, bucket = self._bounds, self._counts, self._bucket
        counts[bucket] = counts[bucket] + self._latest  # compiled, `+=` is a call
        self._latest = 0
        while value > bounds[bucket]:
            bucket += 1
        while bucket > 0 and value <= bounds[bucket - 1]:
            bucket -= 1
        self._bucket = bucket
        self._low = bounds[bucket - 1] if bucket > 0 else -inf
        self._high = bounds[bucket]


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
