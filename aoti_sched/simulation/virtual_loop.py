"""`VirtualLoop`: an asyncio event loop whose time jumps to the next timer instead of passing."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

_T = TypeVar("_T")
_BEGIN = 1000.0
"""Seconds on the clock at the beginning: 0.0 stands for "not yet" in traces."""


class _Selector(selectors.DefaultSelector):
    """Waits for descriptors, in real time only where that is asked for or nothing else can come."""

    def __init__(self) -> None:
        super().__init__()
        self.now = _BEGIN
        self.waits = True

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout if self.waits or timeout is None else 0)
        if not ready and timeout is not None and timeout > 0:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own, which is also a scheduler's `clock`.

    While `waits`, time passes as it does elsewhere, so that worker threads can do their part. With
    `waits` off, the loop jumps to the next timer as soon as no callback is left.
    """

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    @property
    def waits(self) -> bool:
        """Whether the loop sleeps in real time."""
        return self._virtual.waits

    @waits.setter
    def waits(self, waits: bool) -> None:
        self._virtual.waits = waits

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._virtual.now

    def pass_time(self, seconds: float) -> None:
        """Let time pass in the midst of a callback, as a run on the loop's own thread does."""
        self._virtual.now += seconds

    def run(self, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run a coroutine function to its end, and close the loop.

        When the run is interrupted, the coroutine is cancelled and ends first.
        """
        try:
            task = self.create_task(main())
            try:
                return self.run_until_complete(task)
            except BaseException:
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        self.run_until_complete(task)
                raise
        finally:
            self.close()
