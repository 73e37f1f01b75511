"""Measuring: a model on this machine, for `tune`. Times are in seconds."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from aoti_sched.cli.failures import UsageError
from aoti_sched.cli.load import Load
from aoti_sched.cli.predicting import Candidate, Figures, Goal, Placing, Timed
from aoti_sched.cli.tuning import Axes
from aoti_sched.errors import ConfigError
from aoti_sched.simulation.device import Costs

if TYPE_CHECKING:
    from aoti_sched.cli.inputs import Arguments
    from aoti_sched.runner import Runner

_VARIANTS = 8
"""How many different requests are made up, and sent in turn."""
_ROUNDS_SECONDS = 0.25
"""How long runs of one size are measured."""
_MOST_ROUNDS = 200
_LARGEST = 64
"""The most requests of a batch that are tried by default."""
_PATIENCE = 20
"""A confirmation gives a request this many times the budget. An overload then ends soon."""
_SHORT = 1e-3
"""Seconds: only runs below it are worth a run on the event loop's own thread."""


class RealMachine:
    """The model on this machine.

    Args:
        package: The package.
        model: The name of the model in it.
        goal: What is wanted.
        lengths: Seconds of a warm-up and of a confirmation.
        made: Inputs, sizes and the seed, as of `bench`.

    Attributes:
        rows: Rows of a request.
        cores: Cores that runs may use.
        known: What was measured, by threads and instances.
        notes: What could not be tried.
    """

    def __init__(
        self,
        package: Path,
        model: str | None,
        goal: Goal,
        lengths: tuple[float, float],
        made: tuple[tuple[str, ...], tuple[str, ...], int],
    ) -> None:
        self._package = package
        self._model = model
        self._goal = goal
        self._lengths = lengths
        self._made = made
        self._requests: list[Arguments] = []
        self._most = 1
        self._thread_limit = 1
        self._sizes: tuple[int, ...] = (1,)
        self.rows = 1
        self.cores = 1
        self.known: dict[tuple[int, int], Timed] = {}
        self.notes: list[str] = []

    async def look(self) -> None:
        """Load the model once, and find out what there is to choose from."""
        from aoti_sched import Scheduler
        from aoti_sched.backends.cpu import available_cores
        from aoti_sched.cli.inputs import Inputs
        from aoti_sched.cli.loading import wrapper_of

        self.cores = available_cores()
        given, sizes, seed = self._made
        async with Scheduler() as scheduler:
            settings: dict[str, Any] = {"model_name": self._model, "threads": self.cores}
            try:
                runner = await scheduler.load(self._package, batching=True, **settings)
            except ConfigError as error:
                self.notes.append(f"No batches were tried: {error}".rstrip(".") + ".")
                runner = await scheduler.load(self._package, **settings)
            info = runner.info
            inputs = Inputs(info, wrapper_of(self._package, self._model), given, sizes)
            self._requests = [inputs.arguments(seed + index) for index in range(_VARIANTS)]
            await Load(runner, self._requests).probe()
            args, kwargs = self._requests[0]
            future = runner.submit(*args, **kwargs)
            await future
            self.rows = max(1, future.trace.rows)
            self._most = max(1, info.max_batch // self.rows)
            self._thread_limit = info.threads

    async def axes(self, chosen: dict[str, Any]) -> Axes:
        """Return the settings to choose from: what the user has chosen, or the usual ones."""
        threads = chosen["threads"] or _powers(self.cores)
        possible = tuple(n for n in threads if n <= self._thread_limit)
        if not possible:
            raise UsageError(
                f"--threads {','.join(map(str, threads))}: runs of this model use at most "
                f"{self._thread_limit} threads here."
            )
        sizes = chosen["max_size"] or _powers(min(self._most, _LARGEST))
        self._sizes = tuple(n for n in sizes if n <= self._most) or (1,)
        budget = self._goal.p99
        delays = (0.0, budget / 20, budget / 8, budget / 3)
        return Axes(
            threads=possible,
            instances=chosen["instances"] or _powers(self.cores),
            max_size=self._sizes,
            max_delay=chosen["max_delay"] or delays,
            placement=chosen["placement"] or await self._placements(possible),
        )

    async def _placements(self, threads: Sequence[int]) -> tuple[Placing, ...]:
        """Return where runs may happen; for that, runs on one instance are measured."""
        alone = await self.timed(threads[0], 1)
        short = threads[0] == 1 and median(alone.by_size[1]) < _SHORT
        return ("auto", "lane", "inline") if short else ("auto",)

    async def timed(self, threads: int, instances: int) -> Timed:
        """Measure how long runs take while `instances` of them go on."""
        if (threads, instances) not in self.known:
            self.known[threads, instances] = await self._timed(threads, instances)
        return self.known[threads, instances]

    async def _timed(self, threads: int, instances: int) -> Timed:
        from aoti_sched import Batching, Scheduler

        by_size: dict[int, list[float]] = {}
        loop_seconds: dict[int, float] = {}
        hop = 0.0
        for size in sorted({1, *self._sizes}):
            rule = Batching(max_size=size * self.rows, max_seconds=math.inf) if size > 1 else None
            async with Scheduler() as scheduler:
                runner = await scheduler.load(
                    self._package,
                    model_name=self._model,
                    threads=threads,
                    instances=instances,
                    batching=rule,
                    placement="lane",
                )
                await Load(runner, self._requests).probe()
                if size == 1:
                    hop = await self._hop(runner)
                times, loop_seconds[size] = await self._rounds(runner, size, instances)
            if not times:  # the scheduler makes no batch of this size: its rows take longer
                break
            by_size[size] = times
            if median(times) > self._goal.p99:
                break
        return Timed(by_size, _costs(loop_seconds, hop))

    async def _hop(self, runner: Runner) -> float:
        """Return how much longer an answer takes than its run, where nothing is in the way."""
        more: list[float] = []
        until = clock.perf_counter() + _ROUNDS_SECONDS
        while not more or (clock.perf_counter() < until and len(more) < _MOST_ROUNDS):
            args, kwargs = self._requests[len(more) % _VARIANTS]
            began = clock.perf_counter()
            future = runner.submit(*args, **kwargs)
            await future
            more.append(clock.perf_counter() - began - future.trace.run_seconds)
        return max(0.0, median(more))

    async def _rounds(self, runner: Runner, size: int, instances: int) -> tuple[list[float], float]:
        """Return the seconds of runs of a size, and of the loop's own work for each request."""
        found: list[float] = []
        rounds, requests, busy = 0, 0, 0.0
        until = clock.perf_counter() + _ROUNDS_SECONDS
        while rounds < 2 or (clock.perf_counter() < until and rounds < _MOST_ROUNDS):
            began = clock.thread_time()
            futures = [
                runner.submit(*args, **kwargs)
                for args, kwargs in (self._requests[n % _VARIANTS] for n in range(size * instances))
            ]
            for future in futures:
                await future
            if rounds:  # the first round warms up
                busy += clock.thread_time() - began
                requests += len(futures)
                traces = [future.trace for future in futures]
                runs = {(t.slot, t.started): t for t in traces if t.batch_size == size}
                found += [trace.run_seconds for trace in runs.values()]
            rounds += 1
        return found, busy / requests

    async def confirm(self, candidate: Candidate, rate: float) -> Figures:
        """Measure settings under a load."""
        from aoti_sched import Batching, Scheduler

        batching = None
        if candidate.max_size > 1:
            rows = candidate.max_size * self.rows
            batching = Batching(max_size=rows, max_delay=candidate.max_delay)
        async with Scheduler() as scheduler:
            runner = await scheduler.load(
                self._package,
                model_name=self._model,
                threads=candidate.threads,
                instances=candidate.instances,
                batching=batching,
                placement=candidate.placement,
                timeout=max(1.0, _PATIENCE * self._goal.p99),
            )
            load = Load(runner, self._requests)
            await load.probe()
            goal = self._goal
            for length in self._lengths:
                level = await load.rate(rate, length, poisson=goal.poisson, seed=goal.seed)
        return Figures(
            rate=rate,
            throughput=level.throughput,
            latency=level.latency,
            batch_size=level.batch_size,
            cores=level.cores,
            failed=sum(level.failed.values()),
        )


def _costs(loop_seconds: dict[int, float], hop: float) -> Costs:
    """Divide the loop's work into a part for each run and a part for each request."""
    alone, most = loop_seconds[1], max(loop_seconds)
    run = 0.0
    if most > 1:
        run = max(0.0, alone - loop_seconds[most]) / (1 - 1 / most)
        run = min(run, alone)
    request = alone - run
    return Costs(request=request, run=run, hop=max(0.0, hop - alone))


def _powers(most: int) -> tuple[int, ...]:
    """Return the powers of two up to a number, and the number."""
    powers = [1 << bit for bit in range(most.bit_length()) if 1 << bit <= most]
    return tuple(dict.fromkeys([*powers, most]))
