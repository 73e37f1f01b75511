"""Tuning on a machine whose run times are known: as good as measuring all, in a tenth of the runs.

The machine is a simulation of its own: other requests, and runs that are drawn anew.
"""

import asyncio
import functools
import math
import random

import msgspec
import pytest

from aoti_sched.cli import predicting
from aoti_sched.cli.predicting import Candidate, Figures, Goal, Predictor, Timed, words
from aoti_sched.cli.tuning import Axes, allowed, every, tune
from aoti_sched.percentiles import Percentiles
from aoti_sched.simulation.device import Costs

COSTS = Costs(request=20e-6, run=10e-6, hop=100e-6)
AXES = Axes((1, 2), (1, 2), (1, 2, 4, 8, 16, 32), (0.0, 0.001, 0.004), ("auto",))
TRIES = 4


class Known:
    """A run takes `first` seconds and `each` for each request; two threads gain 1.3."""

    cores = 2

    def __init__(self, goal, first=0.002, each=0.0002):
        self.goal = msgspec.structs.replace(goal, seed=goal.seed + 1000)
        self.first, self.each = first, each
        self.confirmed = []

    def times(self, threads, count, sizes, seed):
        draw = random.Random(seed)
        gain = 1.3 if threads == 2 else 1.0
        return {
            size: [
                (self.first + self.each * size) / gain * draw.lognormvariate(0, 0.1)
                for _ in range(count)
            ]
            for size in sizes
        }

    async def timed(self, threads, instances):
        few = self.times(threads, 9, (1, 2, 4, 8, 16, 32), seed=threads * 10 + instances)
        return Timed(few, COSTS)

    def at(self, candidate, rate):
        many = self.times(candidate.threads, 100, range(1, 33), seed=77)
        pair = (candidate.threads, candidate.instances)
        return Predictor(self.goal, self.cores, {pair: Timed(many, COSTS)}).at(candidate, rate)

    async def confirm(self, candidate, rate):
        self.confirmed.append(candidate)
        return await asyncio.to_thread(self.at, candidate, rate)  # its loop is one of its own

    def keeps(self, candidate, rate):
        return self.at(candidate, rate).p99 <= self.goal.p99

    def highest(self, candidate, least):
        """The highest rate that keeps the budget, within 4 %; `least` where it is no higher."""
        if not self.keeps(candidate, least):
            return least
        low, high = least, 20_000.0
        while high / low > 1.04:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.keeps(candidate, middle) else (low, middle)
        return low


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(predicting, "REQUESTS", 500)


@pytest.mark.parametrize("rate", [300.0, 1500.0])
def test_the_lowest_p99_is_found_in_a_tenth_of_the_runs(rate):
    goal = Goal(p99=0.05, rate=rate, poisson=True, seed=3)
    machine = Known(goal)
    found = asyncio.run(tune(machine, AXES, goal, tries=TRIES))
    everything = every(AXES, machine.cores)
    assert found.settings == len(everything)
    assert len(machine.confirmed) == len(found.trials) <= TRIES <= len(everything) / 10
    least = min(machine.at(candidate, rate).p99 for candidate in everything)
    assert found.best.kept
    assert found.best.measured.p99 <= 1.1 * least


def test_the_highest_rate_is_found_in_a_tenth_of_the_runs():
    goal = Goal(p99=0.02, rate=100.0, maximize="throughput", seed=5)
    machine = Known(goal)
    found = asyncio.run(tune(machine, AXES, goal, tries=TRIES))
    everything = every(AXES, machine.cores)
    assert len(machine.confirmed) == len(found.trials) <= TRIES <= len(everything) / 10
    # Only settings with large batches can win: a batch of 4 serves less than half of the best.
    large = [c for c in everything if c.max_size >= 8 and c.max_delay in (0.0, 0.004)]
    highest = functools.reduce(lambda least, one: machine.highest(one, least), large, 50.0)
    assert not any(machine.keeps(c, highest) for c in everything if c.max_size == 4)
    assert found.best.measured.rate >= 0.9 * highest


