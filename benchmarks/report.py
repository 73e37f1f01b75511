"""A benchmark's results for people: a table of medians and ratios, the figures as JSON, a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .measure import Machine

COLOURS = ("#8a8a8a", "#d9730d", "#2a6fbb", "#b03a48")


@dataclass(frozen=True)
class Result:
    """One contestant: medians over the repetitions, each repetition's figures, and the last one's lags. Seconds."""

    name: str
    note: str
    median: dict[str, float]
    repetitions: list[dict[str, float]]
    lags: list[float]


@dataclass(frozen=True)
class Report:
    """A whole benchmark. `baseline` names the result that the others are held against."""

    title: str
    machine: Machine
    settings: dict[str, Any]
    baseline: str
    results: list[Result]

    def ratio(self, result: Result, figure: str) -> float | None:
        """The figure as a multiple of the baseline's; None where that says nothing."""
        base = next(r for r in self.results if r.name == self.baseline).median[figure]
        value = result.median[figure]
        return value / base if base and value else None


def print_table(console: Console, report: Report) -> None:
    from rich.table import Table

    letter = report.baseline.split()[0]
    seconds, repetitions = report.settings["seconds"], report.settings["repetitions"]
    table = Table(
        title=report.title, caption=f"lag: ms; medians of {repetitions} repetitions of {seconds:g} s"
    )
    table.add_column("contestant", no_wrap=True)
    for heading in ("runs/s", f"÷ {letter}", "lag p50", "p99", f"÷ {letter}", "max"):
        table.add_column(heading, justify="right")
    for result in report.results:
        median = result.median
        rate = median["runs_per_second"]
        table.add_row(
            result.name,
            f"{rate:.1f}" if rate else "",
            _multiple(report.ratio(result, "runs_per_second")),
            _milliseconds(median["lag_p50"]),
            _milliseconds(median["lag_p99"]),
            _multiple(report.ratio(result, "lag_p99")),
            _milliseconds(median["lag_max"]),
        )
    console.print(table)
    for result in report.results:
        console.print(f"{result.name}: {result.note}", style="dim", highlight=False)
    console.print(str(report.machine), style="dim", highlight=False)


def write_json(report: Report, path: Path) -> None:
    """All figures (seconds), each repetition's too; not the single lags."""
    results = [
        {
            "name": result.name,
            "note": result.note,
            "median": result.median,
            "ratios": {figure: report.ratio(result, figure) for figure in result.median},
            "repetitions": result.repetitions,
        }
        for result in report.results
    ]
    document = {
        "title": report.title,
        "machine": asdict(report.machine),
        "settings": report.settings,
        "baseline": report.baseline,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(report: Report, path: Path) -> None:
    """Write a PNG: every lag of the last repetition on a logarithmic axis, and beside it the runs per second."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    chance = np.random.default_rng(0)
    rows = range(len(report.results))
    for row, (result, colour) in enumerate(zip(report.results, COLOURS, strict=True)):
        lags = np.maximum(np.array(result.lags) * 1e3, 0.01)
        heights = row + chance.uniform(-0.13, 0.13, len(lags))
        left.scatter(lags, heights, s=7, alpha=0.25, linewidths=0, color=colour)
        for name, width in (("lag_p50", 1), ("lag_p99", 3), ("lag_max", 1)):
            value = max(result.median[name] * 1e3, 0.01)
            left.plot([value, value], [row - 0.25, row + 0.25], color="black", linewidth=width)
        rate = result.median["runs_per_second"]
        right.barh(row, rate, height=0.4, color=colour)
        right.annotate(
            f"{rate:.1f}" if rate else "",
            (rate, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    left.set_xscale("log")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_xlabel(
        "lag of the event loop: how late a sleep of 1 ms woke up (ms); bars: p50, p99 (bold), max"
    )
    left.set_yticks(rows, [_summary(result) for result in report.results], linespacing=1.4)
    left.set_ylim(len(report.results) - 0.5, -0.5)
    right.set_xlabel("runs per second")
    right.margins(x=0.25)
    right.tick_params(left=False)
    for axes in (left, right):
        axes.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report.title, fontsize=13)
    figure.supxlabel(str(report.machine), fontsize=8.5, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _summary(result: Result) -> str:
    p50, p99, most = (_milliseconds(result.median[name]) for name in ("lag_p50", "lag_p99", "lag_max"))
    return f"{result.name}\n{result.note}\np50 {p50}, p99 {p99}, max {most} ms"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _multiple(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
