"""Last rows: what a recording keeps while requests are served, at the least cost.

Compiled, as the rules are. Each row would be an object that outlives the call that made it, and
Python's collector of garbage would look at each of them. So rows are kept as flat values, many rows
in one tuple; and a tuple of numbers and text is left alone by the collector, however many are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

ROWS_TOGETHER = 64
"""Rows in one tuple. The oldest are dropped together."""


class LastRows:
    """Keeps the last rows of values, all of one width.

    Args:
        width: The number of values of a row.
        keep: How many rows are kept at least.
    """

    __slots__ = ("_full", "_groups", "_open", "_width")

    def __init__(self, width: int, keep: int) -> None:
        self._width = width
        self._full = width * ROWS_TOGETHER
        self._open: list[Any] = []
        self._groups: deque[tuple[Any, ...]] = deque(maxlen=-(-keep // ROWS_TOGETHER))

    def append(self, row: tuple[Any, ...]) -> None:
        """Keep a row."""
        values = self._open
        values.extend(row)
        if len(values) >= self._full:
            self._groups.append(tuple(values))
            values.clear()

    def take(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows, the oldest first. They are kept no more."""
        groups, width = self._groups, self._width
        while groups:
            yield from _rows(groups.popleft(), width)
        values, self._open = self._open, []
        yield from _rows(tuple(values), width)


def _rows(values: tuple[Any, ...], width: int) -> Iterator[tuple[Any, ...]]:
    return (values[start : start + width] for start in range(0, len(values), width))
