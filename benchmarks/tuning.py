"""Whether `aoti-sched tune` finds settings as good as those of an exhaustive search, in a tenth of
its runs: on a real model, for the highest rate whose 99th percentile stays within a budget.

The exhaustive search halves the rates of each setting by real runs. The settings that it finds and
those of `tune` are then measured in turn, in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from aoti_sched.cli.loading import quiet
from aoti_sched.cli.measuring import RealMachine
from aoti_sched.cli.predicting import Candidate, Figures, Goal, words
from aoti_sched.cli.tuning import Axes, every, tune

from . import models
from .measure import this_machine

LOWEST, HIGHEST = 500.0, 32_000.0
"""Requests in a second between which the highest rate is looked for."""
HALVINGS = 6
"""By which that is found within 7 %."""


class Counted:
    """A machine whose confirmations are counted."""

    def __init__(self, machine: RealMachine) -> None:
        self._machine = machine
        self.cores = machine.cores
        self.timed = machine.timed
        self.runs = 0

    async def confirm(self, candidate: Candidate, rate: float) -> Figures:
        self.runs += 1
        return await self._machine.confirm(candidate, rate)


async def highest(machine: Counted, candidate: Candidate, budget: float) -> float:
    """The highest rate that keeps the budget, by halving; 0.0 for none."""
    low, high, found = LOWEST, HIGHEST, 0.0
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        if (await machine.confirm(candidate, middle)).p99 <= budget:
            low = found = middle
        else:
            high = middle
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    add = parser.add_argument
    add("--model", default="heavy", help="a model whose rows are free (default: %(default)s)")
    add("--p99", type=float, default=0.05, help="seconds (default: %(default)s)")
    add("--seconds", type=float, default=1.0, help="of each run (default: %(default)s)")
    add("--max-size", default="1,2,4,8,16,32")
    add("--tries", type=int, default=8)
    add("--repetitions", type=int, default=3, help="of the last comparison")
    add("--json", type=Path, metavar="FILE")
    asyncio.run(measured(parser.parse_args(argv)))


async def measured(options: argparse.Namespace) -> None:
    """Both searches, and then what they found, in turn."""
    quiet()
    goal = Goal(p99=options.p99, rate=LOWEST, maximize="throughput", poisson=True)
    package = models.ensure(options.model, "batch.pt2")
    real = RealMachine(package, None, goal, (0.2, options.seconds), ((), ("rows=1",), 0))
    await real.look()
    sizes = tuple(int(part) for part in options.max_size.split(","))
    chosen = {"threads": (1,), "instances": None, "max_size": sizes, "max_delay": (0.0, 0.002)}
    axes: Axes = await real.axes({**chosen, "placement": ("auto",)})
    print(this_machine())

    machine, began = Counted(real), time.monotonic()
    found = await tune(machine, axes, goal, tries=options.tries)
    if found.best is None:
        raise SystemExit("tune: no settings keep the budget")
    took = time.monotonic() - began
    print(f"tune: {words(found.best.candidate)}, {machine.runs} runs, {took:.0f} s", flush=True)

    exhaustive, began = Counted(real), time.monotonic()
    rates = {}
    for one in every(axes, real.cores):
        rates[one] = await highest(exhaustive, one, options.p99)
    best = max(rates, key=rates.__getitem__)
    took = time.monotonic() - began
    for one, rate in sorted(rates.items(), key=lambda pair: -pair[1]):
        print(f"  {words(one):50} {rate:.4g}/s")
    print(f"exhaustive: {words(best)}, {exhaustive.runs} runs, {took:.0f} s", flush=True)

    again: dict[str, list[float]] = {"tune": [], "exhaustive": []}
    for _ in range(options.repetitions):
        for name, one in (("tune", found.best.candidate), ("exhaustive", best)):
            again[name].append(await highest(exhaustive, one, options.p99))
    ratio = median(again["tune"]) / median(again["exhaustive"])
    print(f"again, in turn: {again}; ratio {ratio:.3g}")
    if options.json is not None:
        report = {"runs": machine.runs, "again": again, "ratio": ratio}
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
