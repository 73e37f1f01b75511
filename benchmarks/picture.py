"""The picture: a panel or two for each workload, what was wanted among them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import Part, Report, Result, number, told, wanted

Axes = Any
Panel = Callable[[Axes], None]

GREY, ORANGE, BLUE, RED, GREEN, VIOLET = (
    "#8a8a8a",
    "#d9730d",
    "#2a6fbb",
    "#b03a48",
    "#3b8a4f",
    "#7a5195",
)
FAMILIES = (
    (("bare", "to_thread", "thread pool", "stock runner"), GREY),
    (("thread lanes", "C ABI", "hand-written"), VIOLET),
    (("native", "memcpy"), ORANGE),
    (("auto", "aoti_sched"), BLUE),
    (("OpenVINO", "ONNX", "serving alone"), GREEN),
)
"""One colour for a kind of contestant, by how its name begins."""


def draw(report: Report, path: Path) -> None:
    """Write a PNG with two panels in a row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [panel for part in report.parts for panel in _panels(part)]
    panels.append(lambda axes: _verdicts(axes, report))
    rows = -(-len(panels) // 2)
    layout = ConstrainedLayoutEngine(hspace=0.06, wspace=0.05)
    figure = Figure(figsize=(15, 4.6 * rows + 0.8), layout=layout)
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for panel, axes in zip(panels, places, strict=False):
        panel(axes)
    for axes in places[len(panels) :]:
        axes.remove()
    figure.supxlabel(report.place, fontsize=9, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panels(part: Part) -> list[Panel]:
    if not part.results:
        return []
    match part.key:
        case "a" | "i":
            return [lambda axes: _times(axes, part)]
        case "b" | "h" | "j" | "k":
            return [lambda axes: _rates(axes, part, part.title)]
        case "c" | "g":
            return [
                lambda axes: _rates(axes, part, _titles(part)[0]),
                lambda axes: _lags(axes, part),
            ]
        case "l":
            return [lambda axes: _rates(axes, part, part.title.replace("CPU time", "rate"))]
        case "f":
            return [lambda axes: _swaps(axes, part)]
        case "d":
            words = ("depth", "runners")
            return [lambda axes, word=word: _costs(axes, part, word) for word in words]  # type: ignore[misc]
        case _:
            return [lambda axes: _memory(axes, part)]


def _titles(part: Part) -> tuple[str, str]:
    model = part.title.partition(":")[0]
    return f"{model}: throughput", f"{model}: lag of the event loop"


def _times(axes: Axes, part: Part) -> None:
    """Bars up to the median, a stroke at the 99th percentile."""
    for row, result in enumerate(part.results):
        p50, p99 = result.median("p50") * 1e6, result.median("p99") * 1e6
        axes.barh(row, p50, height=0.55, color=_colour(result))
        axes.plot([p99, p99], [row - 0.3, row + 0.3], color="#333333", linewidth=1.6)
        axes.plot([p50, p99], [row, row], color="#333333", linewidth=0.6)
        _label(axes, row, p99, f"{number(p50)}{_multiple(part, result, 'p50')}")
    axes.set_xscale("log")
    axes.set_xlim(
        0.3 * min(result.median("p50") * 1e6 for result in part.results),
        10 * max(result.median("p99") * 1e6 for result in part.results),
    )
    base = f"(in brackets as a multiple of the {part.baseline}'s)"
    axes.set_xlabel(f"µs per request: bar p50 {base}, stroke p99")
    _dress(axes, part.title, part.results)


def _rates(axes: Axes, part: Part, title: str) -> None:
    for row, result in enumerate(part.results):
        rate = result.median("rate")
        axes.barh(row, rate, height=0.55, color=_colour(result))
        _label(axes, row, rate, f"{number(rate)}{_multiple(part, result, 'rate')}")
    axes.set_xlim(right=1.3 * max(result.median("rate") for result in part.results))
    axes.set_xlabel(
        f"{part.figures[0].heading} (in brackets as a multiple of the {part.baseline}'s)"
    )
    _dress(axes, title, part.results)


def _swaps(axes: Axes, part: Part) -> None:
    """Bars up to the median, a stroke at the longest, a ring at what one run takes."""
    for row, result in enumerate(part.results):
        middle, most, run = (result.median(name) * 1e3 for name in ("swap", "swap_max", "run"))
        stuck = result.median("stuck")
        axes.barh(row, middle, height=0.55, color=_colour(result))
        axes.plot([most, most], [row - 0.3, row + 0.3], color="#333333", linewidth=1.6)
        axes.plot([middle, most], [row, row], color="#333333", linewidth=0.6)
        axes.plot(run, row, "o", markerfacecolor="white", markeredgecolor="#333333", markersize=5)
        _label(axes, row, most, f"{stuck:.0%} did not return in time" if stuck else number(middle))
    axes.set_xscale("log")
    axes.set_xlim(right=30 * max(result.median("swap_max") * 1e3 for result in part.results))
    axes.set_xlabel(
        "ms until new weights serve: bar p50, stroke the longest; ring: a run, as its caller "
        "times it (p50)"
    )
    _dress(axes, part.title.partition(":")[0], part.results)


def _lags(axes: Axes, part: Part) -> None:
    for row, result in enumerate(part.results):
        p50, p99, most = (result.median(f"lag_{name}") * 1e3 for name in ("p50", "p99", "max"))
        axes.plot([p50, most], [row, row], color=_colour(result), linewidth=2.5)
        for value, height, width in ((p50, 0.2, 1.5), (p99, 0.32, 3.5), (most, 0.2, 1.5)):
            axes.plot(
                [value, value], [row - height, row + height], color=_colour(result), linewidth=width
            )
        _label(axes, row, most, number(p99))
    bound = next((t.most for t in part.targets if t.figure == "lag_p99" and t.most), None)
    if bound is not None:
        axes.axvline(bound * 1e3, color=RED, linewidth=1, linestyle="--")
        axes.annotate(
            f"p99 wanted\n≤ {number(bound * 1e3)} ms", (bound * 1e3, 0.0), (4, 0), color=RED,
            textcoords="offset points", fontsize=8.5, va="center",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(right=5 * max(result.median("lag_max") * 1e3 for result in part.results))
    axes.set_xlabel("how late a sleep of 1 ms woke up (ms): p50, p99 (bold, and its number), max")
    _dress(axes, _titles(part)[1], part.results)


def _costs(axes: Axes, part: Part, word: str) -> None:
    """The cost over what is varied, for the core and for the whole front."""
    ticks: list[int] = []
    for name, colour in (("core", BLUE), ("front", ORANGE)):
        results = [result for result in part.results if result.name.startswith(f"{name}, {word} ")]
        if not results:
            continue
        sizes = ticks = [int(result.name.rpartition(" ")[2].replace(",", "")) for result in results]
        costs = [result.median("cost") * 1e6 for result in results]
        axes.plot(
            sizes, costs, "o-", color=colour, label=f"{name}: {results[0].note.partition(';')[0]}"
        )
        for size, cost in zip(sizes, costs, strict=True):
            axes.annotate(
                number(cost),
                (size, cost),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks], minor=False)
    axes.minorticks_off()
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])
    axes.set_ylabel("µs per request")
    axes.set_xlabel("jobs queued (1 runner)" if word == "depth" else "runners (1,000 jobs queued)")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    _plain(axes, f"(d) the scheduler alone: cost per request by {word}", axis="y")


