"""The simulated world: requests drawn beforehand, devices whose lanes only count time, and the
very core that serves them otherwise.

Every device is a `DeviceQueue` of its own, fed with facts at virtual times. A run takes the time
that was drawn for its request, and nothing else takes any. All numbers come from the scenario's
seed. Times are seconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aoti_sched.engine.traces import loaded_of, run_of, trace_of
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.commands import Command, Launch, WakeAt
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.policy import Policy
from aoti_sched.recording import Recording

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHUNK = 65_536
"""Requests that are Python objects at a time."""

WARM = 0.1
"""The first part of a trace, in which queues fill and service times are learned.

It is not measured,
"""
COOL = 0.05
"""and neither is its last part, after which nothing comes any more."""


# --- what is asked for ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """What is asked of what.

    `load` is the work that comes, as a multiple of what all lanes together can do.

    Models are asked for as Zipf's law has it, with exponent `skew`, and tenants ask with exponent
    `tenant_skew`. A model's mean run lies between the two of `runs`, spaced evenly in the
    logarithm; a single run deviates from it by a factor that is log-normal with sigma `spread`.
    Where models are `even`, popularity is of work and not of requests: the quick ones are asked for
    more often. A request's timeout is one of `timeouts`, plus three of its model's mean runs;
    without any, it has none. `classes` are the parts of the requests that are of high, normal and
    low priority. `shares` are those of the models, in turn; without, all have the same. `bounds`
    are how many jobs a model and a device may have queued.
    """

    requests: int = 200_000
    load: float = 1.0
    trace: str = "poisson"
    devices: int = 4
    lanes: int = 4
    models: int = 200
    tenants: int = 8
    skew: float = 1.0
    tenant_skew: float = 1.0
    even: bool = False
    runs: tuple[float, float] = (0.001, 0.05)
    spread: float = 0.25
    timeouts: tuple[float, ...] = (0.1, 0.5, 2.0)
    classes: tuple[float, float, float] = (0.1, 0.6, 0.3)
    shares: tuple[float, ...] = ()
    bounds: tuple[int, int] = (1024, 4096)
    seed: int = 1


@dataclass(frozen=True)
class Rules:
    """By what the core decides: a device's policy, and what runners ask for."""

    name: str
    note: str
    policy: Policy = field(default_factory=Policy)
    classes: bool = True
    predicts: bool = False
    sheds: bool = False


_ARRIVAL = Policy(order="arrival", fair=False, expire_late=False)
RULES = {
    rules.name: rules
    for rules in (
        Rules("fifo", "first come, first served; one class", _ARRIVAL, classes=False),
        Rules("priority", "and priority classes", _ARRIVAL),
        Rules(
            "edf",
            "and, within a class, the earliest deadline",
            Policy(fair=False, expire_late=False),
        ),
        Rules("fair", "and, before that, fair shares", Policy(expire_late=False)),
        Rules("default", "and late requests are not started"),
        Rules("predictive", "default, and those that would be late are refused", predicts=True),
        Rules("shed", "default, and full queues drop the worst", sheds=True),
    )
}
"""Each has one rule more than the one before, the last two than "default", which is what a
scheduler does when nothing else is asked for.
"""


# --- arrivals -------------------------------------------------------------------------------------


def _steady(_: np.random.Generator, until: float) -> tuple[Floats, Floats]:
    return np.array([0.0, until]), np.array([0.0, until])


def _bursty(random: np.random.Generator, until: float) -> tuple[Floats, Floats]:
    """On for a quarter of the time, for half a second on average, with 3.25 times the mean
    rate; else with a quarter of it.
    """
    pairs = max(16, math.ceil(until / 2.0 * 1.5) + 64)
    spans = np.empty(2 * pairs)
    spans[0::2] = random.exponential(1.5, pairs)
    spans[1::2] = random.exponential(0.5, pairs)
    rates = np.tile([0.25, 3.25], pairs)
    return _from_zero(spans), _from_zero(spans * rates)


def _diurnal(_: np.random.Generator, until: float) -> tuple[Floats, Floats]:
    """Two days, each a sine between a fifth and nine fifths of the mean rate."""
    time = np.linspace(0.0, until, 4096)
    day = until / 2.0
    work = time + 0.8 * day / (2.0 * math.pi) * (np.cos(2.0 * math.pi * time / day) * -1.0 + 1.0)
    return time, work


