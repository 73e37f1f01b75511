"""Reading: one pass over a foreign weights source, which can be abandoned while foreign code runs.

The source is read in a thread of its own. As long as the thread is in foreign code, which may block for ever, its owner may abandon it.
When the thread comes back, it finds that it was abandoned, and ends without touching the container. While the thread runs code of ours,
the owner waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

_T = TypeVar("_T")


class Abandoned(BaseException):
    """The owner of a reading has left. Raised in the reading's thread, and seen by nobody else."""


class Reading:
    """Says whether a reading may be abandoned now. The default of `Container.stage` is one that nobody abandons."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._foreign = False
        self._given_up = False

    @contextmanager
    def source(self, opened: AbstractContextManager[Iterator[_T]]) -> Iterator[Iterator[_T]]:
        """Open a source; inside, its items. Nothing of the container may be touched between the first item and the last.

        Raises:
            Abandoned: The owner has left: nothing may be touched any more.
        """
        self._leave()
        try:
            with opened as items:
                self._come_back()
                try:
                    yield self._each(items)
                finally:
                    self._leave()
        finally:
            self._come_back()

    @contextmanager
    def foreign(self) -> Iterator[None]:
        """Inside, only foreign code runs: what it reads from may block.

        Raises:
            Abandoned: The owner has left: nothing may be touched any more.
        """
        self._leave()
        try:
            yield
        finally:
            self._come_back()

    def abandon(self) -> bool:
        """Return whether the thread is in foreign code, and so need not be waited for. Otherwise it ends by itself, soon."""
        with self._lock:
            self._given_up = True
            return self._foreign

    def _each(self, items: Iterator[_T]) -> Iterator[_T]:
        self._leave()
        yield from items
        self._come_back()

    def _leave(self) -> None:
        self._cross(foreign=True)

    def _come_back(self) -> None:
        self._cross(foreign=False)

    def _cross(self, *, foreign: bool) -> None:
        with self._lock:
            if self._given_up:
                raise Abandoned
            self._foreign = foreign
