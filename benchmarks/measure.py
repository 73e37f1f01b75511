"""What the workloads measure with: a ticker on the event loop, percentiles, the machine's name.

Nothing here knows a model or a scheduler. Durations are seconds; only tables and pictures speak
other units.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import platform
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

TICK = 0.001
LAGS = {"p50": 50, "p99": 99, "max": 100}
"""What is told of the loop's lag, and which percentile each is."""


@asynccontextmanager
async def ticker(tick: float = TICK) -> AsyncIterator[list[float]]:
    """While the block runs, sleep `tick` seconds at a time and collect how late the loop woke us.

    That lateness is what every other task on the loop feels. A loop that stands still takes few
    samples, so its percentiles, if anything, flatter it.
    """
    lags: list[float] = []

    async def watch() -> None:
        while True:
            due = time.perf_counter() + tick
            try:
                await asyncio.sleep(tick)
            finally:
                # The last sleep counts too: it is the only one when the loop stood still all along.
                now = time.perf_counter()
                if now >= due:
                    lags.append(now - due)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)  # it is asleep before the block begins
    try:
        yield lags
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of 100 values do not exceed (nearest rank); values need
    not be sorted.
    """
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def lag_figures(lags: Sequence[float]) -> dict[str, float]:
    """What a `ticker` collected, as figures: "lag_p50" and so on."""
    return {f"lag_{name}": percentile(lags, percent) for name, percent in LAGS.items()}


@dataclass(frozen=True)
class Machine:
    """Where and when a benchmark ran: what a reader must know before comparing two of them."""

    date: str
    torch: str
    python: str
    cores: int
    processor: str
    rules: str
    """Whether this library's rules are "compiled", as where it is installed, or "python", as
    where it is worked on.
    """

    def __str__(self) -> str:
        return (
            f"{self.date}, torch {self.torch}, Python {self.python}, rules {self.rules}, "
            f"{self.cores} cores of {self.processor}"
        )


def this_machine() -> Machine:
    from aoti_sched.backends.cpu import available_cores
    from aoti_sched.scheduler import RULES

    return Machine(
        date=dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        torch=version("torch"),
        python=platform.python_version(),
        cores=available_cores(),
        processor=_processor(),
        rules=RULES,
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
