"""The benchmarks run, and report truly on every contestant.

What they measure is nobody's business here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import contestants, devices, live_weights
from benchmarks.__main__ import must_agree
from benchmarks.batching import HandWritten, arrivals
from benchmarks.live_weights import InThreads, Span, swap_figures
from benchmarks.measure import Machine, percentile, ticker
from benchmarks.picture import draw
from benchmarks.plan import QUICK, Figure, Measured, Target
from benchmarks.report import Part, Report, Result, print_part, print_verdicts, write_json
from benchmarks.workers import Worker
from benchmarks.workloads import programme

REPOSITORY = Path(__file__).resolve().parents[2]
CHOSEN = {
    "a": ["bare loop", "auto"],
    "b": ["bare loop", "auto"],
    "c": ["bare loop", "thread pool", "auto"],
    "d": ["core, depth 10", "core, depth 1,000", "front, depth 10", "front, depth 1,000"],
    "e": ["auto"],
    "f": ["stock runner, 1 caller", "aoti_sched, 1 caller", "aoti_sched, 2 callers"],
    "g": ["serving alone", "memcpy", "aoti_sched", "stock runner"],
    "h": ["bare loop", "hand-written, 64 clients", "auto, batching, 64 clients"],
    "i": ["auto", "auto, batching"],
    "j": ["bare loop", "aoti_sched, ragged"],
    "l": ["nothing attached", "recording"],
}


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks", "--quick", *map(str, arguments)]
    ran = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=400
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_loading_is_measured_beside_its_floor(tmp_path):
    command = [sys.executable, "-m", "benchmarks.loading", "--models", "tiny", "--repetitions", "2"]
    command += ["--many", "4", "--files", "2", "--json", str(tmp_path / "it.json")]
    ran = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "it.json").read_text())
    assert {way: len(times) for way, times in found["tiny"].items()} == dict.fromkeys(
        ("floor", "torch", "first", "known"), 2
    )
    assert set(found) == {"tiny", "many", "imports", "beside_imports"}


def test_the_command_line_is_measured_beside_the_benchmarks(tmp_path):
    command = [sys.executable, "-m", "benchmarks.agreement", "--only", "a,b"]
    command += ["--repetitions", "1", "--seconds", "0.2", "--json", str(tmp_path / "it.json")]
    ran = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = json.loads((tmp_path / "it.json").read_text())
    assert [line["figure"] for line in lines] == ["p50", "p99", "rate"]
    assert all(value > 0 for line in lines for value in line["bench"] + line["benchmarks"])


def only(names):
    return [argument for name in names for argument in ("--contestant", name)]


# --- the programme, end to end --------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What a quick run with some of the contestants printed, and the JSON and PNG it wrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    figures, picture = folder / "made" / "figures.json", folder / "picture.png"
    names = dict.fromkeys(name for names in CHOSEN.values() for name in names)
    printed = run(*only([*names, "thread pool"]), "--json", figures, "--png", picture)
    return printed, json.loads(figures.read_text()), picture


def test_a_run_prints_every_contestant_what_is_wanted_and_where_it_ran(quick):
    printed = quick[0]
    for names in CHOSEN.values():
        assert all(name in printed for name in names)
    assert "what is wanted" in printed
    assert "cores of" in printed


def test_a_run_writes_every_repetition_of_every_contestant_as_json(quick):
    parts = {part["key"]: part for part in quick[1]["parts"]}
    assert list(parts) == list(CHOSEN)
    for key, names in CHOSEN.items():
        assert {result["name"] for result in parts[key]["results"]} >= set(names)
        for result in parts[key]["results"]:
            assert len(result["repetitions"]) == (1 if key == "e" else QUICK.repetitions)
            assert result["median"].keys() == result["repetitions"][0]["figures"].keys()
    assert quick[1]["settings"]["repetitions"] == QUICK.repetitions


def test_times_and_rates_of_a_run_are_positive(quick):
    first = {"a": "p50", "d": "cost", "e": "rss", "f": "swap", "i": "p99"}
    for part in quick[1]["parts"]:
        assert all(
            result["median"][first.get(part["key"], "rate")] > 0 for result in part["results"]
        )


def test_a_run_draws_a_picture(quick):
    assert quick[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "other", [contestants.OPENVINO, contestants.ONNX_RUNTIME], ids=lambda c: c.name
)
def test_another_runtime_gives_the_same_answers(other, tmp_path):
    if other.missing:
        pytest.skip(f"the bench extra is not installed: {', '.join(other.missing)}")
    # The run ends with an error where answers differ.
    printed = run(
        "--only",
        "a",
        *only(["bare loop", other.name]),
        "--json",
        tmp_path / "json",
        "--png",
        tmp_path / "png",
    )
    assert other.name in printed


def test_an_unknown_contestant_is_refused_with_those_there_are():
    command = [sys.executable, "-m", "benchmarks", "--contestant", "nobody"]
    ran = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 2
    assert "there is no 'nobody'" in ran.stderr
    assert "bare loop" in ran.stderr


def test_what_goes_wrong_in_a_contestants_process_is_told():
    with (
        Worker("d", "no such entrant", QUICK) as worker,
        pytest.raises(RuntimeError, match="no such entrant"),
    ):
        worker.opened()


def test_contestants_whose_answers_differ_did_not_do_the_same_work():
    must_agree({"one": (1.0, 2.0), "other": (1.0, 2.0001), "scheduler alone": ()})
    with pytest.raises(RuntimeError, match="other answers"):
        must_agree({"one": (1.0, 2.0), "other": (1.0, 2.1)})


# --- the report -----------------------------------------------------------------------------------


def result(name, *times):
    return Result(name, "", [Measured({"p50": seconds}) for seconds in times])


@pytest.fixture
def part():
    """The baseline takes 10 µs, the quick one 20, the slow one 50 (medians)."""
    return Part(
        key="a",
        title="times",
        figures=(Figure("p50", "p50 µs", 1e6),),
        baseline="bare",
        targets=[
            Target("quick to bare", "quick", "p50", "bare", most=2.5),
            Target("slow to bare", "slow", "p50", "bare", most=2.5),
            Target("absent to bare", "absent", "p50", "bare", most=2.5),
            Target("slow at least as slow as quick", "slow", "p50", "quick", least=2.5),
            Target("slow in µs", "slow", "p50", most=40e-6),
        ],
        results=[
            result("bare", 10e-6, 9e-6, 30e-6),
            result("quick", 18e-6, 20e-6, 90e-6),
            result("slow", 50e-6, 50e-6, 45e-6),
        ],
        left_out={"absent": ["a_runtime"]},
    )


@pytest.fixture
def report(part):
    return Report(Machine("today", "2.13", "3.11", 2, "a processor", "compiled"), {}, [part])


def printed(print_it, thing):
    console = Console(file=io.StringIO(), width=120)
    print_it(console, thing)
    return console.file.getvalue()


def cells(text, name):
    """The cells of the row that begins with this name."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines())
    return next(row for row in rows if row and row[0] == name)


