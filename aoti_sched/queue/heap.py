"""Heap: the least entry first, where entries may become obsolete without being taken out.

Entries that are over are dropped when they are the least, and a few at a time once they outnumber
the others. So no fact takes long.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from typing import Any, Final, Generic, TypeVar

_E = TypeVar("_E", bound="tuple[Any, ...]")

SPARE: Final = 16
"""The number of entries that may be over before any are dropped, however few the others are."""

MOVED: Final = 4
"""The number of entries that one call of `tidy` moves to the new heap.

Half of n entries are over when the move begins, so the move ends before n/4 more are over.
"""

_NONE: list[Any] = []  # never changed


class Heap(ABC, Generic[_E]):
    """A heap of tuples that can be compared. A subclass says which entries are over.

    To drop the entries that are over, the others move to another heap. Entries are taken from
    the end, which leaves the rest a heap.
    """

    __slots__ = ("_entries", "_old")

    def __init__(self) -> None:
        self._entries: list[_E] = []
        self._old: list[_E] = _NONE  # what has not moved yet

    @abstractmethod
    def is_over(self, entry: _E) -> bool:
        """Return whether an entry is obsolete."""

    def add(self, entry: _E) -> None:
        heapq.heappush(self._entries, entry)

    def entries(self) -> list[_E]:
        """Return all entries, in no order, those that are over included."""
        return self._entries + self._old

    def least(self) -> _E | None:
        """Return the least entry, whether it is over or not; None when there is none."""
        entries, old = self._entries, self._old
        if old and (not entries or old[0] < entries[0]):
            heapq.heappush(entries, heapq.heappop(old))
        return entries[0] if entries else None

    def drop(self) -> None:
        """Take out the entry that `least` has just returned."""
        heapq.heappop(self._entries)

    def first_alive(self) -> _E | None:
        """Return the least entry that is not over; None when there is none."""
        while (entry := self.least()) is not None and self.is_over(entry):
            self.drop()
        return entry

    def tidy(self, alive: int) -> None:
        """Drop some of the entries that are over. Call when one more may be over.

        Args:
            alive: How many entries are not over.
        """
        old = self._old
        if len(self._entries) + len(old) <= alive + SPARE:
            return
        for _ in range(2):  # so that not all surface at once
            entry = self.least()
            if entry is None or not self.is_over(entry):
                break
            self.drop()
        if old:
            for _ in range(min(MOVED, len(old))):
                entry = old.pop()
                if not self.is_over(entry):
                    self.add(entry)
        elif len(self._entries) > 2 * alive + SPARE:
            self._old, self._entries = self._entries, []
