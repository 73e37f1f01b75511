"""Pictures: latency and throughput at each load (`bench`), and of each setting (`tune`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aoti_sched.cli.load import Level
from aoti_sched.cli.predicting import Candidate, Figures, Goal, words
from aoti_sched.cli.tuning import Trial
from aoti_sched.whole_file import whole_file

_COLOURS = {"p50": "#4c9f70", "p90": "#e0a030", "p99": "#c0504d"}


def draw(title: str, levels: Sequence[Level], path: Path) -> None:
    """Draw latency and throughput into a picture. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    names = [level.name.replace(" ", "\n") for level in levels]
    places = range(len(levels))
    latency, throughput = figure.subplots(1, 2)
    for percentile, colour in _COLOURS.items():
        values = [
            float("nan") if level.latency is None else getattr(level.latency, percentile) * 1e3
            for level in levels
        ]
        latency.plot(places, values, "o-", color=colour, label=percentile)
    latency.set_yscale("log")
    latency.set_ylabel("latency in ms")
    latency.legend(frameon=False)
    throughput.bar(places, [level.throughput for level in levels], color="#4c72b0", width=0.6)
    throughput.set_ylabel("answers in a second")
    for axes in (latency, throughput):
        axes.set_xticks(places, names)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.margins(x=0.15)
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=120)


def draw_tuning(
    title: str,
    goal: Goal,
    simulated: Sequence[tuple[Candidate, Figures]],
    trials: Sequence[Trial],
    best: Trial | None,
    path: Path,
) -> None:
    """Draw the 99th percentile of settings: simulated, measured, and the Pareto front.

    Where the highest rate is wanted, a setting stands at its rate; otherwise at the cores that it
    keeps busy. Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def place(figures: Figures) -> tuple[float, float]:
        return figures.rate if goal.maximize else figures.cores, figures.p99 * 1e3

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots()
    points = [place(figures) for _, figures in simulated if figures.p99 < float("inf")]
    measured = [place(trial.measured) for trial in trials if trial.measured.p99 < float("inf")]
    for found, colour, label in (
        (points, "#b0b0b0", "simulated"),
        (measured, "#4c72b0", "measured"),
    ):
        if found:
            across, up = zip(*found, strict=True)
            axes.scatter(across, up, s=28, color=colour, label=label)
    front = pareto(points, more_is_better=bool(goal.maximize))
    if front:
        across, up = zip(*front, strict=True)
        axes.plot(across, up, "-", color="#b0b0b0", lw=1, label="Pareto, simulated")
    if best is not None:
        at = place(best.measured)
        axes.scatter(*at, s=90, marker="*", color="#4c9f70", label=words(best.candidate), zorder=3)
    axes.axhline(goal.p99 * 1e3, color="#c0504d", lw=1, ls="--", label="budget")
    axes.set_yscale("log")
    axes.set_ylabel("p99 in ms")
    axes.set_xlabel("requests in a second" if goal.maximize else "busy cores")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=120)


def pareto(
    points: Sequence[tuple[float, float]], *, more_is_better: bool
) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates; less is better in the second."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: (-one[0] if more_is_better else one[0], one[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
