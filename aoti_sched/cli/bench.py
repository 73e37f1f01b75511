"""`aoti-sched bench`: what a model serves under load, in a scheduler of this process."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from aoti_sched.cli.failures import BUDGET_MISSED, OK, UsageError
from aoti_sched.cli.load import Level, Load
from aoti_sched.cli.options import Flag, Texts
from aoti_sched.cli.output import Report, err, out, print_json, print_table, print_title
from aoti_sched.cli.units import seconds, time_text
from aoti_sched.config import PlacementName
from aoti_sched.errors import first_line

_VARIANTS = 8
"""How many different requests are made up, and sent in turn."""
_BOUNDS = ("p50", "p90", "p99", "max", "mean")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a budget at one load.

    Attributes:
        budget: The budget as it was given.
        load: The load in words.
        measured: The figure, in seconds or answers in a second; None without an answer.
        kept: Whether the budget was kept.
    """

    budget: str
    load: str
    measured: float | None
    kept: bool


class BenchReport(Report, frozen=True, kw_only=True):
    """What `bench --json` prints, and what `--save` writes and `--compare` reads.

    Attributes:
        path: The package.
        settings: How the model was loaded.
        machine: The processor, the cores, and the versions of torch and Python.
        levels: What was measured at each load.
        verdicts: Whether the budgets were kept.
    """

    path: str
    settings: dict[str, Any]
    machine: dict[str, str]
    levels: tuple[Level, ...]
    verdicts: tuple[Verdict, ...]