def test_a_ratio_is_that_of_the_medians(part):
    ratios = [part.ratio(result, "p50") for result in part.results]
    assert ratios == pytest.approx([1, 2, 5])


def test_a_row_tells_the_median_the_best_and_the_ratio(part):
    assert cells(printed(print_part, part), "quick") == ["quick", "20", "18", "2"]


def test_the_best_rate_is_the_largest():
    rates = Result("one", "", [Measured({"rate": rate}) for rate in (2.0, 3.0, 1.0)])
    assert rates.best(Figure("rate", "runs/s", more_is_better=True)) == 3.0


def test_a_contestant_that_is_not_installed_is_said_to_be_left_out(part):
    assert "absent was left out: a_runtime not installed" in printed(print_part, part)
    needy = dataclasses.replace(contestants.BARE, needs=("no_such_package", "json"))
    assert needy.missing == ["no_such_package"]


def test_a_target_is_met_when_the_ratio_of_medians_keeps_its_bound(part):
    assert [verdict.met for verdict in part.verdicts()] == [True, False, None, True, False]


def test_a_target_stands_beside_what_was_measured(report):
    text = printed(print_verdicts, report)
    assert cells(text, "(a) slow to bare") == ["(a) slow to bare", "≤ 2.5", "5", "5", "no"]
    assert cells(text, "(a) absent to bare")[2] == "left out"
    assert cells(text, "(a) slow in µs")[1:4] == ["≤ 40", "50", "45"]


def test_the_json_holds_medians_ratios_and_verdicts(report, tmp_path):
    write_json(report, tmp_path / "new folder" / "figures.json")
    (part,) = json.loads((tmp_path / "new folder" / "figures.json").read_text())["parts"]
    quick = part["results"][1]
    assert quick["median"]["p50"] == 20e-6
    assert quick["ratios"]["p50"] == pytest.approx(2)
    assert [target["met"] for target in part["targets"]] == [True, False, None, True, False]


