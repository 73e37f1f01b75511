"""The workloads of live weights: (f) how long new ones take to serve under load, (g) what
staging them costs meanwhile.

In (f) busy callers run a model while its two sets of weights are exchanged over and over. Beside
this library are torch's own runner, whose bindings hold the GIL from the beginning of a call to its
end, and the functions beneath it, called with the GIL released, as C++ would.
"""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aoti_sched import Scheduler
from aoti_sched.backends.cpu import available_cores
from aoti_sched.package import open_package

from . import models
from .contestants import beginning
from .measure import LAGS, lag_figures, percentile, ticker
from .plan import Entrant, Figure, Measured, Opened, Scale, Target, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from aoti_sched import Runner

    Weights = dict[str, Tensor]

CALLERS = (1, 2, 4)
PATIENCE = 5.0
"""Seconds that a swap is waited for.

One that has not returned by then counts as having taken so long.
"""
SLACK = 2e-3
"""Seconds that a swap may take beyond the longest run that was under way."""
SERVED = 8
"""Clients while a set is staged."""


# --- (f): until new weights serve -----------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """From when to when something lasted, on the monotonic clock."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def given_up(self) -> bool:
        """Whether it was waited for as long as that; the clock's times, being large, are
        rounded.
        """
        return self.seconds > PATIENCE - 1e-6


def swap_figures(
    swaps: Sequence[Span], runs: Sequence[Span], pauses: Sequence[float] | None = None
) -> dict[str, float]:
    """What came of these swaps.

    `over` is by how much the worst pause exceeds the longest run that was under way.

    Pauses are what swaps held requests up for; where nothing is held up, the time of the swap
    stands for it.
    """

    times = [swap.seconds for swap in swaps]
    held_up = [
        Span(swap.began, swap.began + pause)
        for swap, pause in zip(swaps, times if pauses is None else pauses, strict=True)
    ]

    def longest(pause: Span) -> float:
        under_way = (
            run.seconds for run in runs if run.began < pause.ended and run.ended > pause.began
        )
        return max(under_way, default=0.0)

    return {
        "swap": percentile(times, 50),
        "swap_max": max(times),
        "run": percentile([run.seconds for run in runs], 50),
        "over": max(pause.seconds - longest(pause) for pause in held_up),
        "stuck": sum(swap.given_up for swap in swaps) / len(swaps),
    }


def _sets(model: str) -> list[Weights]:
    """Two sets of weights, the second a little larger in every value."""
    state = models.module(model).state_dict()
    return [state, {name: value * 1.001 for name, value in state.items()}]


def _rests() -> Callable[[], float]:
    """How long to rest before the next swap: at random, so that it comes at any point of a run."""
    chance = random.Random(0)
    return lambda: chance.uniform(0.0, 0.03)


