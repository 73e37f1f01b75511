"""Reading: one pass over a user's source of weights, which can be abandoned.

The source is read in a thread of its own. Foreign code may block for ever, so the owner may abandon
the reading while the thread is in such code. When the thread returns from it, `Abandoned` is raised
in the thread, which then ends without touching the container. While the thread runs code of this
package, the owner waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

_T = TypeVar("_T")


class Abandoned(BaseException):
    """Raised in the thread of a reading that its owner abandoned. No caller sees this error."""


class Reading:
    """Records whether the thread that reads a source is in foreign code, and may be abandoned now.

    `Container.stage` makes a reading of its own when it is given none; that reading is never
    abandoned.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._foreign = False
        self._given_up = False

    @contextmanager
    def source(self, opened: AbstractContextManager[Iterator[_T]]) -> Iterator[Iterator[_T]]:
        """Open a source for the block, and yield its items.

        Between the first item and the last, the block must not touch the container.

        Raises:
            Abandoned: The owner has abandoned the reading. Do not touch the container any more.
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
        """Mark the block as foreign code, which may block for ever.

        Raises:
            Abandoned: The owner has abandoned the reading. Do not touch the container any more.
        """
        self._leave()
        try:
            yield
        finally:
            self._come_back()

    def abandon(self) -> bool:
        """Abandon the reading. Return whether its thread is in foreign code and is left behind.

        Otherwise the thread runs code of this package and ends soon; the owner waits for it.
        """
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
