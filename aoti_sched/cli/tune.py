"""`aoti-sched tune`: finds the settings of a model that keep a latency at a load."""

from __future__ import annotations

import asyncio
import json as json_text
import math
from pathlib import Path
from statistics import median
from typing import Any, Literal

import msgspec

from aoti_sched.cli.bench import check_plot, machine_of
from aoti_sched.cli.failures import BUDGET_MISSED, OK, UsageError
from aoti_sched.cli.options import Flag, Texts
from aoti_sched.cli.output import Report, err, out, print_json, print_table, print_title
from aoti_sched.cli.predicting import Candidate, Figures, Goal, words
from aoti_sched.cli.tuning import Trial
from aoti_sched.cli.units import seconds, time_text


class TuneReport(Report, frozen=True, kw_only=True):
    """What `tune --json` prints.

    Attributes:
        path: The package.
        goal: What was wanted.
        machine: The processor, and the versions of torch, Python and the rules.
        rows: Rows of a request; `max_size` counts requests, and the settings of a model rows.
        timed: The median seconds of runs, by threads and instances ("1x2"), and by requests.
        settings: How many settings there are in all.
        simulated: What the simulator said, the best first: the settings and the figures.
        trials: The confirmations: settings, prediction, measurement and whether the budget was
            kept.
        best: The best of them; null where none keeps the budget.
        nearest: The trial that came nearest to the budget.
        written: The file of settings; null where none was written.
        notes: What could not be tried.
    """

    path: str
    goal: Goal
    machine: dict[str, str]
    rows: int
    timed: dict[str, dict[int, float]]
    settings: int
    simulated: tuple[tuple[Candidate, Figures], ...]
    trials: tuple[Trial, ...]
    best: Trial | None
    nearest: Trial
    written: str | None
    notes: tuple[str, ...]