TRACES = {"poisson": _steady, "bursty": _bursty, "diurnal": _diurnal}
"""Each gives times, and what has come until then where one second of the mean rate is 1."""


def _from_zero(steps: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(steps)])


class Requests:
    """All requests of a scenario, one array per column, in the order in which they come."""

    def __init__(self, scenario: Scenario) -> None:
        random = np.random.default_rng(scenario.seed)
        count = scenario.requests
        self.scenario = scenario
        self.mean: Floats = np.geomspace(*scenario.runs, scenario.models)
        self.popularity = _zipf(scenario.models, scenario.skew)
        random.shuffle(self.popularity)
        if scenario.even:
            self.popularity /= self.mean
            self.popularity /= self.popularity.sum()
        self.capacity = scenario.devices * scenario.lanes / float(self.popularity @ self.mean)
        """Requests of this mix that all lanes together can run in a second."""
        unit = np.cumsum(random.exponential(1.0, count)) / (scenario.load * self.capacity)
        times, work = TRACES[scenario.trace](random, float(unit[-1]))
        self.at: Floats = np.interp(unit, work, times)
        self.model: Ints = random.choice(scenario.models, count, p=self.popularity)
        self.tenant: Ints = random.choice(
            scenario.tenants, count, p=_zipf(scenario.tenants, scenario.tenant_skew)
        )
        self.priority: Ints = random.choice(
            len(Priority), count, p=np.array(scenario.classes) / sum(scenario.classes)
        )
        deviation = scenario.spread * random.standard_normal(count) - scenario.spread**2 / 2.0
        self.service: Floats = self.mean[self.model] * np.exp(deviation)
        if scenario.timeouts:
            self.timeout = random.choice(scenario.timeouts, count) + 3.0 * self.mean[self.model]
        else:
            self.timeout = np.full(count, np.inf)
        self.draws: Floats = random.random((count, 2))  # the router's

    def each(self) -> Iterator[tuple[float, int, int, int, float, list[float]]]:
        columns = (self.at, self.model, self.tenant, self.priority, self.timeout, self.draws)
        for first in range(0, len(self.at), CHUNK):
            yield from zip(
                *(column[first : first + CHUNK].tolist() for column in columns), strict=True
            )

    @property
    def window(self) -> tuple[float, float]:
        """What is measured."""
        return WARM * float(self.at[-1]), (1.0 - COOL) * float(self.at[-1])


def _zipf(count: int, skew: float) -> Floats:
    weights = 1.0 / np.arange(1, count + 1) ** skew
    return weights / weights.sum()


# --- the devices ----------------------------------------------------------------------------------


def places(requests: Requests) -> list[list[int]]:
    """Which devices have each model: those to which least work was given so far, the model with
    most work first.

    A model is put on twice as many devices as its work keeps busy, on one at least.
    """
    scenario = requests.scenario
    work = requests.popularity * requests.mean
    work *= scenario.devices / work.sum()
    given = [(0.0, device) for device in range(scenario.devices)]
    found: list[list[int]] = [[] for _ in range(scenario.models)]
    for model in np.argsort(-work).tolist():
        copies = min(scenario.devices, math.ceil(2.0 * work[model]))
        chosen = heapq.nsmallest(copies, given)
        for load, device in chosen:
            given[device] = (load + float(work[model]) / copies, device)
        found[model] = [device for _, device in chosen]
    return found