def test_a_budget_that_nothing_keeps_has_a_nearest_trial():
    goal = Goal(p99=0.001, rate=300.0)  # a run alone takes 1.5 ms and more
    machine = Known(goal)
    found = asyncio.run(tune(machine, AXES, goal, tries=TRIES))
    assert found.best is None
    assert 1 <= len(found.trials) <= 2
    assert not any(trial.kept for trial in found.trials)
    assert found.nearest.measured.p99 == min(trial.measured.p99 for trial in found.trials)


def test_a_rate_that_nothing_serves_is_not_simulated():
    goal = Goal(p99=0.05, rate=1e6)
    found = asyncio.run(tune(Known(goal), AXES, goal, tries=1))
    assert found.best is None
    assert found.simulated == ()


def test_a_rate_below_the_wanted_one_keeps_nothing():
    goal = Goal(p99=0.02, rate=50_000.0, maximize="throughput")
    found = asyncio.run(tune(Known(goal), AXES, goal, tries=2))
    assert found.best is None
    assert found.nearest.measured.rate < goal.rate


async def test_a_tuning_that_is_cancelled_stops_simulating():
    loop = asyncio.get_running_loop()
    goal = Goal(p99=0.05, rate=300.0)
    told = []

    def tell(text):
        if text.startswith("simulating"):
            told.append(text)
            loop.call_soon_threadsafe(task.cancel)

    task = asyncio.ensure_future(tune(Known(goal), AXES, goal, tell=tell))
    with pytest.raises(asyncio.CancelledError):
        await task
    await loop.shutdown_default_executor()
    assert 1 <= len(told) < len(every(AXES, 2)) / 2


def test_settings_that_change_nothing_are_left_out():
    axes = Axes((1, 2, 4), (1, 2, 4), (1, 8), (0.0, 0.001), ("auto", "lane", "inline"))
    found = every(axes, 4)
    assert len(found) == len(set(found))
    assert all(one.threads * one.instances <= 4 for one in found)
    assert all(one.max_size > 1 for one in found if one.max_delay)
    assert {(one.threads, one.instances) for one in found if one.placement == "inline"} == {(1, 1)}
    assert allowed(Candidate(4, 1), 2)  # as many threads as were asked for, on fewer cores
    assert not allowed(Candidate(2, 2), 2)


def test_requests_without_an_answer_keep_no_budget():
    some = Percentiles(1.0, 1.0, 1.0, 1.0, 1.0)
    figures = Figures(rate=1.0, throughput=1.0, latency=some, batch_size=1.0, cores=1.0, failed=0)
    assert figures.p99 == 1.0
    assert msgspec.structs.replace(figures, failed=1).p99 == math.inf
    assert msgspec.structs.replace(figures, latency=None).p99 == math.inf


def test_the_costs_of_the_loop_bound_a_rate():
    goal = Goal(p99=1.0, rate=1.0)
    timed = Timed({1: [1e-6], 2: [1e-6]}, Costs(request=1e-3, run=1e-3))
    predictor = Predictor(goal, 4, {(1, 4): timed})
    assert predictor.capacity(Candidate(1, 4)) == pytest.approx(0.97 * 500)
    assert predictor.capacity(Candidate(1, 4, 2)) == pytest.approx(0.97 / 1.5e-3)


def test_the_figures_of_a_simulation_are_what_its_times_say():
    goal = Goal(p99=1.0, rate=100.0)
    costs = Costs(request=1e-3, run=1e-3, hop=5e-4)
    figures = Predictor(goal, 2, {(2, 1): Timed({1: [4e-3]}, costs)}).at(Candidate(2, 1), 100.0)
    assert figures.latency.p50 == pytest.approx(6.5e-3)  # the loop's work, the run and the hop
    assert figures.throughput == pytest.approx(100.0, rel=0.01)
    assert figures.cores == pytest.approx(100 * (2 * 4e-3 + 2e-3), rel=0.01)
    assert (figures.batch_size, figures.failed) == (1.0, 0)


def test_settings_in_words():
    assert words(Candidate(1, 2)) == "threads 1, instances 2"
    assert words(Candidate(1, 1, 8, 0.002, "inline")) == (
        "threads 1, instances 1, batches of 8, delay 2 ms, inline"
    )
