"""Predicting: what the simulator says that settings of a model would do. Times are in seconds."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from aoti_sched.config import Batching, DeviceConfig, Limits, ModelConfig, SchedulerConfig
from aoti_sched.percentiles import Percentiles, percentiles
from aoti_sched.simulation.device import Costs
from aoti_sched.simulation.replay import Arrival, replay
from aoti_sched.simulation.service_times import ServiceTimes

REQUESTS = 1500
"""Requests of a simulation: 15 of them are above the 99th percentile."""
_FULL = 0.97
"""The part of what the lanes can do that a load may ask for. Beyond it, queues grow for ever."""
_STEPS = 6
"""Simulations by which the highest rate of a setting is found."""

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
