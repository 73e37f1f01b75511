"""Heap: the least entry first, of entries that may come to nothing without being found and
taken out.

Those that are over are dropped when they are the least, and a few at a time once they outnumber the
others: no fact pays for all.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

_E = TypeVar("_E", bound="tuple[Any, ...]")

SPARE = 16
"""Entries that may be over without mattering, however few the others are."""

MOVED = 4
"""Entries that one call of `tidy` looks at.

Of n entries half are over when it begins, so it is done before n/4 more are.
"""

_NONE: list[Any] = []  # never changed


class Heap(ABC, Generic[_E]):
    """Entries are tuples that can be compared; a subclass says which are over.

    To be rid of those that are over, entries move to another heap: from the end, which leaves the
    rest a heap.
    """

    __slots__ = ("_entries", "_old")

    def __init__(self) -> None:
        self._entries: list[_E] = []
        self._old: list[_E] = _NONE  # what has not moved yet

    @abstractmethod
    def is_over(self, entry: _E) -> bool:
        """Whether an entry has come to nothing."""

    def add(self, entry: _E) -> None:
        heapq.heappush(self._entries, entry)

    def entries(self) -> list[_E]:
        """All of them, in no order, with those that are over."""
        return self._entries + self._old

    def least(self) -> _E | None:
        """The least entry, be it over or not; None when there is none."""
        entries, old = self._entries, self._old
        if old and (not entries or old[0] < entries[0]):
            heapq.heappush(entries, heapq.heappop(old))
        return entries[0] if entries else None

    def drop(self) -> None:
        """Take out what `least` has just said."""
        heapq.heappop(self._entries)

    def first_alive(self) -> _E | None:
        """The least entry that is not over; None when there is none."""
        while (entry := self.least()) is not None and self.is_over(entry):
            self.drop()
        return entry

    def tidy(self, alive: int) -> None:
        """Drop some of the entries that are over.

        Call when one more may be; `alive` others are not.
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