class Simulation:
    """Runs a scenario by some rules, once.

    A request goes to one of the devices that have its model: of two drawn at random, to that with
    less work under way, by the mean runs of their models. `state` is how each request ended,
    `ended` when that was, `device` where it went, and `home` when its run was over, if it ran.

    A `recording` gets what a real scheduler would tell it, and saves the very same timeline.
    """

    def __init__(
        self, requests: Requests, rules: Rules, recording: Recording | None = None
    ) -> None:
        scenario = requests.scenario
        count = scenario.requests
        self.requests = requests
        self.rules = rules
        self.recording = recording
        self.now = 0.0
        self.facts = 0
        self.state = bytearray(count)
        self.ended = array("d", bytes(8 * count))
        self.device = array("h", bytes(2 * count))
        self.home = array("d", bytes(8 * count))
        self._events: list[tuple[float, int, int, Job | None]] = []
        self._work = [0.0] * scenario.devices
        self._wakes: list[float | None] = [None] * scenario.devices
        self._service = requests.service.tolist()
        self._mean = requests.mean.tolist()
        self._model = requests.model
        self.queues = [
            DeviceQueue(
                f"device {n}", scenario.lanes, Bounds(scenario.bounds[1]), policy=rules.policy
            )
            for n in range(scenario.devices)
        ]
        shares = itertools.cycle(scenario.shares or (1.0,))
        bounds = Bounds(scenario.bounds[0])
        self._places = [
            [
                (
                    device,
                    self.queues[device].add_runner(
                        f"model {model}",
                        scenario.lanes,
                        bounds,
                        share=share,
                        sheds=rules.sheds,
                        predicts=rules.predicts,
                    ),
                )
                for device in devices
            ]
            for model, (devices, share) in enumerate(zip(places(requests), shares, strict=False))
        ]

        if recording is not None:
            for queue in self.queues:
                for runner in queue.runners.values():
                    recording.loaded(loaded_of(queue, runner))

    def run(self) -> None:
        """To the end of the last request."""
        events, queues, work, means = self._events, self.queues, self._work, self._mean
        classes, timed = self.rules.classes, bool(self.requests.scenario.timeouts)
        normal = Priority.NORMAL.value
        for index, (at, model, tenant, priority, timeout, draws) in enumerate(self.requests.each()):
            if events and events[0][0] <= at:
                self._until(at)
            copies = self._places[model]
            device, runner = copies[0]
            if len(copies) > 1:
                device, runner = copies[int(draws[0] * len(copies))]
                other = copies[int(draws[1] * len(copies))]
                if work[other[0]] < work[device]:
                    device, runner = other
            job = Job(
                runner,
                priority if classes else normal,
                at + timeout if timed else None,
                1,
                False,
                index,
                tenant=tenant,
            )
            self.device[index] = device
            work[device] += means[model]
            self.now = at
            commands = queues[device].submit(job, at)
            if commands:
                self._perform(device, commands)
        self._until(math.inf)
        self.facts += len(self.state)

    def _until(self, time: float) -> None:
        """Everything that happens no later."""
        events, queues, wakes = self._events, self.queues, self._wakes
        while events and events[0][0] <= time:
            now, _, device, job = heapq.heappop(events)
            if job is None:
                if wakes[device] != now:
                    continue
                wakes[device] = None
            self.now = now
            self.facts += 1
            if job is None:
                commands = queues[device].tick(now)
            else:
                if self.recording is not None:
                    self._record_run(job, queues[device])
                commands = queues[device].complete(job, now)
                self.home[job.payload] = now
                self._is_gone(device, job.payload)
                if job.state is JobState.DONE:
                    self._ends(job)
            if commands:
                self._perform(device, commands)

    def _perform(self, device: int, commands: Sequence[Command]) -> None:
        for command in commands:
            kind = type(command)
            if kind is Launch:
                job = command.job  # type: ignore[union-attr]
                end = self.now + self._service[job.payload]
                heapq.heappush(self._events, (end, job.payload, device, job))
            elif kind is WakeAt:
                at = self._wakes[device] = command.at  # type: ignore[union-attr]
                heapq.heappush(self._events, (at, -1, device, None))
            else:
                job = command.job  # type: ignore[union-attr]
                self._ends(job)
                if job.lane < 0:
                    self._is_gone(device, job.payload)

    def _ends(self, job: Job) -> None:
        """For its caller."""
        index = job.payload
        if self.state[index]:
            raise RuntimeError(
                f"request {index} has ended twice: {JobState(self.state[index]).name}, "
                f"{job.state.name}"
            )
        self.state[index] = job.state
        self.ended[index] = self.now
        if self.recording is not None:
            self.recording.finished(trace_of(job, self.queues[self.device[index]]))

    def _record_run(self, job: Job, queue: DeviceQueue) -> None:
        """A run that is over, before the queue hears of it."""
        run = run_of(
            job, queue, size=1, started=job.started, finished=self.now, now=self.now, ok=True
        )
        self.recording.ran(run)  # type: ignore[union-attr]

    def _is_gone(self, device: int, index: int) -> None:
        self._work[device] -= self._mean[self._model[index]]


