"""Tuning: proposes settings by simulation, and confirms the best few by real runs.

1. `Machine.timed` measures how long runs take, for each number of threads and instances.
2. A search over settings (`search`) asks the simulator what each would do, and ranks them.
3. `Machine.confirm` measures the first ones under load. What it says counts.

Times are in seconds.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from aoti_sched.cli.search import Climb, Point, Score, grid
from aoti_sched.config import Batching, DeviceConfig, Limits, ModelConfig, SchedulerConfig
from aoti_sched.percentiles import Percentiles, percentiles
from aoti_sched.simulation.device import Costs
from aoti_sched.simulation.replay import Arrival, replay
from aoti_sched.simulation.service_times import ServiceTimes

REQUESTS = 1500
"""Requests of a simulation: 15 of them are above the 99th percentile."""
_LOOKED_AT = 60
"""The most settings that are simulated."""
_FULL = 0.97
"""The part of what the lanes can do that a load may ask for. Beyond it, queues grow for ever."""
_STEPS = 6
"""Simulations by which the highest rate of a setting is found."""
_HOPELESS = 2
"""The most confirmations where the simulation finds no settings that keep the budget."""
_LESS, _MORE = 0.7, 1.15
"""By how much a rate is lowered that missed the budget, and raised when one was kept."""
_CLOSE = 1.03
"""By how much a rate is raised at least."""
_ALIKE = 2
"""The most of the confirmed settings that have the same threads and instances."""

Placing = Literal["auto", "lane", "inline"]


class Candidate(msgspec.Struct, frozen=True, order=True):
    """Settings of a model.

    Attributes:
        threads: Threads of a run.
        instances: Runs that may go on at once.
        max_size: The most requests of a batch; 1 without batching.
        max_delay: Seconds that a request waits for others to join its batch.
        placement: Where runs happen.
    """

    threads: int
    instances: int
    max_size: int = 1
    max_delay: float = 0.0
    placement: Placing = "auto"


class Axes(msgspec.Struct, frozen=True):
    """The values of each setting, rising."""

    threads: tuple[int, ...]
    instances: tuple[int, ...]
    max_size: tuple[int, ...]
    max_delay: tuple[float, ...]
    placement: tuple[Placing, ...]

    def at(self, point: Point) -> Candidate:
        """Return the candidate at a point of the grid."""
        axes = msgspec.structs.astuple(self)
        return Candidate(*(axis[index] for axis, index in zip(axes, point, strict=True)))


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted.

    Attributes:
        p99: The most seconds that 99 of 100 requests may take.
        rate: Requests in a second that must be served.
        maximize: "throughput" for the highest rate that keeps `p99`; None for the least 99th
            percentile at `rate`.
        poisson: Whether requests come at random.
        seed: The seed of these arrivals.
    """

    p99: float
    rate: float
    maximize: Literal["throughput"] | None = None
    poisson: bool = False
    seed: int = 0


class Timed(msgspec.Struct, frozen=True):
    """What was measured of runs with some threads and instances.

    Attributes:
        by_size: Seconds of runs, by the number of their requests.
        costs: What the event loop's own work costs.
    """

    by_size: dict[int, list[float]]
    costs: Costs = Costs()


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What settings do at a rate, simulated or measured.

    Attributes:
        rate: Requests that were due in a second.
        throughput: Answers in a second.
        latency: From the moment that a request is due to its answer.
        batch_size: Requests of a run, in the mean.
        cores: Cores that runs and the event loop keep busy.
        failed: Requests without an answer.
    """

    rate: float
    throughput: float
    latency: Percentiles | None
    batch_size: float
    cores: float
    failed: int

    @property
    def p99(self) -> float:
        """The 99th percentile of the latency; infinite where requests went without an answer."""
        return math.inf if self.latency is None or self.failed else self.latency.p99


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A confirmation.

    Attributes:
        candidate: The settings.
        predicted: What the simulator said.
        measured: What was measured.
        kept: Whether the budget was kept.
    """

    candidate: Candidate
    predicted: Figures
    measured: Figures
    kept: bool


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """The result.

    Attributes:
        best: The best confirmed settings; None where none keeps the budget.
        nearest: The trial that came nearest to the budget.
        trials: All confirmations, in their order.
        simulated: What the simulator said of the settings that it was asked for, the best first.
        settings: How many settings there are in all.
    """

    best: Trial | None
    nearest: Trial
    trials: tuple[Trial, ...]
    simulated: tuple[tuple[Candidate, Figures], ...]
    settings: int