class InThreads:
    """Callers in threads of their own, and a swap in the calling one."""

    def __init__(self, callers: int, run: Callable[[], object]) -> None:
        self._callers = callers
        self._run = run
        self._swapped = threading.Event()

    def measure(
        self, stage: Callable[[int], object], swap: Callable[[], object], seconds: float
    ) -> Measured:
        swaps: list[Span] = []
        runs: list[Span] = []
        rest = _rests()
        until = time.monotonic() + seconds
        while not swaps or time.monotonic() < until:
            with self._busy(runs):
                while not swaps or time.monotonic() < until:
                    stage(len(swaps))
                    swaps.append(self._one(swap, rest()))
                    if swaps[-1].given_up:
                        break
            self._swapped.wait()  # now that the callers are gone it returns
        return Measured(swap_figures(swaps, runs))

    def _one(self, swap: Callable[[], object], rest: float) -> Span:
        """One swap, at a moment that was fixed before: waiting for the GIL is part of it."""
        due = time.monotonic() + rest
        returned: list[float] = []
        over = self._swapped = threading.Event()

        def call() -> None:
            time.sleep(rest)
            swap()
            returned.append(time.monotonic())
            over.set()

        threading.Thread(target=call, daemon=True).start()
        over.wait(rest + PATIENCE)
        return Span(due, returned[0] if returned else due + PATIENCE)

    @contextmanager
    def _busy(self, runs: list[Span]) -> Any:
        over = False

        def call() -> None:
            while not over:
                began = time.monotonic()
                self._run()
                runs.append(Span(began, time.monotonic()))

        threads = [threading.Thread(target=call, daemon=True) for _ in range(self._callers)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over = True
            for thread in threads:
                thread.join()


@asynccontextmanager
async def stock_swaps(callers: int) -> AsyncIterator[Opened]:
    """torch's runner: `update_constant_buffer` into the inactive buffer, then
    `swap_constant_buffer`.
    """
    runner, x, sets = _stock("heavy", callers)

    def stage(number: int) -> None:
        runner.update_constant_buffer(sets[(number + 1) % 2], True, True)

    threads = InThreads(callers, lambda: runner.run([x]))
    measure = functools.partial(threads.measure, stage, runner.swap_constant_buffer)
    yield Opened(functools.partial(asyncio.to_thread, measure), beginning(runner.run([x])))


@asynccontextmanager
async def c_abi_swaps(callers: int) -> AsyncIterator[Opened]:
    """The C ABI that the runners are made of, the GIL released in runs and swaps."""
    import torch

    from aoti_sched.backends.aoti.c_abi import Library
    from aoti_sched.backends.aoti.raw_container import RawContainer

    torch.set_num_threads(1)
    raw = RawContainer(Library(_library("heavy")), callers)
    x, sets = models.example("heavy"), _sets("heavy")

    def stage(number: int) -> None:
        raw.stage(raw.full_set(sets[(number + 1) % 2]))

    threads = InThreads(callers, lambda: raw.run([x]))
    measure = functools.partial(threads.measure, stage, raw.swap)
    answer = beginning(raw.run([x]))
    yield Opened(functools.partial(asyncio.to_thread, measure), answer)
    raw.close()


@asynccontextmanager
async def scheduled_swaps(callers: int) -> AsyncIterator[Opened]:
    """This library: `stage`, then `commit`, on the loop that the callers are on."""
    sets, x = _sets("heavy"), models.example("heavy")

    async with Scheduler() as scheduler:
        instances = min(callers, available_cores())
        runner = await scheduler.load(models.ensure("heavy", "pt2"), instances=instances)

        async def measure(seconds: float) -> Measured:
            swaps: list[Span] = []
            runs: list[Span] = []
            pauses: list[float] = []
            rest = _rests()
            until = time.monotonic() + seconds

            async def call() -> None:
                while not swaps or time.monotonic() < until:
                    future = runner.submit(x)
                    await future
                    trace = future.trace
                    runs.append(Span(trace.started, trace.finished))

            async def swap() -> None:
                while not swaps or time.monotonic() < until:
                    await runner.stage(sets[(len(swaps) + 1) % 2])
                    await asyncio.sleep(rest())
                    began = time.monotonic()
                    pauses.append((await runner.commit()).pause_seconds)
                    swaps.append(Span(began, time.monotonic()))

            await asyncio.gather(swap(), *(call() for _ in range(callers)))
            return Measured(swap_figures(swaps, runs, pauses))

        yield Opened(measure, beginning(await runner.run(x)))


def swapping(scale: Scale) -> list[Entrant]:
    del scale
    ways = {
        "stock runner": (
            stock_swaps,
            "AOTIModelContainerRunnerCpu in threads; its calls hold the GIL",
        ),
        "C ABI": (c_abi_swaps, "the functions beneath it in threads, the GIL released"),
        "aoti_sched": (scheduled_swaps, "stage, then commit, among requests"),
    }
    return [
        Entrant(
            _called(way, callers),
            note,
            functools.partial(opened, callers),
            files=(("heavy", "pt2"),),
        )
        for callers in CALLERS
        for way, (opened, note) in ways.items()
    ]


def _called(way: str, callers: int) -> str:
    return f"{way}, {callers} caller{'s' if callers > 1 else ''}"


# --- (g): staging while serving -------------------------------------------------------------------

Copy = Callable[[], object]
"""Copies a whole set once, blocking."""


async def _served(
    run: Callable[[], Awaitable[object]], seconds: float
) -> tuple[float, list[float]]:
    """Runs per second of clients that ask again as soon as they are answered, and the loop's
    lags.
    """

    async def client() -> int:
        runs = 0
        while time.perf_counter() < until:
            await run()
            runs += 1
        return runs

    async with ticker() as lags:
        began = time.perf_counter()
        until = began + seconds
        runs = sum(await asyncio.gather(*(client() for _ in range(SERVED))))
        took = time.perf_counter() - began
    return runs / took, lags


def staging_measure(
    run: Callable[[], Awaitable[object]], copy: Callable[[], Awaitable[object]] | None, size: int
) -> Callable[[float], Awaitable[Measured]]:
    """Copies over and over for a while when nobody asks, and then while clients do."""

    async def copied(seconds: float) -> float:
        """Bytes per second."""
        if copy is None:
            return 0.0
        count, began = 0, time.perf_counter()
        while not count or time.perf_counter() - began < seconds:
            await copy()
            count += 1
        return count * size / (time.perf_counter() - began)

    async def measure(seconds: float) -> Measured:
        idle = await copied(seconds / 2)
        (rate, lags), loaded = await asyncio.gather(_served(run, seconds), copied(seconds))
        return Measured({"rate": rate, **lag_figures(lags), "idle": idle, "loaded": loaded})

    return measure


@asynccontextmanager
async def _runner(model: str) -> AsyncIterator[Runner]:
    async with Scheduler() as scheduler:
        yield await scheduler.load(models.ensure(model, "pt2"), instances=available_cores())


@asynccontextmanager
async def serving_alone(model: str) -> AsyncIterator[Opened]:
    async with _runner(model) as runner:
        run = functools.partial(runner.run, models.example(model))
        yield Opened(staging_measure(run, None, 0), beginning(await run()))


@asynccontextmanager
async def staging(model: str) -> AsyncIterator[Opened]:
    weights = _sets(model)[1]
    async with _runner(model) as runner:
        run = functools.partial(runner.run, models.example(model))
        answer = beginning(await run())
        await runner.stage(weights)
        yield Opened(
            staging_measure(run, functools.partial(runner.stage, weights), _bytes(weights)), answer
        )


@asynccontextmanager
async def copying(model: str) -> AsyncIterator[Opened]:
    """`copy_` of the same set into one that is there already, one thread."""
    import torch

    torch.set_num_threads(1)  # of threads born later, too
    weights = _sets(model)[1]
    target = {name: value.clone() for name, value in weights.items()}

    def copy() -> None:
        for name, value in weights.items():
            target[name].copy_(value)

    async with _runner(model) as runner:
        run = functools.partial(runner.run, models.example(model))
        in_thread = functools.partial(asyncio.to_thread, copy)
        yield Opened(staging_measure(run, in_thread, _bytes(weights)), beginning(await run()))


@asynccontextmanager
async def stock_staging(model: str) -> AsyncIterator[Opened]:
    """torch's runner in a pool of threads, and `update_constant_buffer` into its inactive
    buffer in another thread.
    """
    cores = available_cores()
    runner, x, sets = _stock(model, cores)
    with ThreadPoolExecutor(cores) as pool:
        run = functools.partial(asyncio.get_running_loop().run_in_executor, pool, runner.run, [x])
        copy = functools.partial(
            asyncio.to_thread, runner.update_constant_buffer, sets[1], True, True
        )
        yield Opened(staging_measure(run, copy, _bytes(sets[1])), beginning(await run()))


def stagings(scale: Scale) -> list[Entrant]:
    ways = {
        "serving alone": (serving_alone, "aoti_sched, nothing is staged"),
        "memcpy": (copying, "aoti_sched, while torch copies the set in a thread"),
        "aoti_sched": (staging, "aoti_sched, while it stages"),
        "stock runner": (
            stock_staging,
            "AOTIModelContainerRunnerCpu in threads, while one updates it",
        ),
    }
    return [
        Entrant(name, note, functools.partial(opened, scale.staged), files=((scale.staged, "pt2"),))
        for name, (opened, note) in ways.items()
    ]


# --- both -----------------------------------------------------------------------------------------


def _library(model: str) -> str:
    return str(open_package(models.ensure(model, "pt2")).extract().library)


def _stock(model: str, instances: int) -> tuple[Any, Tensor, list[Weights]]:
    """torch's runner, its input, and two sets of weights by the names that it wants, which are
    the compiler's own.
    """
    import torch
    from torch._C._aoti import AOTIModelContainerRunnerCpu

    torch.set_num_threads(1)
    runner = AOTIModelContainerRunnerCpu(_library(model), instances)
    names = runner.get_constant_names_to_original_fqns()
    sets = [{name: weights[fqn] for name, fqn in names.items()} for weights in _sets(model)]
    return runner, models.example(model), sets


def _bytes(weights: Weights) -> int:
    return sum(value.nbytes for value in weights.values())


def workloads() -> list[Workload]:
    return [
        Workload(
            "f",
            "(f) new weights under load, heavy model: from asking for the swap until they serve",
            swapping,
            (
                Figure("swap", "p50 ms", 1e3),
                Figure("swap_max", "max ms", 1e3),
                Figure("run", "one run ms", 1e3),
                Figure("over", "beyond the longest run ms", 1e3),
                Figure("stuck", f"no return in {PATIENCE:g} s, %", 100.0),
            ),
            None,
            lambda _: [
                Target(
                    f"ms of pause beyond the longest run under way, "
                    f"{_called('aoti_sched', callers)}",
                    _called("aoti_sched", callers),
                    "over",
                    most=SLACK,
                )
                for callers in CALLERS
            ],
            seconds=2.0,
            warm_up=0.5,
        ),
        Workload(
            "g",
            f"(g) staging 100 MB over and over, {SERVED} clients: throughput and the loop's lag",
            stagings,
            (
                Figure("rate", "runs/s", more_is_better=True),
                *(Figure(f"lag_{name}", f"lag {name} ms", 1e3) for name in LAGS),
                Figure("loaded", "copied MB/s", 1e-6, more_is_better=True),
                Figure("idle", "MB/s, no clients", 1e-6, more_is_better=True),
            ),
            "serving alone",
            lambda _: [
                Target("lag p99 ms while staging", "aoti_sched", "lag_p99", most=2e-3),
                Target(
                    "rate while staging, times that beside a memcpy",
                    "aoti_sched",
                    "rate",
                    "memcpy",
                    least=0.9,
                ),
                Target(
                    "bytes/s staged, no clients, times a memcpy's",
                    "aoti_sched",
                    "idle",
                    "memcpy",
                    least=0.8,
                ),
            ],
            seconds=2.0,
            warm_up=1.0,
        ),
    ]