# --- what came of it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One simulation's figures, of the measured part of its trace.

    ends: How many of all requests ended how.
    goodput: Answers within their deadlines, as a multiple of the requests of this mix that all
    lanes together can run.
    useful, busy: The part of all lanes' time that went into those answers, and into runs at all.
    kept: The part of the requests that were answered in time, for high, normal and low priority.
    p50, p99, mean: Seconds from a request's arrival to its answer, among those that had one.
    jain, least: How evenly models were served. A model's lot is the device time it got over what it
        should have had (`entitled`). Jain's index of the lots is 1 where all are equal, and 1/n
        where one of n has everything; `least` is the mean of the tenth with the least.
    by_model, by_tenant: The part of all lanes' time that each of them asked for, and that it got.
    """

    rules: str
    scenario: Scenario
    seconds: float
    ends: Mapping[str, int]
    goodput: float
    useful: float
    busy: float
    kept: tuple[float, ...]
    p50: float
    p99: float
    mean: float
    jain: float
    least: float
    by_model: tuple[Floats, ...]
    by_tenant: tuple[Floats, ...]


def measure(simulation: Simulation) -> Outcome:
    """What became of the requests that came in the measured part, and of the lanes' time in it."""
    requests, scenario = simulation.requests, simulation.requests.scenario
    begin, end = requests.window
    state = np.frombuffer(simulation.state, np.uint8)
    ended = np.frombuffer(simulation.ended, np.float64)
    home = np.frombuffer(simulation.home, np.float64)
    came = (requests.at >= begin) & (requests.at < end)
    answered = state == JobState.DONE
    now = answered & (ended >= begin) & (ended < end)
    ran = (home >= begin) & (home < end)
    latency = (ended - requests.at)[now]
    everything = (end - begin) * scenario.devices * scenario.lanes

    def by(what: Ints, count: int, *parts: NDArray[np.bool_]) -> tuple[Floats, ...]:
        return tuple(
            np.bincount(what[part], requests.service[part], count) / everything for part in parts
        )

    right = _entitled_models(simulation, came) / everything
    (got,) = by(requests.model, scenario.models, came & (home > 0.0))
    lots = np.sort(got[right > 0.0] / right[right > 0.0])
    return Outcome(
        rules=simulation.rules.name,
        scenario=scenario,
        seconds=float(requests.at[-1]),
        ends={kind.name: int(count) for kind in JobState if (count := (state == kind).sum())},
        goodput=float(now.sum() / (end - begin) / requests.capacity),
        useful=float(requests.service[now].sum() / everything),
        busy=float(requests.service[ran].sum() / everything),
        kept=tuple(
            _mean(answered[came & (requests.priority == priority)]) for priority in Priority
        ),
        p50=float(np.percentile(latency, 50)) if len(latency) else math.nan,
        p99=float(np.percentile(latency, 99)) if len(latency) else math.nan,
        mean=_mean(latency),
        jain=float(lots.sum() ** 2 / (len(lots) * (lots**2).sum())) if lots.any() else math.nan,
        least=_mean(lots[: max(1, len(lots) // 10)]),
        by_model=by(requests.model, scenario.models, came, ran),
        by_tenant=by(requests.tenant, scenario.tenants, came, ran),
    )


def _mean(values: NDArray[np.generic]) -> float:
    return float(np.mean(values)) if len(values) else math.nan  # type: ignore[arg-type]


def _entitled_models(simulation: Simulation, came: NDArray[np.bool_]) -> Floats:
    """The device time that each model should have had: on each device, class after class."""
    requests, scenario = simulation.requests, simulation.requests.scenario
    begin, end = requests.window
    asked = np.zeros((scenario.devices, len(Priority), scenario.models))
    place = (
        np.frombuffer(simulation.device, np.int16)[came],
        requests.priority[came],
        requests.model[came],
    )
    np.add.at(asked, place, requests.service[came])
    shares = np.resize(scenario.shares or (1.0,), scenario.models)
    right = np.zeros(scenario.models)
    for of_device in asked:
        left = (end - begin) * scenario.lanes
        for of_class in of_device:
            given = entitled(of_class, shares, left)
            left -= given.sum()
            right += given
    return right


def entitled(asked: Floats, shares: Floats, seconds: float) -> Floats:
    """Who should get how much of so many seconds: what it asks for, or as much for its share as
    all others who ask for more.
    """
    given = np.zeros_like(asked)
    wanting = asked > 0.0
    while wanting.any() and seconds > 0.0:
        level = seconds / shares[wanting].sum()
        content = wanting & (asked <= level * shares)
        if not content.any():
            given[wanting] = level * shares[wanting]
            break
        given[content] = asked[content]
        seconds -= asked[content].sum()
        wanting &= ~content
    return given
