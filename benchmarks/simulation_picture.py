"""The simulator's pictures: how the rules fare as the load grows, and who gets which part of a
device.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .picture import BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from .simulation import RULES, Outcome, entitled

Axes = Any

BLACK, GOLD = "#222222", "#c9a227"
COLOURS = dict(zip(RULES, (GREY, VIOLET, ORANGE, GOLD, BLUE, GREEN, RED), strict=True))
STYLES = dict(zip(RULES, ("-", "-", "-", "-", "-", (0, (2, 2)), ":"), strict=True))
"""The last ones often lie upon each other."""
CLASSES = ("high", "normal", "low")


def draw_overload(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Panels over the load, goodput and latency, and with several models useful time and
    fairness; and bars by class for high loads.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels: list[Callable[[Axes], None]] = [lambda axes: _goodput(axes, outcomes)]
    if outcomes[0].scenario.models > 1:
        panels.append(lambda axes: _useful(axes, outcomes))
    panels.append(lambda axes: _latency(axes, outcomes))
    if outcomes[0].scenario.models > 1:
        panels.append(lambda axes: _fairness(axes, outcomes))
    heavy = [load for load in _loads(outcomes) if load > 1.0][-2:]
    panels += [lambda axes, load=load: _bars(axes, outcomes, load) for load in heavy]  # type: ignore[misc]
    rows = -(-len(panels) // 2)
    figure = Figure(
        figsize=(11, 3.5 * rows + 0.3), layout=ConstrainedLayoutEngine(hspace=0.05, wspace=0.05)
    )
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for panel, axes in zip(panels, places, strict=False):
        panel(axes)
    for axes in places[len(panels) :]:
        axes.remove()
    figure.suptitle(textwrap.fill(title, 125), fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def draw_parts(outcomes: Sequence[Outcome], by: str, title: str, path: Path) -> None:
    """Who got which part of the devices' time, a group of bars for each; dashes are what it
    should have had (`entitled`).
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(9, 4.2), layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    asked, _ = getattr(outcomes[0], f"by_{by}")
    shares = (
        np.resize(outcomes[0].scenario.shares or (1.0,), len(asked))
        if by == "model"
        else np.ones(len(asked))
    )
    fair = entitled(asked, shares, 1.0)
    width = 0.8 / len(outcomes)
    for place, outcome in enumerate(outcomes):
        _, got = getattr(outcome, f"by_{by}")
        at = np.arange(len(got)) + (place - (len(outcomes) - 1) / 2.0) * width
        axes.bar(at, got, 0.92 * width, color=COLOURS[outcome.rules], label=outcome.rules)
        for x, part in zip(at, got, strict=True):
            axes.annotate(
                f"{part:.0%}",
                (x, part),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
    for place, part in enumerate(fair):
        axes.plot(
            [place - 0.45, place + 0.45],
            [part, part],
            color=BLACK,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
        )
    means = np.geomspace(*outcomes[0].scenario.runs, len(asked))
    names = [
        f"{by} {place}\nasks for {want:.0%}"
        + (
            f"\nruns of {means[place] * 1e3:.3g} ms, share {shares[place]:g}"
            if by == "model"
            else ""
        )
        for place, want in enumerate(asked)
    ]
    axes.set_xticks(range(len(asked)), names, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, fontsize=9)
    _plain(
        axes,
        f"{title}\npart of the device's time that each {by} got (dashes: what it asks for, or its "
        f"share of the rest)",
    )
    _save(figure, path)


def _loads(outcomes: Sequence[Outcome]) -> list[float]:
    return sorted({outcome.scenario.load for outcome in outcomes})


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.rules for outcome in outcomes))


def _goodput(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    _possible(axes, outcomes)
    _lines(axes, outcomes, lambda o: o.goodput)
    axes.set_ylim(0, max(1.1, 1.07 * max(outcome.goodput for outcome in outcomes)))
    axes.legend(frameon=False, loc="lower left", fontsize=9, ncols=2)
    _plain(axes, "goodput: answers in time per second ÷ capacity")


def _useful(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    _possible(axes, outcomes)
    _lines(axes, outcomes, lambda o: o.useful)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _plain(axes, "useful: device time that went into answers in time")


def _latency(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    _lines(axes, outcomes, lambda o: o.p50 * 1e3, width=0.8)
    _lines(axes, outcomes, lambda o: o.p99 * 1e3, width=2.2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    _plain(axes, "latency of what was answered in ms: p50 (thin) and p99")


def _fairness(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    _lines(axes, outcomes, lambda o: o.jain)
    axes.set_ylim(0, 1.08)
    _plain(axes, "fairness between models: Jain's index (1: all alike)")


def _possible(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """What there is to be had: all that comes, and no more than can be done."""
    loads = _loads(outcomes)
    axes.plot(
        loads, [min(load, 1.0) for load in loads], color=BLACK, linewidth=7, alpha=0.12, zorder=0
    )
    axes.set_ylim(0, 1.1)


def _lines(
    axes: Axes, outcomes: Sequence[Outcome], value: Callable[[Outcome], float], width: float = 1.8
) -> None:
    for name in _names(outcomes):
        mine = sorted((o for o in outcomes if o.rules == name), key=lambda o: o.scenario.load)
        axes.plot(
            [o.scenario.load for o in mine],
            [value(o) for o in mine],
            marker="o",
            markersize=3.5,
            color=COLOURS[name],
            linestyle=STYLES[name],
            linewidth=1.7 * width if name == "default" else width,
            label=name,
        )
    loads = _loads(outcomes)
    axes.set_xscale("log")
    axes.set_xticks(loads, [f"{load:g}" for load in loads], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("load: work that comes ÷ what the lanes can do", fontsize=9)


def _bars(axes: Axes, outcomes: Sequence[Outcome], load: float) -> None:
    outcomes = [outcome for outcome in outcomes if outcome.scenario.load == load]
    for place, (name, shade) in enumerate(zip(CLASSES, (1.0, 0.6, 0.3), strict=True)):
        at = np.arange(len(outcomes)) + (place - 1) * 0.27
        kept = [o.kept[place] for o in outcomes]
        axes.bar(at, kept, 0.25, color=BLUE, alpha=shade, label=name)
        for x, part in zip(at, kept, strict=True):
            axes.annotate(
                f"{part:.0%}",
                (x, part),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
            )
    axes.set_xticks(range(len(outcomes)), [o.rules for o in outcomes], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.5, 1.0], ["0%", "50%", "100%"])
    axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper right")
    _plain(axes, f"answered in time by class, at {load:g}x")


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    """With a palette of its own, which makes a picture of lines and bars a third as large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(90)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(96).save(
        path, optimize=True
    )