def test_the_picture_of_a_report_without_results_is_a_png_all_the_same(report, tmp_path):
    draw(dataclasses.replace(report, parts=[]), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_target_names_entrants_and_figures_that_there_are():
    for workload in programme().values():
        names = {entrant.name for entrant in workload.entrants(QUICK)}
        fields = {figure.field for figure in workload.figures}
        for target in workload.targets(QUICK):
            assert {target.entrant, target.against} - {None} <= names
            assert target.figure in fields


# --- measuring ------------------------------------------------------------------------------------


def test_a_swap_is_held_against_the_longest_run_that_was_under_way_in_it():
    runs = [Span(0, 4), Span(4, 5), Span(5, 30)]
    figures = swap_figures([Span(3, 6), Span(3, 4.5), Span(4.2, 4.7)], runs)
    assert figures["over"] == pytest.approx(0.5 - 1)
    assert (figures["swap"], figures["swap_max"], figures["run"]) == (1.5, 3, 4)
    assert figures["stuck"] == 0
    assert swap_figures([Span(40, 43)], runs)["over"] == 3
    assert (
        swap_figures([Span(3, 6)], runs, pauses=[1.5])["over"] == 1.5 - 4
    )  # the long run came after it


def test_a_swap_that_was_given_up_counts_as_such_whatever_the_clock_says():
    began = [n * 1234.567 for n in range(100)]
    assert all(Span(at, at + live_weights.PATIENCE).given_up for at in began)
    assert not any(Span(at, at + 0.99 * live_weights.PATIENCE).given_up for at in began)


def test_a_swap_that_returns_only_when_its_callers_are_gone_is_given_up(monkeypatch):
    monkeypatch.setattr(live_weights, "PATIENCE", 0.05)
    staged, callers, called = [], set(), threading.Event()

    def run():
        callers.add(threading.current_thread())
        called.set()
        os.sched_yield()

    # starved by its callers, it returns when the last of them is gone, be that early or late
    def swap():
        called.wait()
        for caller in list(callers):
            caller.join()

    measured = InThreads(2, run).measure(staged.append, swap, seconds=0.0)
    assert staged == [0]
    assert measured.figures["stuck"] == 1
    assert measured.figures["swap"] == pytest.approx(0.05)


def test_a_percentile_is_one_of_the_values():
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]


async def test_the_hand_written_batcher_gives_everybody_their_own_row_of_few_runs():
    sizes = []

    def doubled(inputs):
        sizes.append(len(inputs[0]))
        return [inputs[0] * 2]

    batcher = HandWritten(doubled, most=4)
    answers = await asyncio.gather(*(batcher.ask(torch.full((1, 2), float(n))) for n in range(10)))
    assert [answer.tolist() for answer in answers] == [[[2.0 * n, 2.0 * n]] for n in range(10)]
    assert sizes == [4, 4, 2]


async def test_requests_arrive_as_often_as_asked_for_and_are_timed_from_when_they_were_due():
    loop = asyncio.get_running_loop()

    def submit():
        future = loop.create_future()
        loop.call_later(0.01, future.set_result, None)
        return future

    times = await arrivals(submit, rate=1_000, seconds=0.5)
    assert 400 < len(times) < 600
    assert min(times) >= 0.009


async def test_the_ticker_counts_a_sleep_that_the_whole_block_held_up():
    async with ticker() as lags:
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            pass
    assert lags


async def test_what_is_measured_on_devices_can_be_measured_on_a_cpu():
    told = await devices.measure(devices.Bench("cpu", seconds=0.05, rounds=1, updates=2))
    rows = [
        line.split(" | ")
        for line in told.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]
    assert [row[0].strip("| ") for row in rows] == [
        "one client",
        "torch's runner, a bare loop",
        "aoti_sched",
        "throughput",
        "torch's runner, a bare loop that does not wait",
        "aoti_sched, 1 instance",
        *(f"aoti_sched, {count} instances" for count in (2, 4, 8)),
        "101 MB of weights from the host",
        "torch's own copy",
        "staged, nothing runs",
        "staged, 8 clients",
        "the pause of a swap, 8 clients, 4 instances",
        "median of 2",
        "longest",
    ]
    for row in rows:
        assert row[1].strip(" |").replace(",", "").replace(".", "").isdigit() == (
            row[0].strip("| ") not in HEADS
        )


HEADS = (
    "one client",
    "throughput",
    "101 MB of weights from the host",
    "the pause of a swap, 8 clients, 4 instances",
)
