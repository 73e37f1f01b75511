"""What a device is served with: `python -m benchmarks.devices cuda:0`, side by side with
torch's own runner, as tables for docs/devices.md.

- One client: from the request to the result on the device, beside a bare loop of torch's runner,
  which waits for the device after each run.
- Throughput with 1, 2, 4 and 8 instances, beside a bare loop that never waits: one thread that
  launches as fast as it can, on one stream.
- The pause of a swap under load, and what a set of new weights from the host takes to stage, alone
  and under load, beside torch's own copy.

On CUDA each row of runs is there with CUDA graphs, and with one launcher for all lanes, too. Every
row is measured in each round, so that what else the machine does falls on all.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import math
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import aoti_sched
from aoti_sched import DeviceConfig, SchedulerConfig
from aoti_sched.backends.aoti.torch_runner import stock_runner
from aoti_sched.package import open_package

from . import models
from .clients import ask, served
from .measure import this_machine

if TYPE_CHECKING:
    from aoti_sched import Scheduler

INSTANCES = (1, 2, 4, 8)
CLIENTS = 4
"""For each instance."""
BUSY = 8
"""Clients while weights are exchanged."""


@dataclass(frozen=True)
class Bench:
    """What is measured, and for how long: `seconds` for each row in each of the `rounds`, and
    so many `updates`.
    """

    device: str
    seconds: float
    rounds: int
    updates: int

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.kind == "cuda" else self.device

    def package(self, model: str) -> Any:
        return models.ensure(model, "pt2" if self.kind == "cpu" else f"{self.kind}.pt2")

    def example(self, model: str) -> torch.Tensor:
        return models.example(model).to(self.device)

    def synchronize(self) -> None:
        if self.kind != "cpu":
            torch.accelerator.synchronize(self.device)

    def stock(self, model: str) -> Callable[[], Any]:
        package = open_package(self.package(model))
        library = package.extract(package.model(None), None).library
        runner, inputs = stock_runner(self.device, library, 1), [self.example(model)]
        return lambda: runner.run(inputs)


@dataclass(frozen=True)
class Way:
    """How this library serves."""

    name: str
    scheduler: Scheduler
    options: dict[str, Any]


@asynccontextmanager
async def ways(bench: Bench) -> AsyncIterator[list[Way]]:
    """All there are on a device."""
    cuda = bench.kind == "cuda"
    options: dict[str, Any] = {"device": bench.device}
    if bench.kind == "cpu":
        options["placement"] = "lane"
    found = []
    async with AsyncExitStack() as stack:
        for launchers in (None, 1) if cuda else (None,):
            lanes = None if bench.kind in ("cpu", "mps") else max(INSTANCES)
            config = SchedulerConfig(
                devices={bench.device: DeviceConfig(lanes=lanes, launchers=launchers)}
            )
            scheduler = await stack.enter_async_context(aoti_sched.Scheduler(config))
            name = "aoti_sched" if launchers is None else "aoti_sched, one launcher"
            found.append(Way(name, scheduler, options))
            if cuda:
                found.append(
                    Way(f"{name}, CUDA graphs", scheduler, {**options, "cuda_graphs": True})
                )
        yield found


Row = tuple[str, Callable[[float], Any]]
"""What it is, and what measures it for so many seconds: runs per second."""


def looped(
    run: Callable[[], Any], synchronize: Callable[[], None], seconds: float, *, waits: bool
) -> float:
    """Runs per second of a bare loop that waits for the device after each, or at the end."""
    synchronize()
    started = time.perf_counter()
    runs = 0
    while time.perf_counter() < started + seconds:
        run()
        runs += 1
        if waits or runs % 100 == 0:  # a queue that only grows is not throughput
            synchronize()
    synchronize()
    return runs / (time.perf_counter() - started)


async def compared(
    bench: Bench,
    what: str,
    unit: str,
    rows: Sequence[Row],
    tell: Callable[[float, float], tuple[str, float]],
) -> list[str]:
    """The median of each row over the rounds, in each of which another one begins.

    `tell` makes of a rate and the first row's what is shown, and their ratio.
    """
    measured: list[list[float]] = [[] for _ in rows]
    for turn in range(bench.rounds):
        for number in [(turn + one) % len(rows) for one in range(len(rows))]:
            found = rows[number][1](bench.seconds)
            measured[number].append(await found if asyncio.iscoroutine(found) else found)
    medians = [statistics.median(row) for row in measured]
    lines = []
    for (name, _), rate in zip(rows, medians, strict=True):
        shown, ratio = tell(rate, medians[0])
        lines.append((name, shown, f"{ratio:.2f} times"))
    return table((what, unit, "beside the bare loop"), lines)


async def one_client(bench: Bench, served_by: Sequence[Way]) -> list[str]:
    stock = bench.stock("deep")
    rows: list[Row] = [
        ("torch's runner, a bare loop", lambda s: looped(stock, bench.synchronize, s, waits=True))
    ]
    x = bench.example("deep")
    for way in served_by:
        runner = await way.scheduler.load(bench.package("deep"), name=way.name, **way.options)
        rows.append((way.name, functools.partial(served, functools.partial(runner.run, x), 1)))
    return await compared(
        bench,
        "one client",
        "µs per request",
        rows,
        lambda rate, first: (f"{1e6 / rate:.1f}", first / rate),
    )


async def throughput(bench: Bench, served_by: Sequence[Way]) -> list[str]:
    stock = bench.stock("deep")
    rows: list[Row] = [
        (
            "torch's runner, a bare loop that does not wait",
            lambda s: looped(stock, bench.synchronize, s, waits=False),
        )
    ]
    x = bench.example("deep")
    for way in served_by:
        for instances in INSTANCES:
            name = f"{way.name}, {instances} instance{'s' * (instances > 1)}"
            runner = await way.scheduler.load(
                bench.package("deep"), name=name, instances=instances, **way.options
            )
            run = functools.partial(runner.run, x)
            rows.append((name, functools.partial(served, run, CLIENTS * instances)))
    return await compared(
        bench,
        "throughput",
        "requests per second",
        rows,
        lambda rate, first: (f"{rate:,.0f}", rate / first),
    )


async def weights(bench: Bench, served_by: Sequence[Way]) -> list[str]:
    """Two sets on the host, exchanged again and again."""
    runner = await served_by[0].scheduler.load(
        bench.package("large"), name="large", device=bench.device, instances=4
    )
    first = {name: tensor.cpu() for name, tensor in (await runner.extract()).items()}
    sets = [first, {name: tensor * 0.5 for name, tensor in first.items()}]
    size = sum(tensor.nbytes for tensor in first.values())

    def copy() -> float:
        began = time.perf_counter()
        there = [tensor.to(bench.device, copy=True) for tensor in first.values()]
        bench.synchronize()
        del there
        return time.perf_counter() - began

    async def update() -> list[aoti_sched.UpdateReport]:
        return [await runner.update(sets[number % 2]) for number in range(bench.updates)]

    copied = [copy() for _ in range(bench.updates)]
    alone = await update()
    x = bench.example("large")
    run = functools.partial(runner.run, x)
    clients = [asyncio.ensure_future(ask(run, math.inf)) for _ in range(BUSY)]
    busy = await update()
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    pauses = [report.pause_seconds for report in busy]
    stagings = {
        "torch's own copy": copied,
        "staged, nothing runs": [report.stage_seconds for report in alone],
        f"staged, {BUSY} clients": [report.stage_seconds for report in busy],
    }
    staged = [
        (name, f"{size / statistics.median(seconds) / 1e9:.2f}")
        for name, seconds in stagings.items()
    ]
    paused = [
        (f"median of {len(pauses)}", f"{1e3 * statistics.median(pauses):.3f}"),
        ("longest", f"{1e3 * max(pauses):.3f}"),
    ]
    return [
        *table((f"{size / 1e6:.0f} MB of weights from the host", "GB/s"), staged),
        "",
        *table((f"the pause of a swap, {BUSY} clients, 4 instances", "ms"), paused),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


async def measure(bench: Bench) -> str:
    """All tables."""
    lines = [f"{bench.name}. {this_machine()}.", ""]
    for part in (one_client, throughput, weights):
        async with ways(bench) as served_by:
            lines += [*await part(bench, served_by), ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.devices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("device", help="cuda:0, xpu:0, mps; or cpu, to see that all works")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="for each row in each round (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, default=20, help="of the weights (default: %(default)s)"
    )
    print(asyncio.run(measure(Bench(**vars(parser.parse_args(argv))))))


if __name__ == "__main__":
    main()
