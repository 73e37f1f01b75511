"""Tuning: proposes settings by simulation, and confirms the best few by real runs.

1. `Machine.timed` measures how long runs take, for each number of threads and instances.
2. A search over settings (`search`) asks the simulator what each would do, and ranks them.
3. `Machine.confirm` measures the first ones under load. What it says counts.

Times are in seconds.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from aoti_sched.cli.predicting import (
    Candidate,
    Figures,
    Goal,
    Placing,
    Predictor,
    Timed,
    beyond,
    words,
)
from aoti_sched.cli.search import Climb, Point, Score, grid

_LOOKED_AT = 60
"""The most settings that are simulated."""
_HOPELESS = 2
"""The most confirmations where the simulation finds no settings that keep the budget."""
_LESS, _MORE = 0.7, 1.15
"""By how much a rate is lowered that missed the budget, and raised when one was kept."""
_CLOSE = 1.03
"""By how much a rate is raised at least."""
_ALIKE = 2
"""The most of the confirmed settings that have the same threads and instances."""


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

    async def timed(self, threads: int, instances: int) -> Timed:
        """Measure how long runs take while `instances` of them go on."""

    async def confirm(self, candidate: Candidate, rate: float) -> Figures:
        """Measure settings under a load."""


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


async def tune(
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
        timed[threads, instances] = await machine.timed(threads, instances)
    predictor = Predictor(goal, machine.cores, timed)
    stop = threading.Event()
    try:  # in a thread, since a simulation has an event loop of its own
        ranked = await asyncio.to_thread(_ranked, predictor, axes, goal, machine.cores, tell, stop)
    finally:
        stop.set()
    confirming = _Confirming(machine, goal, tell)
    trials = await confirming.of(list(_different(ranked)), tries)
    good = [trial for trial in trials if trial.kept]
    return Tuned(
        best=max(good, key=lambda trial: _score(trial.measured, goal), default=None),
        nearest=max(trials, key=lambda trial: _score(trial.measured, goal)),
        trials=tuple(trials),
        simulated=tuple(one for one in ranked if one[1].latency is not None),
        settings=len(every(axes, machine.cores)),
    )


def _ranked(
    predictor: Predictor,
    axes: Axes,
    goal: Goal,
    cores: int,
    tell: Callable[[str], None],
    stop: threading.Event,
) -> list[tuple[Candidate, Figures]]:
    """Return the settings that were simulated, the best first.

    Once `stop` is set, no further settings are simulated.
    """
    figures: dict[Point, Figures] = {}
    highest = 0.0

    def score(point: Point) -> Score:
        nonlocal highest
        candidate = axes.at(point)
        if stop.is_set():
            figures[point] = beyond(0.0)
            return _score(figures[point], goal)
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

    async def of(self, ranked: Sequence[tuple[Candidate, Figures]], tries: int) -> list[Trial]:
        """Return the trials, at most `tries`."""
        if ranked[0][1].p99 > self._goal.p99:
            tries = min(tries, _HOPELESS)
        if self._goal.maximize is None:
            for candidate, predicted in ranked[:tries]:
                await self._try(candidate, predicted, predicted.rate)
        else:
            await self._look_for_rates(ranked[: 1 + tries // 3], tries)
            await self._raise_the_best(tries)
        return self._trials

    async def _look_for_rates(
        self, ranked: Sequence[tuple[Candidate, Figures]], tries: int
    ) -> None:
        """Try settings at the rates that they are predicted to keep.

        Until one is kept, the rates are lowered: what a simulation leaves out makes all too high.
        """
        scale = 1.0
        for candidate, predicted in ranked:
            while len(self._trials) < tries:
                rate = scale * predicted.rate
                if self._trials and rate < self._goal.rate:
                    return
                await self._try(candidate, predicted, rate)
                if self._best() is not None:
                    break
                scale *= _LESS

    async def _raise_the_best(self, tries: int) -> None:
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
            await self._try(best.candidate, best.predicted, rate)

    def _best(self) -> Trial | None:
        kept = [trial for trial in self._trials if trial.kept]
        return max(kept, key=lambda trial: _score(trial.measured, self._goal), default=None)

    async def _try(self, candidate: Candidate, predicted: Figures, rate: float) -> None:
        self._tell(f"confirming {words(candidate)} at {rate:.4g} requests in a second")
        measured = await self._machine.confirm(candidate, rate)
        enough = rate >= self._goal.rate * (1 - 1e-9)
        trial = Trial(
            candidate=candidate,
            predicted=predicted,
            measured=measured,
            kept=enough and measured.p99 <= self._goal.p99,
        )
        self._trials.append(trial)


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