def _memory(axes: Axes, part: Part) -> None:
    """Memory against the first look, so that three processes of different size can be compared."""
    for result in part.results:
        series = result.repetitions[0].series
        grown = [(rss - series["rss"][0]) / 1e6 for rss in series["rss"]]
        label = f"{result.name}: {number(result.median('rss_per_request'))} B per request"
        axes.plot(series["requests"], grown, "o-", color=_colour(result), label=label, markersize=4)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -1.0), max(1.6 * high, 4.0))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("requests since warm")
    axes.set_ylabel("growth of RSS (MB)")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    _plain(axes, part.title, axis="y")


def _verdicts(axes: Axes, report: Report) -> None:
    """What was wanted and what was measured, as lines of text."""
    rows = [(part, verdict) for part in report.parts for verdict in part.verdicts()]
    axes.set_axis_off()
    axes.set_title("what is wanted", loc="left", fontsize=11)
    colours = {True: GREEN, False: RED, None: GREY}
    for row, (part, verdict) in enumerate(rows):
        height = 0.97 - row / max(18, len(rows))
        sentence = textwrap.shorten(f"({part.key}) {verdict.target.sentence}", 68, placeholder="…")
        for x, text, side in (
            (0.0, sentence, "left"),
            (0.86, wanted(part, verdict), "right"),
            (1.0, told(part, verdict, verdict.measured), "right"),
        ):
            colour = colours[verdict.met] if x == 1.0 else "black"
            axes.text(
                x,
                height,
                text,
                ha=side,
                va="top",
                fontsize=9.5,
                color=colour,
                transform=axes.transAxes,
            )


def _colour(result: Result) -> str:
    return next((colour for starts, colour in FAMILIES if result.name.startswith(starts)), GREY)


def _multiple(part: Part, result: Result, field: str) -> str:
    ratio = part.ratio(result, field)
    return "" if ratio is None or result.name == part.baseline else f"  ({number(ratio)}x)"


def _label(axes: Axes, row: int, value: float, text: str) -> None:
    axes.annotate(text, (value, row), (6, 0), textcoords="offset points", va="center", fontsize=9)


def _dress(axes: Axes, title: str, results: list[Result]) -> None:
    """Rows of contestants from the top."""
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="y", length=0)
    _plain(axes, title, axis="x")


def _plain(axes: Axes, title: str, axis: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(visible=True, axis=axis, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
