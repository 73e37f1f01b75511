"""LoopLag: measures how late the event loop is for its timers.

This is the one timer with a period in the package, so it runs only where the settings ask for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoti_sched.engine.numbers import plain
from aoti_sched.queue.histogram import LEAST_SECONDS, Histogram

if TYPE_CHECKING:
    import asyncio

    from aoti_sched.histograms import Histogram as Snapshot


class LoopLag:
    """Samples the lag of one event loop.

    Args:
        loop: The loop.
        interval: Seconds from one sample to the next.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._loop = loop
        self._interval = interval
        self._lags = Histogram(LEAST_SECONDS)
        self._expected = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._ask()

    def snapshot(self) -> Snapshot:
        """Return the lags so far, in seconds."""
        return plain(self._lags)

    def close(self) -> None:
        """Take no more samples. The numbers stay."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ask(self) -> None:
        self._expected = self._loop.time() + self._interval
        self._timer = self._loop.call_at(self._expected, self._sample)

    def _sample(self) -> None:
        # The loop runs timers that are due within its clock's resolution, so a bit too early.
        self._lags.add(max(0.0, self._loop.time() - self._expected))
        self._ask()
