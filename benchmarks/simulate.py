"""What the rules of `aoti_sched.queue` do under load: the very same core in virtual time, on
requests that are drawn from a seed.

Work comes at a multiple of what the devices can do, and is served by first come, first served, and
by one rule more each time. Nothing is loaded and no run takes any time: a million requests take
about a minute. What the simulator leaves out is all that is not in the core: the event loop, hops
between threads, and that runs on neighbouring cores slow each other down.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

from aoti_sched.recording import Recording

from .report import number
from .simulation import RULES, TRACES, Outcome, Requests, Rules, Scenario, Simulation, measure

WIDTH = 120
"""Columns, where the output is no terminal."""

PARTS = 12
"""At most so many models or tenants have a bar each."""


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them; "none" is none."""
    return () if text == "none" else tuple(float(word) for word in text.split(","))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    usual = Scenario()
    rules = "\n".join(f"  {rules.name:<12}{rules.note}" for rules in RULES.values())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=f"{(__doc__ or '').strip()}\n\npolicies, each with one rule more than the one "
        f"before (the last two than the default):\n{rules}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--policies", default=",".join(RULES), help="(default: %(default)s)")
    add(
        "--load",
        type=numbers,
        default=(0.5, 0.9, 1.0, 2.0, 5.0),
        metavar="LOADS",
        help="work that comes as multiples of what all lanes can do (default: 0.5,0.9,1,2,5)",
    )
    add(
        "--requests",
        type=int,
        default=usual.requests,
        help="in each simulation (default: %(default)s)",
    )
    add("--trace", choices=TRACES, default=usual.trace, help="(default: %(default)s)")
    add("--devices", type=int, default=usual.devices, help="(default: %(default)s)")
    add("--lanes", type=int, default=usual.lanes, help="of each device (default: %(default)s)")
    add("--models", type=int, default=usual.models, help="(default: %(default)s)")
    add(
        "--skew",
        type=float,
        default=usual.skew,
        help="Zipf's exponent of their popularity (default: %(default)s)",
    )
    add("--even", action="store_true", help="popularity is of work, and not of requests")
    add(
        "--runs",
        type=numbers,
        default=usual.runs,
        metavar="FROM,TO",
        help="seconds, of models' mean runs (default: 0.001,0.05)",
    )
    add(
        "--spread",
        type=float,
        default=usual.spread,
        help="log-normal sigma of single runs (default: %(default)s)",
    )
    add(
        "--shares",
        type=numbers,
        default=usual.shares,
        help="of the models, in turn (default: all alike)",
    )
    add("--tenants", type=int, default=usual.tenants, help="(default: %(default)s)")
    add(
        "--tenant-skew",
        type=float,
        default=usual.tenant_skew,
        help="Zipf's exponent of what they ask for (default: %(default)s)",
    )
    add(
        "--timeouts",
        type=numbers,
        default=usual.timeouts,
        help="seconds, one drawn for each request; or none (default: 0.1,0.5,2)",
    )
    add(
        "--classes",
        type=numbers,
        default=usual.classes,
        help="parts of high, normal, low priority (default: 0.1,0.6,0.3)",
    )
    add(
        "--bounds",
        type=numbers,
        default=usual.bounds,
        metavar="MODEL,DEVICE",
        help="how many requests each may have queued (default: 1024,4096)",
    )
    add("--max-wait", type=float, help="seconds after which a request is overdue (default: never)")
    add("--seed", type=int, default=usual.seed, help="(default: %(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="write a picture there")
    add(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="write the last policy at the last load as a timeline, which Perfetto opens",
    )
    add("--name", default="overload", help="the picture's (default: %(default)s)")
    add(
        "--parts",
        choices=("model", "tenant"),
        help="draw what each of them got, at the last load, instead",
    )
    options = parser.parse_args(argv)
    options.policies = [name for name in options.policies.split(",") if name]
    if unknown := [name for name in options.policies if name not in RULES]:
        parser.error(f"there is no policy {' and no '.join(map(repr, unknown))}, but {list(RULES)}")
    for name, least, most in (
        ("requests", 100, None),
        ("devices", 1, 256),
        ("lanes", 1, None),
        ("models", 1, None),
        ("tenants", 1, None),
    ):
        value = getattr(options, name)
        if value < least or (most is not None and value > most):
            parser.error(
                f"--{name} {value}: at least {least}" + (f", at most {most}" if most else "")
            )
    for name, count in (("runs", 2), ("bounds", 2), ("classes", 3)):
        if len(getattr(options, name)) != count:
            parser.error(f"--{name}: {count} numbers")
    if not options.load or min(options.load) <= 0.0:
        parser.error("--load: positive numbers")
    if options.parts and getattr(options, f"{options.parts}s") > PARTS:
        parser.error(f"--parts {options.parts}: at most {PARTS} of them")
    return options


def scenario_of(options: argparse.Namespace, load: float) -> Scenario:
    return Scenario(
        requests=options.requests,
        load=load,
        trace=options.trace,
        devices=options.devices,
        lanes=options.lanes,
        models=options.models,
        tenants=options.tenants,
        skew=options.skew,
        tenant_skew=options.tenant_skew,
        even=options.even,
        runs=options.runs,
        spread=options.spread,
        timeouts=options.timeouts,
        classes=options.classes,
        shares=options.shares,
        bounds=(int(options.bounds[0]), int(options.bounds[1])),
        seed=options.seed,
    )


def simulate(options: argparse.Namespace, tell: Callable[[str], None]) -> list[Outcome]:
    """All policies on the same requests, load after load."""
    outcomes = []
    for load in options.load:
        requests = Requests(scenario_of(options, load))
        for name in options.policies:
            tell(f"{name} at {load:g}x")
            rules = RULES[name]
            policy = replace_max_wait(rules, options.max_wait)
            last = (load, name) == (options.load[-1], options.policies[-1])
            recording = Recording(options.requests) if last and options.timeline else None
            simulation = Simulation(requests, policy, recording)
            simulation.run()
            if recording is not None:
                recording.save(options.timeline)
            outcomes.append(measure(simulation))
    return outcomes


def replace_max_wait(rules: Rules, max_wait: float | None) -> Rules:
    import msgspec

    return (
        rules
        if max_wait is None
        else replace(rules, policy=msgspec.structs.replace(rules.policy, max_wait=max_wait))
    )


def about(scenario: Scenario) -> str:
    """In words."""

    def several(count: int, what: str) -> str:
        return f"{count:,} {what}{'s' if count > 1 else ''}"

    times = "no timeouts"
    if scenario.timeouts:
        timeouts = ", ".join(f"{1e3 * t:g}" for t in scenario.timeouts)
        times = f"timeouts of {timeouts} ms and three mean runs"
    low, high = scenario.runs
    runs = f"{1e3 * low:g}" if low == high else f"{1e3 * low:g} to {1e3 * high:g}"
    bounds = ""
    if scenario.bounds != Scenario.bounds:
        each = " and ".join(f"{most:,}" for most in dict.fromkeys(scenario.bounds))
        bounds = f", at most {each} queued"
    return (
        f"{scenario.trace}: {several(scenario.requests, 'request')} at each load, "
        f"{several(scenario.devices, 'device')} of "
        f"{several(scenario.lanes, 'lane')}, {several(scenario.models, 'model')} with runs of "
        f"{runs} ms, {times}{bounds}; "
        f"seed {scenario.seed}"
    )


HEADINGS = (
    "goodput",
    "useful",
    "busy",
    "high",
    "normal",
    "low",
    "p50 ms",
    "p99 ms",
    "Jain",
    "least",
    "refused",
    "expired",
    "shed",
)


def table(outcomes: Sequence[Outcome], title: str) -> Any:
    from rich import box
    from rich.table import Table

    found = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    found.add_column("load", justify="right")
    found.add_column("policy", no_wrap=True)
    for heading in HEADINGS:
        found.add_column(heading, justify="right", no_wrap=True)
    before = None
    for outcome in outcomes:
        load = outcome.scenario.load
        if before not in (None, load):
            found.add_section()
        ends = [
            outcome.ends.get(end, 0) / outcome.scenario.requests
            for end in ("REJECTED", "EXPIRED", "SHED")
        ]
        found.add_row(
            f"{load:g}x" if before != load else "",
            outcome.rules,
            f"{outcome.goodput:.2f}",
            f"{outcome.useful:.1%}",
            f"{outcome.busy:.1%}",
            *("" if isnan(part) else f"{part:.0%}" for part in outcome.kept),
            *(
                "" if isnan(seconds) else number(seconds * 1e3)
                for seconds in (outcome.p50, outcome.p99)
            ),
            f"{outcome.jain:.3f}",
            f"{outcome.least:.2f}",
            *(f"{part:.1%}" for part in ends),
        )
        before = load
    return found


EXPLAINED = """\
goodput: answers in time per second, of those of this mix that all lanes can run.
useful: device time that went into them; busy: into any run.
high, normal, low: requests of that class answered in time.
Jain, least: device time that models got, of what they should have by their shares:
Jain's index (1: all alike), and the tenth of the models that got least.
refused, expired, shed: of all requests."""


def main(argv: Sequence[str] | None = None) -> None:
    from rich.console import Console

    from .simulation_picture import draw_overload, draw_parts

    options = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    started = time.perf_counter()
    with console.status("") as status:
        outcomes = simulate(options, status.update)
    took = time.perf_counter() - started
    title = about(outcomes[0].scenario)
    console.print(table(outcomes, title))
    console.print(EXPLAINED, style="dim", highlight=False, soft_wrap=True)
    count = len(outcomes) * options.requests
    told = f"{count:,} requests in {took:.0f} s: {took / count * 1e6:.0f} s for a million"
    console.print(told, highlight=False)
    if options.timeline is not None:
        console.print(f"Timeline: {options.timeline}", soft_wrap=True, highlight=False)
    if options.out is not None:
        path = options.out / f"{options.name}.png"
        if options.parts:
            last = [outcome for outcome in outcomes if outcome.scenario.load == options.load[-1]]
            draw_parts(last, options.parts, f"at {options.load[-1]:g}x", path)
        else:
            draw_overload(outcomes, title, path)
        console.print(f"Picture: {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
