"""The results for people and programs: tables of medians and ratios, what was wanted beside it,
and JSON.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plan import Figure, Measured, Target

if TYPE_CHECKING:
    from rich.console import Console

    from .measure import Machine


@dataclass(frozen=True)
class Result:
    """One entrant's repetitions.

    The table shows their medians, and the best of the first figure.
    """

    name: str
    note: str
    repetitions: list[Measured]

    def median(self, field: str) -> float:
        return statistics.median(measured.figures[field] for measured in self.repetitions)

    def best(self, figure: Figure) -> float:
        choose = max if figure.more_is_better else min
        return choose(measured.figures[figure.field] for measured in self.repetitions)


@dataclass(frozen=True)
class Verdict:
    """What was wanted, and what was measured: of the medians, which count, and of the best
    repetitions.

    None where an entrant was left out.
    """

    target: Target
    measured: float | None
    best: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        target = self.target
        return (target.most is None or self.measured <= target.most) and (
            target.least is None or self.measured >= target.least
        )


@dataclass(frozen=True)
class Part:
    """One workload's results. `baseline` names the result that the others are held against."""

    key: str
    title: str
    figures: tuple[Figure, ...]
    baseline: str | None
    targets: list[Target]
    results: list[Result]
    left_out: dict[str, list[str]]
    """Entrants that are missing here, and the packages that they would need."""

    def result(self, name: str | None) -> Result | None:
        return next((result for result in self.results if result.name == name), None)

    def figure(self, field: str) -> Figure:
        return next(figure for figure in self.figures if figure.field == field)

    def ratio(self, result: Result, field: str) -> float | None:
        """The figure's median as a multiple of the baseline's; None where there is no baseline."""
        base = self.result(self.baseline)
        return None if base is None else _quotient(result.median(field), base.median(field))

    @property
    def others(self) -> list[float]:
        """The share of all cores that other processes took, in each measurement."""
        return [repetition.others for result in self.results for repetition in result.repetitions]

    def verdicts(self) -> list[Verdict]:
        return [self._verdict(target) for target in self.targets]

    def _verdict(self, target: Target) -> Verdict:
        result, base = self.result(target.entrant), self.result(target.against)
        if result is None or (target.against is not None and base is None):
            return Verdict(target, None, None)
        figure = self.figure(target.figure)
        median, best = result.median(figure.field), result.best(figure)
        if base is not None:
            other = figure if target.of is None else self.figure(target.of)
            return Verdict(
                target,
                _quotient(median, base.median(other.field)),
                _quotient(best, base.best(other)),
            )
        return Verdict(target, median, best)


@dataclass(frozen=True)
class Report:
    """A whole run of the benchmarks."""

    machine: Machine
    settings: dict[str, Any]
    parts: list[Part] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where and when, and how much was going on there otherwise."""
        shares = [share for part in self.parts for share in part.others]
        return f"{self.machine}; {disturbance(shares)}"


def print_part(console: Console, part: Part) -> None:
    """A table of medians over the repetitions, with the best one of the first figure and its
    ratio to the baseline.
    """
    from rich.table import Table

    first, *others = part.figures
    count = max((len(result.repetitions) for result in part.results), default=0)
    table = Table(title=part.title, title_justify="left", caption=_caption(part, count))
    table.add_column("", no_wrap=True)
    table.add_column(first.heading, justify="right")
    if count > 1:
        table.add_column("best", justify="right")
    if part.baseline:
        table.add_column(f"÷ {part.baseline}", justify="right")
    for figure in others:
        table.add_column(figure.heading, justify="right")
    for result in part.results:
        row = [number(result.median(first.field) * first.unit)]
        if count > 1:
            row.append(number(result.best(first) * first.unit))
        if part.baseline:
            row.append(number(part.ratio(result, first.field)))
        row.extend(number(result.median(figure.field) * figure.unit) for figure in others)
        table.add_row(result.name, *row)
    console.print(table)
    for name, packages in part.left_out.items():
        console.print(f"{name} was left out: {', '.join(packages)} not installed", style="yellow")
    console.print()


def print_verdicts(console: Console, report: Report) -> None:
    """Everything that was wanted, beside what was measured."""
    from rich.table import Table

    table = Table(title="what is wanted", title_justify="left")
    table.add_column("")
    for heading in ("wanted", "measured", "of bests"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    words = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}
    for part in report.parts:
        for verdict in part.verdicts():
            sentence = f"({part.key}) {verdict.target.sentence}"
            numbers = (
                wanted(part, verdict),
                told(part, verdict, verdict.measured),
                told(part, verdict, verdict.best),
            )
            table.add_row(sentence, *numbers, words[verdict.met])
    console.print(table)
    console.print(report.place, style="dim", highlight=False)


def wanted(part: Part, verdict: Verdict) -> str:
    target, unit = verdict.target, _unit(part, verdict.target)
    if target.most is not None:
        return f"≤ {number(target.most * unit)}"
    return f"≥ {number((target.least or 0.0) * unit)}"


def told(part: Part, verdict: Verdict, value: float | None) -> str:
    """A number that was measured, in the target's unit."""
    return "left out" if value is None else number(value * _unit(part, verdict.target))


def write_json(report: Report, path: Path) -> None:
    """All figures, those of single repetitions too, in seconds, bytes and counts."""
    parts = [
        {
            "key": part.key,
            "title": part.title,
            "baseline": part.baseline,
            "left_out": part.left_out,
            "results": [
                {
                    "name": result.name,
                    "note": result.note,
                    "median": {name: result.median(name) for name in result.repetitions[0].figures},
                    "ratios": {
                        name: part.ratio(result, name) for name in result.repetitions[0].figures
                    },
                    "repetitions": [asdict(repetition) for repetition in result.repetitions],
                }
                for result in part.results
            ],
            "targets": [{**asdict(verdict), "met": verdict.met} for verdict in part.verdicts()],
        }
        for part in report.parts
    ]
    document = {"machine": asdict(report.machine), "settings": report.settings, "parts": parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def number(value: float | None) -> str:
    """Three digits that matter, thousands apart; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _caption(part: Part, count: int) -> str:
    best = "most" if part.figures[0].more_is_better else "least"
    repeated = f"medians of {count} repetitions; best: the {best}" if count > 1 else "one run"
    return f"{repeated}; {disturbance(part.others)}"


def disturbance(others: list[float]) -> str:
    """How much other processes were in the way, in words."""
    if not others:
        return "nothing measured"
    median = statistics.median(others)
    return f"others took {median:.0%} of the cores (median; at most {max(others):.0%})"


def _unit(part: Part, target: Target) -> float:
    """A ratio has none; a bound on a figure itself is told in the figure's unit."""
    if target.against is not None:
        return 1.0
    return part.figure(target.figure).unit


def _quotient(value: float, base: float) -> float | None:
    return value / base if base else None