def bench_command(
    package: Path,
    /,
    *,
    clients: str | None = None,
    rate: str | None = None,
    poisson: Flag = False,
    time: str = "10s",
    warm_up: str = "1s",
    instances: int = 1,
    threads: int | None = None,
    batching: Flag = False,
    placement: PlacementName = "auto",
    device: str = "cpu",
    model: str | None = None,
    input: Texts = (),
    size: Texts = (),
    seed: int = 0,
    budget: Texts = (),
    compare: Path | None = None,
    save: Path | None = None,
    plot: Path | None = None,
    json: Flag = False,
) -> int:
    """Measure a model under load: latency, throughput, queue and run time, loop lag, cores.

    The exit code is 3 when a budget is missed.

    Args:
        package: A .pt2 package, or a bare library.
        clients: Numbers of clients that ask again as soon as they are answered, such as 1,8,64.
            By default 1,8,64, unless --rate is given.
        rate: Requests in a second, such as 100,200, which are due whether earlier ones are answered
            or not.
        poisson: Requests of a rate are due at random.
        time: How long each load is measured.
        warm_up: How long each load goes on before that.
        instances: Runs that may go on at once.
        threads: Threads of a run. By default the number that the model was compiled for.
        batching: Run requests that come together as one.
        placement: Where runs happen: auto, lane or inline.
        device: Where to run: cpu, cuda:0, xpu:0 or mps.
        model: The name of one of several models in the package.
        input: An input, as for run; others are random.
        size: A size of random inputs, as for run.
        seed: The seed of random inputs and arrivals.
        budget: What each load must keep: p50, p90, p99, max or mean of the latency at most, such as
            p99=20ms, or throughput=100 answers in a second at least.
        compare: Compare with this file, which --save has written.
        save: Write the report to this file, as JSON.
        plot: Draw latency and throughput into this picture, such as bench.png.
        json: Print JSON.
    """
    loads = _loads(clients, rate)
    budgets = [_budget(text) for text in budget]
    earlier = None if compare is None else _saved(compare)
    if plot is not None:
        check_plot(plot)
    for path in (save, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist.")
    settings: dict[str, Any] = {
        "model_name": model,
        "device": device,
        "instances": instances,
        "threads": threads,
        "batching": batching,
        "placement": placement,
    }
    if device != "cpu":
        settings |= {"copy_inputs": True, "copy_outputs": "cpu"}
    lengths = (seconds(warm_up, "--warm-up"), seconds(time, "--time"))
    levels = asyncio.run(
        _measure(package, settings, loads, lengths, (input, size, seed), poisson=poisson)
    )
    report = BenchReport(
        path=str(package),
        settings=settings,
        machine=machine_of(),
        levels=tuple(levels),
        verdicts=tuple(_verdict(one, level) for level in levels for one in budgets),
    )
    if save is not None:
        from aoti_sched.whole_file import whole_file

        with whole_file(save) as beside:
            beside.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    if plot is not None:
        from aoti_sched.cli.plot import draw

        draw(report.path, report.levels, plot)
    if json:
        print_json(report)
    else:
        _print(report, earlier)
    return OK if all(verdict.kept for verdict in report.verdicts) else BUDGET_MISSED


async def _measure(
    package: Path,
    settings: dict[str, Any],
    loads: Sequence[tuple[str, float]],
    lengths: tuple[float, float],
    made: tuple[tuple[str, ...], tuple[str, ...], int],
    *,
    poisson: bool,
) -> list[Level]:
    from aoti_sched import Scheduler
    from aoti_sched.cli.inputs import Inputs
    from aoti_sched.cli.loading import quiet, wrapper_of

    quiet()
    given, sizes, seed = made
    levels = []
    async with Scheduler() as scheduler:
        runner = await scheduler.load(package, **settings)
        inputs = Inputs(runner.info, wrapper_of(package, settings["model_name"]), given, sizes)
        load = Load(runner, [inputs.arguments(seed + index) for index in range(_VARIANTS)])
        await load.probe()
        console = err()
        for kind, number in loads:
            words = f"{number:g} {'clients' if kind == 'clients' else 'requests in a second'}"
            with console.status(words) if console.is_terminal else _nothing():
                for length in lengths:
                    if kind == "clients":
                        level = await load.clients(int(number), length)
                    else:
                        level = await load.rate(number, length, poisson=poisson, seed=seed)
            levels.append(level)
    return levels


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


# --- options --------------------------------------------------------------------------------------


def _loads(clients: str | None, rate: str | None) -> list[tuple[str, float]]:
    if clients is None and rate is None:
        clients = "1,8,64"
    found: list[tuple[str, float]] = []
    for kind, text in (("clients", clients), ("rate", rate)):
        for part in () if text is None else text.split(","):
            try:
                number = float(part)
            except ValueError:
                number = 0.0
            if not 0 < number < 1e7 or (kind == "clients" and number != int(number)):
                raise UsageError(f"--{kind} {text}: {part!r} is no number of {kind}. Write 1,8,64.")
            found.append((kind, number))
    return found


def _budget(text: str) -> tuple[str, str, float]:
    figure, _, bound = text.partition("=")
    if figure == "throughput":
        try:
            return text, figure, float(bound)
        except ValueError:
            raise UsageError(f"--budget {text}: {bound!r} is no number.") from None
    if figure not in _BOUNDS:
        raise UsageError(
            f"--budget {text}: write one of {', '.join(_BOUNDS)} with a time, such as p99=20ms, or "
            "throughput=100."
        )
    return text, figure, seconds(bound, f"--budget {text}")


def _verdict(budget: tuple[str, str, float], level: Level) -> Verdict:
    text, figure, bound = budget
    if figure == "throughput":
        return Verdict(
            budget=text,
            load=level.name,
            measured=level.throughput,
            kept=level.throughput >= bound,
        )
    measured = None if level.latency is None else getattr(level.latency, figure)
    kept = measured is not None and measured <= bound and not level.failed
    return Verdict(budget=text, load=level.name, measured=measured, kept=kept)


def _saved(path: Path) -> BenchReport:
    try:
        report = msgspec.json.decode(path.read_bytes(), type=BenchReport)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no report of bench: {first_line(error)}.") from error
    if report.version != 1:
        raise UsageError(f"{path}: a report of version {report.version}. Measure it anew.")
    return report


def check_plot(path: Path) -> None:
    """Raise UsageError for a picture that can't be drawn."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path}: no known kind of picture. Use .png, .svg or .pdf.")
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs the package matplotlib. Run: pip install matplotlib")


def machine_of() -> dict[str, str]:
    """Return the processor and the versions, for reports that are compared."""
    from aoti_sched.cli.doctor import processor, rules

    return {
        "processor": processor(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "rules": rules(),
    }


# --- for people -----------------------------------------------------------------------------------


def _print(report: BenchReport, earlier: BenchReport | None) -> None:
    console = out()
    settings = ", ".join(
        f"{name} {value}" for name, value in report.settings.items() if value not in (None, False)
    )
    print_title(console, f"{report.path}: {settings}")
    console.print()
    headings = ("load", "answers/s", "p50", "p90", "p99", "max")
    rows = []
    for level in report.levels:
        latency = level.latency
        times = (latency.p50, latency.p90, latency.p99, latency.max) if latency else ()
        texts = [time_text(value) for value in times] or ["-"] * 4
        rest = [
            *("-" if p is None else time_text(p.p50) for p in (level.queue, level.run)),
            "-" if level.lag is None else time_text(level.lag.p99),
            f"{level.cores:.2f}",
            f"{level.batch_size:.3g}",
            ", ".join(f"{count} {name}" for name, count in level.failed.items()),
        ]
        rows.append((level.name, _rate(level.throughput), *texts, *rest))
    more = ("queue p50", "run p50", "loop lag p99", "cores", "batch", "failed")
    print_table(console, (*headings, *more), rows)
    if earlier is not None:
        console.print()
        _compare(report, earlier)
    for verdict in report.verdicts:
        if not verdict.kept:
            missed = f"budget {verdict.budget} missed at {verdict.load}: {_measured(verdict)}."
            err().print(f"aoti-sched: {missed}")


def _measured(verdict: Verdict) -> str:
    if verdict.measured is None:
        return "no answer"
    if verdict.budget.startswith("throughput"):
        return f"{_rate(verdict.measured)} answers in a second"
    return time_text(verdict.measured)


def _rate(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _compare(report: BenchReport, earlier: BenchReport) -> None:
    """Print how the figures relate to those of an earlier report at the same loads."""
    before = {level.name: level for level in earlier.levels}
    rows = []
    for level in report.levels:
        old = before.get(level.name)
        if old is None:
            rows.append((level.name, *["-"] * 3))
            continue
        latencies = [(level.latency, old.latency, figure) for figure in ("p50", "p99")]
        rows.append(
            (
                level.name,
                _ratio(level.throughput, old.throughput),
                *(_ratio(getattr(n, f, 0.0), getattr(o, f, 0.0)) for n, o, f in latencies),
            )
        )
    console = out()
    if report.machine != earlier.machine:
        err().print("aoti-sched: the earlier report is of another machine or other versions.")
    print_table(console, ("compared with the earlier report", "answers/s", "p50", "p99"), rows)


def _ratio(now: float, before: float) -> str:
    return f"{now / before:.3g} x" if now and before else "-"
