"""What a heavy model does to the event loop that awaits it, by four ways of calling it, side by side.

Two callers keep runs of about 50 ms going, one after the other, while a ticker sleeps 1 ms at a time and
notes how late the loop wakes it. Every run uses one thread, so two at once would fill two cores.

    python -m benchmarks.loop_lag [--seconds 5] [--repetitions 3] [--json FILE] [--png FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

import aoti_sched
from aoti_sched.package import open_package

from . import heavy_model
from .measure import median_by_field, percentile, this_machine, ticker
from .report import Report, Result, draw, print_table, write_json

if TYPE_CHECKING:
    import torch

CALLERS = 2
RUN_SECONDS = 0.050
RUNNER = "AOTIModelContainerRunnerCpu"  # of torch._C._aoti

Run = Callable[["torch.Tensor"], Awaitable[object]]
"""One way of awaiting the model."""


@dataclass(frozen=True)
class Contestant:
    """A name for the table, a sentence for the reader, and how to get ready to run (None: nothing runs)."""

    name: str
    note: str
    open: Callable[[], AbstractAsyncContextManager[Run | None]]


def contestants(package: Path, stock: Any) -> list[Contestant]:
    @asynccontextmanager
    async def nothing() -> AsyncIterator[None]:
        yield None

    @asynccontextmanager
    async def stock_in_threads() -> AsyncIterator[Run]:
        async def run(x: torch.Tensor) -> object:
            return await asyncio.to_thread(stock.run, [x])

        yield run

    @asynccontextmanager
    async def scheduled() -> AsyncIterator[Run]:
        async with aoti_sched.Scheduler() as scheduler:
            yield (await scheduler.load(package, instances=CALLERS)).run

    @asynccontextmanager
    async def stock_on_the_loop() -> AsyncIterator[Run]:
        async def run(x: torch.Tensor) -> object:
            output = stock.run([x])
            await asyncio.sleep(0)  # as kind as such code can be: other tasks get a turn between two runs
            return output

        yield run

    return [
        Contestant("(a) ticker alone", "nothing runs", nothing),
        Contestant("(b) asyncio.to_thread", f"to_thread over {RUNNER}", stock_in_threads),
        Contestant("(c) aoti_sched", f"Scheduler, instances={CALLERS}", scheduled),
        Contestant("(d) on the loop", f"{RUNNER}, called directly", stock_on_the_loop),
    ]


def stock_runner(package: Path) -> Any:
    """torch's own container runner over the same library, unpacked once; holds as many instances as there are callers."""
    from torch._C._aoti import AOTIModelContainerRunnerCpu

    return AOTIModelContainerRunnerCpu(str(open_package(package).extract().library), CALLERS)


async def measure(
    contestant: Contestant, x: torch.Tensor, seconds: float
) -> tuple[dict[str, float], list[float]]:
    """One repetition: runs per second and the loop's lag in figures, and all the lags."""

    async def call_until(until: float, run: Run) -> int:
        runs = 0
        while time.perf_counter() < until:
            await run(x)
            runs += 1
        return runs

    async with contestant.open() as run, ticker() as lags:
        started = time.perf_counter()
        if run is None:
            await asyncio.sleep(seconds)
            runs = 0
        else:
            runs = sum(await asyncio.gather(*(call_until(started + seconds, run) for _ in range(CALLERS))))
        took = time.perf_counter() - started
    figures = {"runs_per_second": runs / took}
    for name, percent in (("lag_p50", 50), ("lag_p99", 99), ("lag_max", 100)):
        figures[name] = percentile(lags, percent)
    return figures, lags


def benchmark(seconds: float, repetitions: int, tell: Callable[[str], None]) -> Report:
    """Every contestant in every repetition, so that what else the machine does meanwhile falls on all of them."""
    import torch

    tell("compiling the model, once")
    package = heavy_model.ensure_package()
    torch.set_num_threads(1)  # for the stock runner; aoti_sched sets its lanes' threads by itself
    stock = stock_runner(package)
    x = heavy_model.input_lasting(lambda x: stock.run([x]), RUN_SECONDS)
    field = contestants(package, stock)
    rows: dict[str, list[dict[str, float]]] = {contestant.name: [] for contestant in field}
    lags: dict[str, list[float]] = {}
    for repetition in range(1, repetitions + 1):
        for contestant in field:
            tell(f"repetition {repetition} of {repetitions}: {contestant.name}")
            figures, lags[contestant.name] = asyncio.run(measure(contestant, x, seconds))
            rows[contestant.name].append(figures)
    return Report(
        title=f"Event loop under {CALLERS} callers of a model that runs {RUN_SECONDS * 1e3:.0f} ms",
        machine=this_machine(),
        settings={"seconds": seconds, "repetitions": repetitions, "callers": CALLERS, "rows": len(x)},
        baseline=field[1].name,
        results=[
            Result(c.name, c.note, median_by_field(rows[c.name]), rows[c.name], lags[c.name]) for c in field
        ],
    )


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop_lag", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="per contestant and repetition (%(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="the table shows medians (%(default)s)")
    parser.add_argument(
        "--json", type=Path, default=heavy_model.CACHE / "loop_lag.json", help="(%(default)s)"
    )
    parser.add_argument("--png", type=Path, default=heavy_model.CACHE / "loop_lag.png", help="(%(default)s)")
    options = parser.parse_args()
    # The library logs each load and close; here the table speaks.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    console = Console()
    with console.status("starting") as status:
        report = benchmark(options.seconds, options.repetitions, status.update)
    print_table(console, report)
    write_json(report, options.json)
    draw(report, options.png)
    console.print(f"Figures: {options.json}\nPicture: {options.png}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
