"""The picture of `bench --plot`: latency and throughput at each load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aoti_sched.cli.load import Level
from aoti_sched.cli.tensors import whole_file

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
