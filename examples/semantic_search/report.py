"""What was observed, for people: tables in the terminal, and a picture of the latencies over
time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .digits import Digits, draw
from .serving import INDEX_BATCH, Observed, Sample

# Each kind of request: who answers it and what it holds, and the colour of its dots.
KINDS = {
    "index": (f"encoder: {INDEX_BATCH} sentences", "#8a8a8a"),
    "search": ("encoder: 1 query", "#2a6fbb"),
    "digit": ("classifier: 1 digit", "#d9730d"),
}
LAG_COLOUR = "#3d8c40"
DRAWN_DIGITS = 4


def percentile(seconds: Sequence[float], percent: float) -> float:
    """A percentile of some durations, in milliseconds."""
    return float(np.percentile(seconds, percent)) * 1e3


def milliseconds(seconds: Sequence[float], percent: float) -> str:
    value = percentile(seconds, percent)
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def of_kind(samples: Sequence[Sample], work: str) -> list[Sample]:
    return [sample for sample in samples if sample.work == work]


def requests_table(samples: Sequence[Sample]) -> Table:
    table = Table(
        title="Requests",
        caption="ms from request to answer; queue: what of it was spent waiting for a lane.\n"
        "The digits have priority over everything that waits.",
    )
    table.add_column("model and request")
    for heading in ("requests", "per s", "latency\np50", "\np99", "queue\np50", "\np99"):
        table.add_column(heading, justify="right")
    for work, (name, colour) in KINDS.items():
        chosen = of_kind(samples, work)
        span = max(s.answered for s in chosen) - min(s.asked for s in chosen)
        latencies, waits = [s.latency for s in chosen], [s.waited for s in chosen]
        table.add_row(
            Text(name, style=colour),
            f"{len(chosen):,}",
            f"{len(chosen) / span:,.0f}",
            *(
                milliseconds(values, percent)
                for values in (latencies, waits)
                for percent in (50, 99)
            ),
        )
    return table


def lag_table(lags: Sequence[tuple[float, float]]) -> Table:
    table = Table(title="Event loop: how late a sleep of 1 ms woke up", min_width=52)
    for heading in ("wake-ups", "p50 ms", "p99 ms", "max ms"):
        table.add_column(heading, justify="right")
    late = [lag for _, lag in lags]
    table.add_row(f"{len(late):,}", *(milliseconds(late, percent) for percent in (50, 99, 100)))
    return table


def answers_table(observed: Observed, expected: Mapping[str, str]) -> Table:
    right = sum(hits[0].sentence == expected[query] for query, hits in observed.answers.items())
    table = Table(
        title="Search: each query's three nearest sentences",
        caption=f"✓ is the answer a reader would pick: it came first for {right} of "
        f"{len(expected)} queries",
        show_header=False,
        box=box.ROUNDED,
    )
    for column, width in (("is expected", 1), ("score", 4), ("sentence", 60)):
        table.add_column(column, min_width=width)
    for query, answer in expected.items():
        table.add_row("", "", Text(query, style="bold"))
        for rank, hit in enumerate(observed.answers[query], start=1):
            tick = "✓" if hit.sentence == answer else ""
            last = rank == len(observed.answers[query])
            style = "" if rank == 1 else "dim"
            table.add_row(tick, f"{hit.score:.2f}", hit.sentence, style=style, end_section=last)
    return table


def digits_panel(observed: Observed, digits: Digits) -> Panel:
    """How many digits were read correctly, and the drawings of a few; of a misread one too, if
    there is one.
    """
    labels = digits.labels.tolist()
    misread = [(n, read) for n, read in observed.readings if read != labels[n]]
    right = len(observed.readings) - len(misread)
    shown = [reading for reading in observed.readings if reading not in misread][
        :DRAWN_DIGITS
    ] + misread[:1]
    drawings = []
    for n, read in shown:
        verdict = f"says {read}" if read == labels[n] else f"says {read}, is {labels[n]}"
        drawings.append(Panel(draw(digits.images[n]), title=verdict, width=20))
    return Panel(
        Columns(drawings),
        title=f"Digits: {right:,} of {len(observed.readings):,} served ones were read correctly",
        subtitle=f"over all {len(labels)} held-out digits the classifier's accuracy is "
        f"{observed.held_out_accuracy:.1%}",
    )


def print_report(
    console: Console, observed: Observed, expected: Mapping[str, str], digits: Digits
) -> None:
    for part in (
        answers_table(observed, expected),
        digits_panel(observed, digits),
        requests_table(observed.samples),
        lag_table(observed.lags),
    ):
        console.print(part)
        console.print()


def draw_latencies(observed: Observed, path: Path) -> None:
    """Write a PNG: the latency of each request over time, and below it the loop's lag."""
    start = min(sample.asked for sample in observed.samples)
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for work, (name, colour) in KINDS.items():
        chosen = of_kind(observed.samples, work)
        latencies = [s.latency for s in chosen]
        times = f"p50 {milliseconds(latencies, 50)} ms, p99 {milliseconds(latencies, 99)} ms"
        top.scatter(
            [s.asked - start for s in chosen],
            [latency * 1e3 for latency in latencies],
            s=9,
            alpha=0.45,
            linewidths=0,
            color=colour,
            label=f"{name} ({times})",
        )
    top.set_yscale("log")
    top.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    top.set_ylabel("latency, request to answer (ms)")
    legend = top.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, markerscale=2)
    for handle in legend.legend_handles:
        handle.set_alpha(1)

    when, late = [at - start for at, _ in observed.lags], [lag * 1e3 for _, lag in observed.lags]
    bottom.scatter(when, late, s=3, alpha=0.4, linewidths=0, color=LAG_COLOUR)
    bottom.margins(x=0.01)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("event-loop lag (ms)")
    bottom.set_xlabel("time since the first request (s)")
    for axes in (top, bottom):
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
