"""Spans: events that took time, found by the time in which they went on."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

_T = TypeVar("_T")
_BLOCK = 256


class Spans(Generic[_T]):
    """Keeps the last events of a kind, in the order of their ends.

    Their begins are in no order: a long event may have begun before many short ones. So the events
    lie in blocks whose earliest begin is known, and a search skips a block that began too late.

    Args:
        limit: The number of the last events that are kept at least.

    Attributes:
        since: The end of the last event that was dropped. All later ones are here.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: list[_Block[_T]] = []
        self._count = 0
        self.since = -math.inf

    def add(self, event: _T, begin: float, end: float) -> None:
        """Keep an event that has ended last. Drop the oldest block that the limit does not need."""
        blocks = self._blocks
        if not blocks or len(blocks[-1].events) == _BLOCK:
            blocks.append(_Block())
        blocks[-1].add(event, begin, end)
        self._count += 1
        oldest = len(blocks[0].events)
        if self._count - oldest >= self._limit:
            self.since = blocks[0].ends[-1]
            del blocks[0]
            self._count -= oldest

    def __iter__(self) -> Iterator[_T]:
        for block in self._blocks:
            yield from block.events

    def during(self, begin: float, end: float) -> Iterator[_T]:
        """Find the events that went on at some time between these."""
        blocks = self._blocks
        for index in range(bisect_right(blocks, begin, key=_last_end), len(blocks)):
            if blocks[index].earliest < end:
                yield from blocks[index].during(begin, end)


class _Block(Generic[_T]):
    __slots__ = ("begins", "earliest", "ends", "events")

    def __init__(self) -> None:
        self.events: list[_T] = []
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.earliest = math.inf

    def add(self, event: _T, begin: float, end: float) -> None:
        self.events.append(event)
        self.begins.append(begin)
        self.ends.append(end)
        self.earliest = min(self.earliest, begin)

    def during(self, begin: float, end: float) -> Iterator[_T]:
        for index in range(bisect_right(self.ends, begin), len(self.ends)):
            if self.begins[index] < end:
                yield self.events[index]


def _last_end(block: _Block[_T]) -> float:
    return block.ends[-1]
