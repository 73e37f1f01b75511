"""Search: climbs towards the best point of a grid, without looking at all of it.

A point has an index for each axis. From each start the search goes to the best neighbour, one step
along one axis or two, while that is better. A point is looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

Point = tuple[int, ...]
Score = tuple[float, ...]
"""The higher, the better."""


class Climb:
    """A search for the point of the highest score.

    Args:
        lengths: How many values each axis has.
        score: Returns the score of a point.
        allows: Whether a point may be looked at.
        limit: The most points that are looked at.

    Attributes:
        scores: The points that were looked at, with their scores.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        score: Callable[[Point], Score],
        *,
        allows: Callable[[Point], bool] = lambda _: True,
        limit: int = 1 << 30,
    ) -> None:
        self._lengths = tuple(lengths)
        self._score = score
        self._allows = allows
        self._limit = limit
        self.scores: dict[Point, Score] = {}

    def best(self) -> list[Point]:
        """Return the points that were looked at, the best first; of equal ones the earliest."""
        return sorted(self.scores, key=self.scores.__getitem__, reverse=True)

    def run(self, starts: Iterable[Point]) -> None:
        """Climb from each start. The starts are looked at first, and the best climbs first."""
        found = [start for start in starts if self._looked_at(start)]
        for start in sorted(found, key=self.scores.__getitem__, reverse=True):
            self._climb(start)

    def _climb(self, here: Point) -> None:
        while True:
            near = [point for point in self._near(here) if self._looked_at(point)]
            best = max(near, key=self.scores.__getitem__, default=here)
            if self.scores[best] <= self.scores[here]:
                return
            here = best

    def _looked_at(self, point: Point) -> bool:
        """Look at a point, unless that was done or may not be done; return whether it was done."""
        if point not in self.scores:
            if len(self.scores) >= self._limit or not self._allows(point):
                return False
            self.scores[point] = self._score(point)
        return True

    def _near(self, point: Point) -> Iterator[Point]:
        axes = range(len(point))
        for chosen in [*combinations(axes, 1), *combinations(axes, 2)]:
            for steps in product((-1, 1), repeat=len(chosen)):
                moved = list(point)
                for axis, step in zip(chosen, steps, strict=True):
                    moved[axis] += step
                if all(0 <= moved[axis] < self._lengths[axis] for axis in chosen):
                    yield tuple(moved)


def grid(axes: Sequence[Sequence[Any]]) -> Iterator[Point]:
    """Yield every point of a grid."""
    yield from product(*(range(len(axis)) for axis in axes))
