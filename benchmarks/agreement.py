"""Whether `aoti-sched bench` measures what these benchmarks measure: one model under the same
clients, by both, in turn.

The benchmarks' clients do nothing but ask. Those of `bench` time each request, read every eighth
trace, and have the loop's lag sampled meanwhile, as a caller who looks would.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from aoti_sched.backends.cpu import available_cores

from . import models
from .contestants import AUTO
from .measure import this_machine
from .plan import Scale
from .workers import Worker


@dataclass(frozen=True)
class Case:
    """A workload of the benchmarks, and the same for `bench`.

    `figures` are the benchmarks' names, and where the report of `bench` has the same.
    """

    key: str
    model: str
    clients: int
    instances: int
    figures: dict[str, tuple[str, ...]]


def cases() -> dict[str, Case]:
    """The workloads that `bench` can make."""
    cores = available_cores()
    lag = {f"lag_{name}": ("lag", name) for name in ("p50", "p99")}
    found = (
        Case("a", "tiny", 1, cores, {name: ("latency", name) for name in ("p50", "p99")}),
        Case("b", "tiny", 64, cores, {"rate": ("throughput",)}),
        Case("c", "heavy", 8, cores, {"rate": ("throughput",), **lag}),
    )
    return {case.key: case for case in found}


def by_bench(case: Case, seconds: float) -> dict[str, float]:
    """What `aoti-sched bench` reports, and how often its clients were answered and failed."""
    command = [
        *(sys.executable, "-m", "aoti_sched", "bench", str(models.ensure(case.model, "pt2"))),
        *("--clients", str(case.clients), "--instances", str(case.instances), "--threads", "1"),
        *("--time", f"{seconds:g}s", "--warm-up", f"{min(1.0, seconds):g}s", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    (level,) = json.loads(done.stdout)["levels"]
    if level["failed"]:
        raise RuntimeError(f"requests failed: {level['failed']}")
    found = {}
    for name, path in case.figures.items():
        value = level
        for part in path:
            value = value[part]
        found[name] = float(value)
    return found


@dataclass(frozen=True)
class Line:
    """A figure as both measured it, in each repetition."""

    workload: str
    figure: str
    benchmarks: list[float]
    bench: list[float]

    @property
    def ratio(self) -> float:
        """Of the medians: what `bench` says, over what the benchmarks say."""
        return median(self.bench) / median(self.benchmarks)

    @property
    def ratio_of_best(self) -> float:
        """Of the best repetitions, which others on the machine disturbed least."""
        best = max if self.figure == "rate" else min
        return best(self.bench) / best(self.benchmarks)

    def __str__(self) -> str:
        parts = [f"({self.workload}) {self.figure:8}"]
        for name, values in (("benchmarks", self.benchmarks), ("bench", self.bench)):
            parts.append(f"{name} {median(values):.4g} ({min(values):.4g} to {max(values):.4g}),")
        parts.append(f"ratio {self.ratio:.3g}, of the best {self.ratio_of_best:.3g}")
        return " ".join(parts)


def compared(case: Case, repetitions: int, seconds: float) -> list[Line]:
    """One line for each figure, measured by both in turn."""
    lines = [Line(case.key, name, [], []) for name in case.figures]
    with Worker(case.key, AUTO.name, Scale()) as worker:
        worker.opened()
        worker.measure(min(1.0, seconds))
        for _ in range(repetitions):
            own, told = worker.measure(seconds).figures, by_bench(case, seconds)
            for line in lines:
                line.benchmarks.append(own[line.figure])
                line.bench.append(told[line.figure])
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--only", default="a,b,c", metavar="KEYS", help="(default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    known = cases()
    lines = []
    print(this_machine())
    for key in options.only.split(","):
        models.ensure(known[key].model, "pt2")
        for line in compared(known[key], options.repetitions, options.seconds):
            print(line, flush=True)
            lines.append(asdict(line))
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=2))


if __name__ == "__main__":
    main()