def tune_command(
    package: Path,
    /,
    *,
    p99: str,
    rate: float,
    maximize: Literal["throughput"] | None = None,
    poisson: Flag = False,
    threads: str | None = None,
    instances: str | None = None,
    max_size: str | None = None,
    max_delay: str | None = None,
    placement: str | None = None,
    tries: int = 8,
    time: str = "3s",
    warm_up: str = "0.5s",
    model: str | None = None,
    input: Texts = (),
    size: Texts = (),
    seed: int = 0,
    output: Path = Path("scheduler.toml"),
    overwrite: Flag = False,
    plot: Path | None = None,
    json: Flag = False,
) -> int:
    """Find the settings of a model that keep a latency at a load, and write them to a file.

    Short runs of the model are measured for each number of threads and instances. The simulator
    proposes settings, and real runs confirm the best few. The exit code is 3 when none of these
    keeps the budget; then no file is written.

    Args:
        package: A .pt2 package, or a bare library.
        p99: The budget: the time that 99 of 100 requests may take at most, such as 20ms.
        rate: Requests in a second that must be served.
        maximize: throughput, for the highest rate that keeps the budget. By default the lowest 99th
            percentile at the rate.
        poisson: Requests are due at random.
        threads: Numbers of threads of a run to choose from, such as 1,2,4. By default powers of two
            up to the cores.
        instances: Numbers of runs at once to choose from. By default powers of two up to the cores.
        max_size: Numbers of requests in a batch to choose from. By default powers of two up to what
            the model takes, and 64 at most.
        max_delay: Times to choose from that a request waits for others, such as 0ms,2ms. By default
            0 and parts of the budget.
        placement: Where runs happen, to choose from auto, lane, inline. By default auto; for short
            runs all three.
        tries: The most confirmations.
        time: How long each confirmation is measured.
        warm_up: How long each confirmation goes on before that.
        model: The name of one of several models in the package.
        input: An input, as for run; others are random.
        size: A size of random inputs, as for run.
        seed: The seed of random inputs and arrivals.
        output: The file of settings.
        overwrite: Replace the file if there is one.
        plot: Draw what was simulated and measured into this picture, such as tune.png.
        json: Print JSON.
    """
    budget = seconds(p99, "--p99")
    if not budget > 0:
        raise UsageError(f"--p99 {p99}: write a time above 0, such as 20ms.")
    if not 0 < rate < 1e7:
        raise UsageError(f"--rate {rate:g}: write a number of requests in a second, such as 500.")
    if tries < 1:
        raise UsageError(f"--tries {tries}: write a number of at least 1.")
    chosen = {
        "threads": _counts(threads, "--threads"),
        "instances": _counts(instances, "--instances"),
        "max_size": _counts(max_size, "--max-size"),
        "max_delay": _delays(max_delay),
        "placement": _placements(placement),
    }
    lengths = (seconds(warm_up, "--warm-up"), seconds(time, "--time"))
    if plot is not None:
        check_plot(plot)
    _check_output(output, overwrite=overwrite)
    for path in (output, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist.")
    goal = Goal(p99=budget, rate=rate, maximize=maximize, poisson=poisson, seed=seed)
    report = asyncio.run(_tuned(package, model, goal, chosen, lengths, (input, size, seed), tries))
    if report.best is not None:
        report = msgspec.structs.replace(report, written=str(output))
        _write(output, toml(report, package, model, output))
    if plot is not None:
        from aoti_sched.cli.plot import draw_tuning

        draw_tuning(report.path, goal, report.simulated, report.trials, report.best, plot)
    if json:
        print_json(report)
    else:
        _print(report)
    if report.best is None:
        err().print(f"aoti-sched: no settings keep the budget. {_nearest(report)}")
        return BUDGET_MISSED
    return OK


async def _tuned(
    package: Path,
    model: str | None,
    goal: Goal,
    chosen: dict[str, Any],
    lengths: tuple[float, float],
    made: tuple[tuple[str, ...], tuple[str, ...], int],
    tries: int,
) -> TuneReport:
    from aoti_sched.cli.loading import quiet
    from aoti_sched.cli.measuring import RealMachine
    from aoti_sched.cli.tuning import tune

    quiet()
    machine = RealMachine(package, model, goal, lengths, made)
    await machine.look()
    axes = await machine.axes(chosen)
    found = await tune(machine, axes, goal, tries=tries, tell=_tell)
    return TuneReport(
        path=str(package),
        goal=goal,
        machine=machine_of(),
        rows=machine.rows,
        timed={
            f"{threads}x{instances}": {size: median(of) for size, of in timed.by_size.items()}
            for (threads, instances), timed in machine.known.items()
        },
        settings=found.settings,
        simulated=found.simulated,
        trials=found.trials,
        best=found.best,
        nearest=found.nearest,
        written=None,
        notes=tuple(machine.notes),
    )


def _tell(text: str) -> None:
    """Say on stderr what is measured; a simulation is too short for a line."""
    if not text.startswith("simulating"):
        err().print(text, soft_wrap=True)


# --- options --------------------------------------------------------------------------------------


def _counts(text: str | None, option: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    found = set()
    for part in text.split(","):
        if not part.strip().isdecimal() or not 0 < int(part) <= 1024:
            raise UsageError(f"{option} {text}: {part!r} is no number of 1 to 1024. Write 1,2,4.")
        found.add(int(part))
    return tuple(sorted(found))


def _delays(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    return tuple(sorted({seconds(part, f"--max-delay {text}") for part in text.split(",")}))


def _placements(text: str | None) -> tuple[Any, ...] | None:
    if text is None:
        return None
    known = ("auto", "lane", "inline")
    for part in text.split(","):
        if part not in known:
            raise UsageError(f"--placement {text}: {part!r} is none of {', '.join(known)}.")
    return tuple(name for name in known if name in text.split(","))


def _check_output(path: Path, *, overwrite: bool) -> None:
    if path.suffix != ".toml":
        raise UsageError(f"--output {path}: settings are TOML. Give a name that ends in .toml.")
    if path.exists() and not overwrite:
        raise UsageError(
            f"--output {path}: the file exists. Give --overwrite to replace it, or another name."
        )


# --- the file -------------------------------------------------------------------------------------


def toml(report: TuneReport, package: Path, model: str | None, output: Path) -> str:
    """Return the settings as a file that `Scheduler.from_config` reads."""
    best, goal = report.best, report.goal
    if best is None:
        raise ValueError("there are no settings to write")
    candidate, measured = best.candidate, best.measured
    p99 = time_text(measured.p99)
    arrivals = "at random" if goal.poisson else "evenly"
    lines = [
        f"# Found by aoti-sched tune: p99 {p99} at {measured.rate:.4g} requests in a second, due",
        f"# {arrivals}, where p99 {time_text(goal.p99)} was asked for at {goal.rate:.4g}.",
        f"# {len(report.trials)} of {report.settings} settings were measured under load with torch",
        f"# {report.machine['torch']} on {report.machine['processor']}.",
        "",
        f"[models.{_quoted(package.stem)}]",
        f"path = {_quoted(_beside(package, output))}",
    ]
    if model is not None:
        lines.append(f"model_name = {_quoted(model)}")
    lines += [
        f"instances = {candidate.instances}",
        f"threads = {candidate.threads}",
        f"placement = {_quoted(candidate.placement)}",
    ]
    if candidate.max_size > 1:
        rows = candidate.max_size * report.rows
        lines.append(f"batching = {{ max_size = {rows}, max_delay = {candidate.max_delay!r} }}")
    return "\n".join(lines) + "\n"


def _beside(package: Path, output: Path) -> str:
    """Return the package's path from the folder of the file, where it lies there or below."""
    whole, folder = package.absolute(), output.absolute().parent
    return str(whole.relative_to(folder)) if whole.is_relative_to(folder) else str(whole)


def _quoted(text: str) -> str:
    """Return a text as a basic string of TOML."""
    return json_text.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write(path: Path, text: str) -> None:
    """Write the file whole or not at all, and only if a scheduler can read it."""
    from aoti_sched.config_file import read_config
    from aoti_sched.whole_file import whole_file

    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")
        read_config(beside)


# --- for people -----------------------------------------------------------------------------------


def _print(report: TuneReport) -> None:
    console, goal = out(), report.goal
    what = "the highest rate" if goal.maximize else "the lowest p99"
    print_title(
        console,
        f"{report.path}: {what} with p99 up to {time_text(goal.p99)} at {goal.rate:.4g}/s or more",
    )
    console.print()
    headings = ("settings", "rate", "p50", "p99", "p99 simulated", "batch", "cores", "failed", "")
    rows = []
    for trial in report.trials:
        measured, latency = trial.measured, trial.measured.latency
        verdict = "best" if trial is report.best else "kept" if trial.kept else "missed"
        rows.append(
            (
                words(trial.candidate),
                f"{measured.rate:.4g}/s",
                "-" if latency is None else time_text(latency.p50),
                "-" if latency is None else time_text(latency.p99),
                _simulated(trial),
                f"{measured.batch_size:.3g}",
                f"{measured.cores:.2f}",
                measured.failed or "",
                verdict,
            )
        )
    print_table(console, headings, rows)
    console.print()
    console.print(
        f"{len(report.trials)} of {report.settings} settings measured under load, "
        f"{len(report.simulated)} simulated."
    )
    if report.written is not None:
        console.print(f"Written: {report.written}", soft_wrap=True)
    for note in report.notes:
        err().print(f"aoti-sched: {note}")


def _simulated(trial: Trial) -> str:
    """Return the simulated percentile, where the trial has the simulated rate."""
    same = math.isclose(trial.predicted.rate, trial.measured.rate)
    p99 = trial.predicted.p99
    return time_text(p99) if same and p99 < math.inf else "-"


def _nearest(report: TuneReport) -> str:
    trial = report.nearest
    latency = trial.measured.latency
    p99 = "no answer" if latency is None else f"p99 {time_text(latency.p99)}"
    failed = f" and {trial.measured.failed} failed requests" if trial.measured.failed else ""
    return (
        f"Nearest: {words(trial.candidate)}, with {p99}{failed} at {trial.measured.rate:.4g} "
        "requests in a second."
    )
