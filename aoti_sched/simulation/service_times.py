"""`ServiceTimes`: how long a run takes, by its size, from runs that were measured.

**Measured sizes.** A run of a size that was measured takes one of the measured times, one after the
other, so that their spread is kept.

**Between two sizes** the medians are joined by a straight line, and the spread is that of the
nearest measured size.

**Beyond the largest size** the line through the two largest ones goes on. Where a single size was
measured, a run takes time in proportion to its requests, so batching gains nothing.

**Below the smallest size** the line through the two smallest ones goes on, to no less than as much
time for each request as there. Where a single size was measured, a smaller run takes as long.

Only the measured sizes are knowledge; `sources` counts what each run was derived from.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

RECORDED = "recorded run"
MEASURED = "measured size"
INTERPOLATED = "interpolated"
EXTRAPOLATED = "extrapolated"


class ServiceTimes:
    """The service times of one model.

    Args:
        by_size: The measured seconds of runs, by the number of their requests.
        of_runs: The seconds of single runs, by the number of the leading request and the size. Such
            a run takes exactly that time.

    Attributes:
        sources: How many runs were derived from what.
    """

    def __init__(
        self,
        by_size: Mapping[int, Sequence[float]],
        of_runs: Mapping[tuple[int, int], float] | None = None,
    ) -> None:
        self._by_size = {size: list(by_size[size]) for size in sorted(by_size) if by_size[size]}
        self._of_runs = of_runs or {}
        self._sizes = list(self._by_size)
        self._medians = {size: median(times) for size, times in self._by_size.items()}
        self._taken: Counter[int] = Counter()
        self.sources: Counter[str] = Counter()

    @property
    def sizes(self) -> list[int]:
        """The measured sizes, rising."""
        return list(self._sizes)

    def seconds(self, requests: Sequence[int]) -> float:
        """Return the seconds of a run of these requests, the leader first."""
        size = len(requests)
        known = self._of_runs.get((requests[0], size))
        if known is not None:
            self.sources[RECORDED] += 1
            return known
        if size in self._by_size:
            self.sources[MEASURED] += 1
            return self._next_of(size)
        inside = self._sizes[0] < size < self._sizes[-1]
        self.sources[INTERPOLATED if inside else EXTRAPOLATED] += 1
        nearest = min(self._sizes, key=lambda known: abs(known - size))
        usual = self._medians[nearest]
        spread = self._next_of(nearest) / usual if usual > 0 else 1.0
        return self.typical(size) * spread

    def typical(self, size: int) -> float:
        """Return the median seconds of a run of this size, by the rules above."""
        sizes, medians = self._sizes, self._medians
        if size in medians:
            return medians[size]
        if len(sizes) == 1:
            return medians[sizes[0]] * max(1.0, size / sizes[0])
        place = min(max(1, bisect_left(sizes, size)), len(sizes) - 1)
        below, above = sizes[place - 1], sizes[place]
        slope = (medians[above] - medians[below]) / (above - below)
        line = medians[below] + slope * (size - below)
        if size < sizes[0]:
            return max(min(line, medians[sizes[0]]), medians[sizes[0]] * size / sizes[0])
        return max(line, medians[sizes[-1]]) if size > sizes[-1] else line

    def _next_of(self, size: int) -> float:
        times = self._by_size[size]
        taken = self._taken[size]
        self._taken[size] += 1
        return times[taken % len(times)]
