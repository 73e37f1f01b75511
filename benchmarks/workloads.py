"""The workloads (a) to (e), and the list of them all.

(a) to (c) and (e) run a model under clients, (d) the scheduler alone; those of live weights are in
`live_weights.py`, those of batching in `batching.py`, and what it costs to watch in
`watching.py`.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aoti_sched import Scheduler
from aoti_sched.backends.cpu import available_cores
from aoti_sched.config import DeviceConfig, Limits, SchedulerConfig
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.commands import Launch
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import Job
from aoti_sched.testing import FakeBackend

from . import batching, live_weights, models, watching
from . import contestants as field_of
from .clients import ask, many_clients, serving
from .contestants import Contestant, Run, Setting
from .measure import LAGS, lag_figures, percentile, ticker
from .plan import Entrant, Figure, Measured, Opened, Scale, Target, Workload

# --- (a) to (c), (e): a model under clients -------------------------------------------------------


async def one_client(
    contestant: Contestant, setting: Setting, run: Run, seconds: float
) -> Measured:
    """Requests one after the other, each timed."""
    del setting
    times = []
    now = time.perf_counter()
    until = now + seconds
    while now < until:
        asked = time.perf_counter()
        if contestant.blocking:
            run()
        else:
            await run()
        now = time.perf_counter()
        times.append(now - asked)
    return Measured({"p50": percentile(times, 50), "p99": percentile(times, 99)})


async def heavy_runs(
    contestant: Contestant, setting: Setting, run: Run, seconds: float
) -> Measured:
    """Runs per second, and how late the loop wakes whoever sleeps meanwhile."""

    async def kindly() -> None:
        run()
        await asyncio.sleep(
            0
        )  # as kind as such code can be: other tasks get a turn between two runs

    async with ticker() as lags:
        started = time.perf_counter()
        call = kindly if contestant.blocking else run
        until = started + seconds
        requests = sum(await asyncio.gather(*(ask(call, until) for _ in range(setting.clients))))
        took = time.perf_counter() - started
    return Measured({"rate": requests / took, **lag_figures(lags)})


async def _many_requests(requests: int, run: Run, clients: int) -> None:
    left = iter(range(requests))

    async def client() -> None:
        for _ in left:
            await run()

    await asyncio.gather(*(client() for _ in range(clients)))


def million(requests: int) -> Callable[[Contestant, Setting, Run, float], Awaitable[Measured]]:
    """What the process holds, looked at ten times over so many requests, after a tenth of them
    to warm up.
    """

    async def measure(
        contestant: Contestant, setting: Setting, run: Run, seconds: float
    ) -> Measured:
        del contestant, seconds
        part = requests // 10
        _holdings()  # looking takes memory itself, the first time
        await _many_requests(part, run, setting.clients)
        looks = [_holdings()]
        for _ in range(10):
            await _many_requests(part, run, setting.clients)
            looks.append(_holdings())
        growth = {f"{name}_growth": looks[-1][name] - looks[0][name] for name in looks[0]}
        series = {name: [look[name] for look in looks] for name in looks[0]}
        series["requests"] = [float(part * n) for n in range(11)]
        per_request = growth["rss_growth"] / (part * 10)
        return Measured({"rss_per_request": per_request, "rss": looks[-1]["rss"], **growth}, series)

    return measure


def _holdings() -> dict[str, float]:
    """Memory in bytes; what Python's collector knows of, tensors among it; open descriptors;
    threads.

    A handle of a tensor that is lost to C shows in the memory alone: it keeps 300 bytes and the
    tensor's own.
    """
    import psutil
    import torch

    gc.collect()
    process = psutil.Process()
    objects = gc.get_objects()
    return {
        "rss": float(process.memory_info().rss),
        "objects": float(len(objects)),
        "tensors": float(sum(issubclass(type(thing), torch.Tensor) for thing in objects)),
        "descriptors": float(process.num_fds()),
        "threads": float(process.num_threads()),
    }


# --- (d): the scheduler alone ---------------------------------------------------------------------

LANES = 2
QUEUED = 1_000
"""While the number of runners is varied; the number of runners is 1 while the depth is varied."""


@asynccontextmanager
async def core_alone(depth: int, runners: int) -> AsyncIterator[Opened]:
    """`DeviceQueue` under a steady depth: a run completes, the next is launched, a new job is
    submitted.
    """
    no_bounds = Bounds(jobs=None)
    queue = DeviceQueue("fake", LANES, no_bounds)
    sources = [queue.add_runner(f"model {n}", LANES, no_bounds) for n in range(runners)]
    chosen = _endlessly(sources)
    launched: deque[Job] = deque()
    now = 0.0

    def perform(commands: Sequence[Any]) -> None:
        for command in commands:
            if type(command) is Launch:
                launched.append(command.job)

    for _ in range(depth + LANES):
        perform(queue.submit(Job(next(chosen)), now))

    async def measure(seconds: float) -> Measured:
        nonlocal now
        requests = 0
        started = time.perf_counter()
        while (took := time.perf_counter() - started) < seconds:
            for _ in range(1_000):
                now += 1e-6
                perform(queue.complete(launched.popleft(), now))
                perform(queue.submit(Job(next(chosen)), now))
            requests += 1_000
        return Measured({"cost": took / requests})

    yield Opened(measure)


@asynccontextmanager
async def front_alone(depth: int, runners: int) -> AsyncIterator[Opened]:
    """Open a `Scheduler` on the fake backend, where each answered client submits anew.

    So the queue's depth stays the same.
    """
    names = [f"model{n}" for n in range(runners)]
    backend = FakeBackend(dict.fromkeys(names, lambda: None), lanes=LANES, auto=True)
    config = SchedulerConfig(devices={"cpu": DeviceConfig(limits=Limits(jobs=None))})
    loop = asyncio.get_running_loop()
    answered, wanted, over = 0, 0, False
    enough: asyncio.Future[None] = loop.create_future()

    async with Scheduler(config, devices={"cpu": backend}) as scheduler:
        loading = (
            scheduler.load(name, instances=LANES, limits=Limits(jobs=None), placement="lane")
            for name in names
        )
        chosen = _endlessly([await runner for runner in loading])

        def again(done: asyncio.Future[Any]) -> None:
            nonlocal answered
            if done.exception() is None and not over:
                answered += 1
                next(chosen).submit().add_done_callback(again)
                if answered == wanted:
                    enough.set_result(None)

        async def measure(seconds: float) -> Measured:
            nonlocal answered, wanted, enough
            requests = 0
            started = time.perf_counter()
            while (took := time.perf_counter() - started) < seconds:
                answered, wanted, enough = 0, 1_000, loop.create_future()
                await enough
                requests += answered
            return Measured({"cost": took / requests})

        for _ in range(depth + LANES):
            next(chosen).submit().add_done_callback(again)
        try:
            yield Opened(measure)
        finally:
            over = True
            await scheduler.terminate()  # nobody waits for what is queued


def _endlessly(things: Sequence[Any]) -> Any:
    """Each thing at random, the same choice on every run; drawn beforehand, because drawing
    costs time itself.
    """
    return itertools.cycle(random.Random(0).choices(things, k=100_003))


def scheduler_alone(scale: Scale) -> list[Entrant]:
    parts = {
        "core": (core_alone, "DeviceQueue: submit and complete"),
        "front": (front_alone, "Scheduler on FakeBackend: submit to callback"),
    }
    entrants = []
    for part, (opened, note) in parts.items():
        for depth in scale.depths:
            name = f"{part}, depth {depth:,}"
            entrants.append(Entrant(name, f"{note}; 1 runner", functools.partial(opened, depth, 1)))
        for runners in scale.runners:
            name = f"{part}, runners {runners:,}"
            told = f"{note}; {QUEUED:,} queued"
            entrants.append(Entrant(name, told, functools.partial(opened, QUEUED, runners)))
    return entrants


def scheduler_targets(scale: Scale) -> list[Target]:
    targets = []
    for part in ("core", "front"):
        for sizes, word, most in ((scale.depths, "depth", 1.3), (scale.runners, "runners", 1.5)):
            large, small = f"{part}, {word} {max(sizes):,}", f"{part}, {word} {min(sizes):,}"
            sentence = f"{part}: cost at {word} {max(sizes):,} over that at {min(sizes):,}"
            targets.append(Target(sentence, large, "cost", small, most=most))
    return targets


# --- the programme --------------------------------------------------------------------------------


def programme() -> dict[str, Workload]:
    """The workloads by key."""
    cores = available_cores()
    tiny, heavy = Setting("tiny", cores, clients=64), Setting("heavy", cores, clients=8)
    bare, native, auto = field_of.BARE.name, field_of.NATIVE.name, field_of.AUTO.name
    frozen = [field_of.NATIVE.frozen(), field_of.AUTO.frozen()]
    rows, width = models.SHAPES["heavy"]
    workloads = [
        Workload(
            "a",
            "(a) one client, tiny model: time per request",
            lambda _: serving(one_client, tiny, field_of.EVERYONE),
            (Figure("p50", "p50 µs", 1e6), Figure("p99", "p99 µs", 1e6)),
            bare,
            lambda _: [
                Target("p50 under auto, times the bare loop's", auto, "p50", bare, most=2.5),
                Target("p50 on native lanes, times the bare loop's", native, "p50", bare, most=4),
            ],
            seconds=0.25,
            warm_up=1.0,
        ),
        Workload(
            "b",
            "(b) 64 clients, tiny model: requests per second",
            lambda _: serving(many_clients, tiny, field_of.EVERYONE),
            (Figure("rate", "requests/s", more_is_better=True),),
            bare,
            lambda _: [
                Target(f"rate under auto, times {whose}", auto, "rate", other, least=least)
                for whose, other, least in (
                    ("the bare loop's", bare, 0.5),
                    ("to_thread's", field_of.TO_THREAD.name, 3),
                    ("ONNX Runtime's", field_of.ONNX_RUNTIME.name, 3),
                )
            ],
            seconds=0.25,
            warm_up=1.0,
        ),
        Workload(
            "c",
            f"(c) 8 clients, heavy model ({rows} by {width}, {cores} at once): throughput and the "
            f"loop's lag",
            lambda _: serving(heavy_runs, heavy, [*field_of.EVERYONE, *frozen]),
            (
                Figure("rate", "runs/s", more_is_better=True),
                *(Figure(f"lag_{name}", f"lag {name} ms", 1e3) for name in LAGS),
            ),
            field_of.POOL.name,
            lambda _: [
                *(
                    Target(
                        f"rate, {name}, times the stock runner's in threads",
                        name,
                        "rate",
                        least=1.8,
                        against=field_of.POOL.name,
                    )
                    for name in (native, auto)
                ),
                *(
                    Target(f"lag p99 ms, {name}", name, "lag_p99", most=2e-3)
                    for name in (native, auto)
                ),
                Target(
                    "rate under auto, frozen, times OpenVINO's",
                    frozen[1].name,
                    "rate",
                    least=1,
                    against=field_of.OPENVINO.name,
                ),
            ],
            seconds=1.0,
            warm_up=0.5,
        ),
        Workload(
            "d",
            "(d) the scheduler alone: cost per request",
            scheduler_alone,
            (Figure("cost", "µs per request", 1e6),),
            None,
            scheduler_targets,
            seconds=0.25,
            warm_up=0.5,
        ),
        Workload(
            "e",
            "(e) what the process holds, from warm to the last of its requests",
            lambda scale: serving(
                million(scale.requests), tiny, (field_of.THREADS, field_of.NATIVE, field_of.AUTO)
            ),
            (
                Figure("rss_per_request", "growth B/request"),
                Figure("rss", "RSS MB", 1e-6),
                Figure("objects_growth", "objects"),
                Figure("tensors_growth", "tensors"),
                Figure("descriptors_growth", "descriptors"),
                Figure("threads_growth", "threads"),
            ),
            None,
            # Whatever leaks once per request takes at least a malloc of 16 bytes.
            lambda _: [
                Target(f"bytes per request that stay, {name}", name, "rss_per_request", most=1)
                for name in (field_of.THREADS.name, native, auto)
            ],
            seconds=0.0,
            warm_up=0.0,
            repeated=False,
        ),
        *live_weights.workloads(),
        *batching.workloads(),
        *watching.workloads(cores),
    ]
    return {workload.key: workload for workload in workloads}
