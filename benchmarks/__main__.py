"""All benchmarks in one run, side by side: tables with ratios, and the figures as JSON and PNG.

See README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from . import models
from .measure import this_machine
from .picture import draw
from .plan import QUICK, Entrant, Measured, Scale, Workload
from .report import Part, Report, Result, print_part, print_verdicts, write_json
from .workers import Worker
from .workloads import programme

WIDTH = 100
"""Columns, where the output is no terminal."""

QUIET = 0.1
"""Others may take so much of all cores during a measurement; a clock tick of 0.25 s on two
cores is 0.02.
"""

CLOSE = 1e-3
"""How far two contestants' answers may lie apart."""


def run(
    workload: Workload, scale: Scale, entrants: Sequence[Entrant], tell: Callable[[str], None]
) -> Part:
    """Every entrant in every repetition, the first one changing, so that what else the machine
    does falls on all.

    A measurement that others disturbed is made again at the end, for up to half as many as there
    are.
    """
    present = [entrant for entrant in entrants if not entrant.missing]
    for name, kind in dict.fromkeys(file for entrant in present for file in entrant.files):
        tell(f"making the {name} model's {kind}, once")
        models.ensure(name, kind)
    measured: dict[str, list[Measured]] = {entrant.name: [] for entrant in present}
    seconds = workload.seconds * scale.pace
    with ExitStack() as stack:
        tell("starting a process for each")
        workers = [stack.enter_context(Worker(workload.key, e.name, scale)) for e in present]
        must_agree({worker.name: worker.opened() for worker in workers})
        for worker in workers if workload.warm_up else ():
            tell(f"warming up {worker.name}")
            worker.measure(workload.warm_up * scale.pace)
        repetitions = scale.repetitions if workload.repeated else 1
        turns = deque(
            worker for n in range(repetitions) for worker in rotated(workers, n, repetitions)
        )
        spare = len(turns) // 2 if workload.repeated else 0
        while turns:
            worker = turns.popleft()
            tell(f"{worker.name}, {len(turns)} measurements to go")
            repetition = worker.measure(seconds)
            if repetition.others > QUIET and spare:
                spare -= 1
                turns.append(worker)
            else:
                measured[worker.name].append(repetition)
    return Part(
        key=workload.key,
        title=workload.title,
        figures=workload.figures,
        baseline=workload.baseline,
        targets=workload.targets(scale),
        results=[Result(e.name, e.note, measured[e.name]) for e in present],
        left_out={e.name: list(e.missing) for e in entrants if e.missing},
    )


def rotated(workers: list[Worker], repetition: int, repetitions: int) -> list[Worker]:
    """The same, another one first in each repetition."""
    first = repetition * len(workers) // repetitions
    return workers[first:] + workers[:first]


def must_agree(answers: dict[str, tuple[float, ...]]) -> None:
    """Raise RuntimeError unless all who answer give the same answer: else they did not do the
    same work.
    """
    told = {name: answer for name, answer in answers.items() if answer}
    for name, answer in told.items():
        first, expected = next(iter(told.items()))
        if any(abs(a - b) > CLOSE for a, b in zip(answer, expected, strict=True)):
            raise RuntimeError(f"{name} answers {answer}, {first} {expected}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    workloads = programme()
    about = "\n".join(workload.title for workload in workloads.values())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{(__doc__ or '').strip()}\n\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(
        dict.fromkeys(entrant.name for w in workloads.values() for entrant in w.entrants(Scale()))
    )
    add = parser.add_argument
    add(
        "--only",
        default=",".join(workloads),
        metavar="KEYS",
        help="workloads (default: %(default)s)",
    )
    add(
        "--contestant",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one; may be repeated",
    )
    add("--repetitions", type=int, help=f"per entrant (default: {Scale().repetitions})")
    add(
        "--quick",
        action="store_true",
        help="short measurements and small sizes: to see that all works",
    )
    add(
        "--json",
        type=Path,
        default=models.CACHE / "benchmarks.json",
        metavar="FILE",
        help="(%(default)s)",
    )
    add(
        "--png",
        type=Path,
        default=models.CACHE / "benchmarks.png",
        metavar="FILE",
        help="(%(default)s)",
    )
    options = parser.parse_args(argv)
    options.only = [key for key in options.only.split(",") if key]
    for given, known in ((options.only, list(workloads)), (options.contestant, names)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"there is no {' and no '.join(map(repr, unknown))}, but {known}")
    if options.repetitions is not None and options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: at least one")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    from rich.console import Console

    options = arguments(argv)
    scale = QUICK if options.quick else Scale()
    scale = replace(scale, repetitions=options.repetitions or scale.repetitions)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    report = Report(this_machine(), asdict(scale))
    started = time.monotonic()
    for key in options.only:
        workload = programme()[key]
        entrants = [
            e
            for e in workload.entrants(scale)
            if not options.contestant or e.name in options.contestant
        ]
        if not entrants:
            continue
        with console.status(workload.title) as status:

            def tell(what: str, title: str = workload.title) -> None:
                status.update(f"{title}: {what}")

            part = run(workload, scale, entrants, tell)
        report.parts.append(part)
        print_part(console, part)
    print_verdicts(console, report)
    write_json(report, options.json)
    draw(report, options.png)
    took = time.monotonic() - started
    told = f"Figures: {options.json}\nPicture: {options.png}\n{took:.0f} s in all"
    console.print(told, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
