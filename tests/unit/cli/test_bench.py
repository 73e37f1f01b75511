"""`bench`: loads on a fake backend, budgets, and reports that are compared."""

import asyncio
import time
from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoti_sched import Limits
from aoti_sched.cli import bench
from aoti_sched.cli.load import Level, Load
from aoti_sched.percentiles import Percentiles, percentiles
from aoti_sched.testing import FakeBackend, fake_scheduler
from benchmarks.measure import percentile
from tests.unit.cli.support import refused

LATENCY = Percentiles(0.002, 0.001, 0.003, 0.01, 0.02)


def level(**changes):
    plain = Level(
        clients=8,
        rate=None,
        poisson=False,
        seconds=1.0,
        completed=100,
        failed={},
        throughput=100.0,
        latency=LATENCY,
        queue=None,
        run=None,
        lag=None,
        cores=1.0,
        batch_size=1.0,
    )
    return msgspec.structs.replace(plain, **changes)


def report(*levels):
    return bench.BenchReport(path="m.pt2", settings={}, machine={}, levels=levels, verdicts=())


def test_percentiles_are_of_the_nearest_rank():
    values = [float(number) for number in range(100, 0, -1)]
    assert percentiles(values) == Percentiles(50.5, 50.0, 90.0, 99.0, 100.0)
    assert percentiles([3.0]) == Percentiles(3.0, 3.0, 3.0, 3.0, 3.0)
    assert percentiles([]) is None


@given(st.lists(st.floats(0, 1e3), min_size=1), st.sampled_from([50, 90, 99, 100]))
def test_percentiles_are_those_of_the_benchmarks(values, percent):
    ours = percentiles(values)
    figures = {50: ours.p50, 90: ours.p90, 99: ours.p99, 100: ours.max}
    assert figures[percent] == percentile(values, percent)
    # Nearest rank: `percent` of the values are no larger, and fewer are smaller.
    within = sum(value <= figures[percent] for value in values)
    below = sum(value < figures[percent] for value in values)
    assert 100 * within >= percent * len(values) > 100 * below


async def test_clients_ask_as_those_of_the_benchmarks_do():
    """Both go on until the time is over, and count each answer that the runner has given."""
    pytest.importorskip("torch")  # which the benchmarks import
    from benchmarks.clients import ask

    async with fake_scheduler(FakeBackend({"a": len}, auto=True)) as scheduler:
        runner = await scheduler.load("a.pt2")
        load = Load(runner, [(("abc",), {})])
        for counted in (0, 1):
            before = runner.stats().completed
            if counted:
                completed = (await load.clients(5, 0.05)).completed
            else:
                until = time.perf_counter() + 0.05
                asking = (ask(partial(runner.run, "abc"), until) for _ in range(5))
                completed = sum(await asyncio.gather(*asking))
            assert completed == runner.stats().completed - before >= 5


@pytest.mark.parametrize("clients", [1, 5])
async def test_every_answer_to_a_client_is_measured(clients):
    async with fake_scheduler(FakeBackend({"a": len}, auto=True)) as scheduler:
        runner = await scheduler.load("a.pt2")
        load = Load(runner, [(("abc",), {}), (("defg",), {})])
        await load.probe()
        before = runner.stats().completed
        measured = await load.clients(clients, 0.05)
        assert measured.completed == runner.stats().completed - before >= clients
        assert measured.completed == len(load.latencies)
        assert measured.failed == {}
        assert measured.name == ("1 client" if clients == 1 else "5 clients")
        assert measured.throughput == pytest.approx(measured.completed / measured.seconds)


@pytest.mark.parametrize("poisson", [False, True])
async def test_a_rate_asks_for_all_that_is_due_and_waits_for_the_answers(poisson):
    async with fake_scheduler(FakeBackend({"a": len}, auto=True)) as scheduler:
        runner = await scheduler.load("a.pt2")
        load = Load(runner, [(("abc",), {})])
        measured = await load.rate(1000, 0.05, poisson=poisson, seed=3)
        assert measured.completed == runner.stats().completed
        if not poisson:
            assert measured.completed in (50, 51)  # 0.05 s at 1000/s; the last may round either way
        assert measured.name == f"1000/s{' poisson' * poisson}"


async def test_requests_that_fail_are_counted_by_their_error():
    async with fake_scheduler(FakeBackend({"a": len}, auto=True, lanes=1)) as scheduler:
        runner = await scheduler.load("a.pt2", limits=Limits(jobs=1))
        load = Load(runner, [(("abc",), {})])
        measured = await load.clients(20, 0.05)
        assert set(measured.failed) == {"QueueFullError"}
        assert measured.completed > 0


@pytest.mark.parametrize(
    ("budget", "kept", "measured"),
    [
        ("p99=10ms", True, 0.01),
        ("p99=9ms", False, 0.01),
        ("mean=0.002", True, 0.002),
        ("throughput=100", True, 100.0),
        ("throughput=101", False, 100.0),
    ],
)
def test_a_budget_is_kept_or_missed(budget, kept, measured):
    verdict = bench._verdict(bench._budget(budget), level())
    assert (verdict.kept, verdict.measured, verdict.load) == (kept, measured, "8 clients")


def test_a_load_without_answers_or_with_failures_keeps_no_latency():
    budget = bench._budget("p99=1h")
    assert not bench._verdict(budget, level(latency=None)).kept
    assert not bench._verdict(budget, level(failed={"QueueFullError": 1})).kept


def test_the_same_loads_of_two_reports_are_compared(capsys):
    slower = level(throughput=50.0, latency=Percentiles(0.004, 0.002, 0.006, 0.02, 0.04))
    other = level(clients=None, rate=200.0, poisson=True)
    bench._compare(report(level(), other), report(slower))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["8", "clients", "2", "x", "0.5", "x", "0.5", "x"]
    assert lines[2].split() == ["200/s", "poisson", "-", "-", "-"]


def test_a_report_is_read_as_it_was_written(tmp_path):
    saved = tmp_path / "saved.json"
    saved.write_bytes(msgspec.json.encode(report(level())))
    assert bench._saved(saved) == report(level())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--clients", "1,x"), "'x' is no number of clients"),
        (("--clients", "1.5"), "'1.5' is no number of clients"),
        (("--rate", "-3"), "'-3' is no number of rate"),
        (("--budget", "p98=1ms"), "write one of p50, p90, p99, max, mean"),
        (("--budget", "p99=fast"), "'fast' is no time"),
        (("--budget", "throughput=much"), "'much' is no number"),
        (("--plot", "b.gif"), "no known kind of picture"),
        (("--save", "no/folder/s.json"), "does not exist"),
        (("--compare", "broken.json"), "broken.json: no report of bench"),
        (("--placement", "moon"), 'Choose from: "auto", "lane", "inline".'),
        (("--instances", "many"), "Invalid value"),
    ],
)
def test_a_wrong_bench_is_one_sentence(tmp_path, arguments, says):
    (tmp_path / "broken.json").write_text("{}")
    assert says in refused("bench", "m.pt2", *arguments, cwd=tmp_path)