class Machine(Protocol):
    """Where the model runs."""

    @property
    def cores(self) -> int:
        """Cores that all runs may use together."""

    def timed(self, threads: int, instances: int) -> Timed:
        """Measure how long runs take while `instances` of them go on."""

    def confirm(self, candidate: Candidate, rate: float) -> Figures:
        """Measure settings under a load."""


# --- what the simulator says ----------------------------------------------------------------------


class Predictor:
    """Simulates settings.

    Args:
        goal: What is wanted.
        cores: Cores of the machine.
        timed: What was measured, by threads and instances.
    """

    def __init__(self, goal: Goal, cores: int, timed: Mapping[tuple[int, int], Timed]) -> None:
        self._goal = goal
        self._cores = cores
        self._timed = timed
        self._arrivals = list(_arrivals(goal))

    def best(self, candidate: Candidate) -> Figures:
        """Return the figures of settings at the wanted rate, or at the highest that they keep."""
        if self._goal.maximize is None:
            return self.at(candidate, self._goal.rate)
        most = self.capacity(candidate)
        low, high = most / 32, most
        found = self.at(candidate, low)
        if found.p99 > self._goal.p99:
            return found
        for _ in range(_STEPS):
            middle = math.sqrt(low * high)
            figures = self.at(candidate, middle)
            if figures.p99 <= self._goal.p99:
                low, found = middle, figures
            else:
                high = middle
        return found

    def capacity(self, candidate: Candidate) -> float:
        """Return the requests in a second that the settings can serve at most."""
        timed = self._timed[candidate.threads, candidate.instances]
        times = ServiceTimes(timed.by_size)
        at_once = min(candidate.instances, max(1, self._cores // candidate.threads))
        sizes = {size for size in times.sizes if size <= candidate.max_size}
        best = max(size / times.typical(size) for size in {*sizes, candidate.max_size})
        if candidate.placement == "inline":
            at_once = 1
        own = timed.costs.request + timed.costs.run / candidate.max_size
        return min(at_once * best, 1 / own if own > 0 else math.inf) * _FULL

    def at(self, candidate: Candidate, rate: float) -> Figures:
        """Return the figures of settings at a rate."""
        if rate > self.capacity(candidate):
            return beyond(rate)
        timed = self._timed[candidate.threads, candidate.instances]
        arrivals = [Arrival(unit / rate, "model") for unit in self._arrivals]
        done = replay(
            arrivals,
            _config(candidate, self._cores),
            {"model": ServiceTimes(timed.by_size)},
            costs=timed.costs,
        )
        first = len(arrivals) // 5  # run times are learned, and queues fill
        kept = done.latencies[first:]
        answered = [latency for latency in kept if latency is not None]
        ends = [arrivals[first + n].at + s for n, s in enumerate(kept) if s is not None]
        seconds = max(ends, default=0.0) - arrivals[first].at
        runs, costs = len(done.runs), timed.costs
        busy = sum(run.finished - run.started for run in done.runs) * candidate.threads
        busy += len(arrivals) * costs.request + runs * costs.run
        whole = max(ends, default=0.0) - arrivals[0].at
        return Figures(
            rate=rate,
            throughput=len(answered) / seconds if seconds > 0 else 0.0,
            latency=percentiles(answered),
            batch_size=sum(run.batch_size for run in done.runs) / runs if runs else 0.0,
            cores=busy / whole if whole > 0 else 0.0,
            failed=len(kept) - len(answered),
        )


def beyond(rate: float) -> Figures:
    """Return the figures of a rate that was not simulated, since settings can't serve it."""
    return Figures(rate=rate, throughput=0.0, latency=None, batch_size=0.0, cores=0.0, failed=0)


def _arrivals(goal: Goal) -> Iterator[float]:
    """Yield when requests come at a rate of one in a second."""
    draw = random.Random(goal.seed)  # noqa: S311 -- arrivals, no secrets
    at = 0.0
    for _ in range(REQUESTS):
        yield at
        at += draw.expovariate(1.0) if goal.poisson else 1.0


def _config(candidate: Candidate, cores: int) -> SchedulerConfig:
    batching = None
    if candidate.max_size > 1:
        batching = Batching(max_size=candidate.max_size, max_delay=candidate.max_delay)
    model = ModelConfig(
        path="model",
        instances=candidate.instances,
        threads=candidate.threads,
        placement=candidate.placement,
        batching=batching,
        limits=Limits(),
    )
    device = DeviceConfig(lanes=cores, cores=cores)
    return SchedulerConfig(devices={"cpu": device}, models={"model": model})


# --- the search -----------------------------------------------------------------------------------


def allowed(candidate: Candidate, cores: int) -> bool:
    """Return whether settings make sense: what does nothing is left at its first value."""
    return (
        candidate.threads * candidate.instances <= max(cores, candidate.threads)
        and (candidate.max_delay == 0 or candidate.max_size > 1)
        and (candidate.placement != "inline" or candidate.threads == candidate.instances == 1)
    )


def every(axes: Axes, cores: int) -> list[Candidate]:
    """Return all settings that make sense."""
    found = [axes.at(point) for point in grid(msgspec.structs.astuple(axes))]
    return [candidate for candidate in found if allowed(candidate, cores)]


def tune(
    machine: Machine,
    axes: Axes,
    goal: Goal,
    *,
    tries: int = 8,
    tell: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Find the settings that serve a goal best.

    Args:
        machine: Where the model runs.
        axes: The settings to choose from.
        goal: What is wanted.
        tries: The most confirmations.
        tell: Hears in a few words what is done next.
    """
    pairs = sorted({(one.threads, one.instances) for one in every(axes, machine.cores)})
    timed = {}
    for threads, instances in pairs:
        tell(f"measuring runs of {threads} threads, {instances} at once")
        timed[threads, instances] = machine.timed(threads, instances)
    predictor = Predictor(goal, machine.cores, timed)
    ranked = _ranked(predictor, axes, goal, machine.cores, tell)
    confirming = _Confirming(machine, goal, tell)
    trials = confirming.of(list(_different(ranked)), tries)
    good = [trial for trial in trials if trial.kept]
    return Tuned(
        best=max(good, key=lambda trial: _score(trial.measured, goal), default=None),
        nearest=max(trials, key=lambda trial: _score(trial.measured, goal)),
        trials=tuple(trials),
        simulated=tuple(one for one in ranked if one[1].latency is not None),
        settings=len(every(axes, machine.cores)),
    )


def _ranked(
    predictor: Predictor, axes: Axes, goal: Goal, cores: int, tell: Callable[[str], None]
) -> list[tuple[Candidate, Figures]]:
    """Return the settings that were simulated, the best first."""
    figures: dict[Point, Figures] = {}
    highest = 0.0

    def score(point: Point) -> Score:
        nonlocal highest
        candidate = axes.at(point)
        tell(f"simulating {words(candidate)}")
        capacity = predictor.capacity(candidate)
        if goal.maximize is not None and capacity < highest:  # it can't be better
            figures[point] = beyond(capacity)
        else:
            figures[point] = predictor.best(candidate)
        if figures[point].p99 <= goal.p99:
            highest = max(highest, figures[point].rate)
        return _score(figures[point], goal)

    lengths = [len(axis) for axis in msgspec.structs.astuple(axes)]
    climb = Climb(lengths, score, allows=lambda p: allowed(axes.at(p), cores), limit=_LOOKED_AT)
    points = [point for point in grid(msgspec.structs.astuple(axes)) if not any(point[3:])]
    most: dict[tuple[int, int], Point] = {}
    for point in points:  # of each threads and instances the sizes that can serve most
        candidate = axes.at(point)
        if allowed(candidate, cores):
            pair = (candidate.threads, candidate.instances)
            if pair not in most or predictor.capacity(candidate) > predictor.capacity(
                axes.at(most[pair])
            ):
                most[pair] = point
    climb.run([*most.values(), (0,) * len(lengths)])
    return [(axes.at(point), figures[point]) for point in climb.best()]


def _score(figures: Figures, goal: Goal) -> Score:
    """Return how good figures are: first whether they keep the budget, then what is wanted."""
    p99 = figures.p99
    if p99 > goal.p99:
        return (0.0, -p99, figures.rate)
    return (1.0, figures.rate if goal.maximize is not None else -p99, -p99)


class _Confirming:
    """Measures settings, the best of the simulation first."""

    def __init__(self, machine: Machine, goal: Goal, tell: Callable[[str], None]) -> None:
        self._machine = machine
        self._goal = goal
        self._tell = tell
        self._trials: list[Trial] = []

    def of(self, ranked: Sequence[tuple[Candidate, Figures]], tries: int) -> list[Trial]:
        """Return the trials, at most `tries`."""
        if ranked[0][1].p99 > self._goal.p99:
            tries = min(tries, _HOPELESS)
        if self._goal.maximize is None:
            for candidate, predicted in ranked[:tries]:
                self._try(candidate, predicted, predicted.rate)
        else:
            self._look_for_rates(ranked[: 1 + tries // 3], tries)
            self._raise_the_best(tries)
        return self._trials

    def _look_for_rates(self, ranked: Sequence[tuple[Candidate, Figures]], tries: int) -> None:
        """Try settings at the rates that they are predicted to keep.

        Until one is kept, the rates are lowered: what a simulation leaves out makes all too high.
        """
        scale = 1.0
        for candidate, predicted in ranked:
            while len(self._trials) < tries:
                rate = scale * predicted.rate
                if self._trials and rate < self._goal.rate:
                    return
                if self._try(candidate, predicted, rate).kept or self._best() is not None:
                    break
                scale *= _LESS

    def _raise_the_best(self, tries: int) -> None:
        """Try higher rates with the best settings, between one that is kept and one that is not."""
        while len(self._trials) < tries and (best := self._best()) is not None:
            kept = best.measured.rate
            missed = [
                trial.measured.rate
                for trial in self._trials
                if trial.candidate == best.candidate and trial.measured.rate > kept
            ]
            rate = min([_MORE * kept, *(math.sqrt(kept * rate) for rate in missed)])
            if rate < _CLOSE * kept:
                return
            self._try(best.candidate, best.predicted, rate)

    def _best(self) -> Trial | None:
        kept = [trial for trial in self._trials if trial.kept]
        return max(kept, key=lambda trial: _score(trial.measured, self._goal), default=None)

    def _try(self, candidate: Candidate, predicted: Figures, rate: float) -> Trial:
        self._tell(f"confirming {words(candidate)} at {rate:.4g} requests in a second")
        measured = self._machine.confirm(candidate, rate)
        enough = rate >= self._goal.rate * (1 - 1e-9)
        trial = Trial(
            candidate=candidate,
            predicted=predicted,
            measured=measured,
            kept=enough and measured.p99 <= self._goal.p99,
        )
        self._trials.append(trial)
        return trial


def _different(
    ranked: Sequence[tuple[Candidate, Figures]],
) -> Iterator[tuple[Candidate, Figures]]:
    """Yield the settings in their order, and few of the same threads and instances at first.

    Settings that do the same as better ones in the simulation come last.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    seen = set()
    later, last = [], []
    for candidate, figures in ranked:
        pair = (candidate.threads, candidate.instances)
        does = (*pair, f"{figures.p99:.2g}", f"{figures.rate:.2g}", f"{figures.batch_size:.2g}")
        if does in seen:
            last.append((candidate, figures))
        elif pairs[pair] >= _ALIKE:
            later.append((candidate, figures))
        else:
            yield candidate, figures
        seen.add(does)
        pairs[pair] += 1
    yield from later
    yield from last


def words(candidate: Candidate) -> str:
    """Return settings in words."""
    parts = [f"threads {candidate.threads}", f"instances {candidate.instances}"]
    if candidate.max_size > 1:
        parts.append(f"batches of {candidate.max_size}")
    if candidate.max_delay:
        parts.append(f"delay {candidate.max_delay * 1e3:.3g} ms")
    if candidate.placement != "auto":
        parts.append(candidate.placement)
    return ", ".join(parts)
