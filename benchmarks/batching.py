"""The workloads of batching: (h) how many small requests are answered, (i) how soon at half
load, (j) sentences of all lengths, (k) requests of a higher class beside them.

In (h) every client's request is one row, and the stock runner in a bare loop answers one row after
the other. What batching can gain at most is shown by a batcher as its users would write it: it
takes what has come in this turn of the loop, runs that at once, and schedules nothing.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aoti_sched import Batching, Priority, Scheduler
from aoti_sched.backends.cpu import available_cores
from aoti_sched.config import DeviceConfig, Limits, SchedulerConfig

from . import contestants as field_of
from . import models
from .clients import many_clients, served, serving
from .contestants import Contestant, Run, Setting, beginning, scheduled, stock_runner
from .measure import percentile
from .plan import Entrant, Figure, Measured, Opened, Scale, Target, Workload

if TYPE_CHECKING:
    from torch import Tensor


CLIENTS = (64, 512)
TOGETHER = Batching(max_size=models.MOST_ROWS)
BATCHED = "batch.pt2"

SENTENCES = 16
"""So many at most in a batch, so that there is one for each core, and more come meanwhile."""
PADDED = {"input_ids": 0, "attention_mask": 0}

# --- (h): requests per second ---------------------------------------------------------------------


class HandWritten:
    """Run the requests of one iteration of the loop together, at its end, on the loop's thread."""

    def __init__(self, run: Callable[[list[Tensor]], list[Tensor]], most: int) -> None:
        self._run = run
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Tensor, asyncio.Future[Tensor]]] = []

    def ask(self, x: Tensor) -> asyncio.Future[Tensor]:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        future: asyncio.Future[Tensor] = self._loop.create_future()
        self._waiting.append((x, future))
        return future

    def _flush(self) -> None:
        import torch

        waiting, self._waiting = self._waiting, []
        for first in range(0, len(waiting), self._most):
            batch = waiting[first : first + self._most]
            (whole,) = self._run([torch.cat([x for x, _ in batch])])
            for (_, future), row in zip(batch, torch.split(whole, 1), strict=True):
                future.set_result(row)


@asynccontextmanager
async def hand_written(setting: Setting) -> AsyncIterator[Run]:
    batcher = HandWritten(stock_runner(setting), models.MOST_ROWS)
    yield functools.partial(batcher.ask, models.example(setting.model))


HAND_WRITTEN = Contestant(
    "hand-written", "a batcher on the loop, over the stock runner", hand_written, kind=BATCHED
)
AUTO = replace(
    field_of.AUTO,
    name="auto, batching",
    note="aoti_sched as it comes, requests that come together run as one",
    open=scheduled("auto", TOGETHER),
    kind=BATCHED,
)
NATIVE = replace(
    field_of.NATIVE,
    name="native, batching",
    note="aoti_sched, native lanes, which put batches together without the GIL",
    open=scheduled("lane", TOGETHER),
    kind=BATCHED,
)


def _called(contestant: Contestant, clients: int) -> str:
    return f"{contestant.name}, {clients} clients"


def rates(scale: Scale) -> list[Entrant]:
    """The bare loop has no clients: it is one line."""
    del scale
    cores = available_cores()
    entrants = serving(many_clients, Setting("tiny", cores, clients=1), [field_of.BARE])
    for clients in CLIENTS:
        entering = [
            replace(contestant, name=_called(contestant, clients))
            for contestant in (
                HAND_WRITTEN,
                field_of.AUTO,
                AUTO,
                field_of.NATIVE,
                NATIVE,
                field_of.OPENVINO,
                field_of.ONNX_RUNTIME,
            )
        ]
        entrants += serving(many_clients, Setting("tiny", cores, clients), entering)
    return entrants


def rate_targets(scale: Scale) -> list[Target]:
    del scale
    bare = field_of.BARE.name
    targets = []
    for clients in CLIENTS:
        targets += [
            Target(
                f"rate, {_called(who, clients)}, over the bare loop's",
                _called(who, clients),
                "rate",
                bare,
                least=least,
            )
            for who, least in ((AUTO, 1.5), (NATIVE, 1.5), (HAND_WRITTEN, 2.0))
        ]
    return targets


# --- (i): times at half load ----------------------------------------------------------------------


@asynccontextmanager
async def half_load(batching: Batching | None) -> AsyncIterator[Opened]:
    """Requests that come at random moments, half as many as the library answers without batching.

    How many those are is measured at the beginning of each repetition, in the same process, so that
    what else the machine does falls on both.
    """
    x = models.example("tiny")
    endless = Limits(
        jobs=None
    )  # where another process stops the loop for long, many requests are due at once
    async with Scheduler(
        SchedulerConfig(devices={"cpu": DeviceConfig(limits=endless)})
    ) as scheduler:
        load = functools.partial(scheduler.load, instances=available_cores(), limits=endless)
        plain = runner = await load(models.ensure("tiny", "pt2"), name="plain")
        if batching is not None:
            runner = await load(models.ensure("tiny", BATCHED), name="batching", batching=batching)

        async def measure(seconds: float) -> Measured:
            run = functools.partial(plain.run, x)
            offered = await served(run, CLIENTS[0], seconds / 3) / 2
            times = await arrivals(functools.partial(runner.submit, x), offered, seconds)
            p50, p99 = (percentile(times, percent) for percent in (50, 99))
            return Measured({"p99": p99, "p50": p50, "offered": offered})

        yield Opened(measure, beginning(await runner.run(x)))


async def arrivals(
    submit: Callable[[], asyncio.Future[Any]], rate: float, seconds: float, seed: int = 0
) -> list[float]:
    """Seconds from when each request was due until its answer was there, while they come as a
    Poisson process.

    The loop's timers count whole milliseconds, in which many are due; so it never sleeps, and each
    of its turns looks for what is due.
    """
    chance = random.Random(seed)
    times: list[float] = []

    def answered(due: float, future: asyncio.Future[Any]) -> None:
        future.result()
        times.append(time.perf_counter() - due)

    asked = 0
    due = time.perf_counter()
    until = due + seconds
    while due < until or len(times) < asked:
        while due < until and due <= time.perf_counter():
            submit().add_done_callback(functools.partial(answered, due))
            asked += 1
            due += chance.expovariate(rate)
        await asyncio.sleep(0)
    return times


def half_loads(scale: Scale) -> list[Entrant]:
    del scale
    return [
        Entrant(
            contestant.name,
            contestant.note,
            functools.partial(half_load, batching),
            files=(("tiny", "pt2"), ("tiny", BATCHED)),
        )
        for contestant, batching in ((field_of.AUTO, None), (AUTO, TOGETHER))
    ]


# --- (j): sentences of all lengths ----------------------------------------------------------------


def encoded() -> Iterator[tuple[Tensor, Tensor]]:
    """The demo's sentences as the encoder's inputs, one row each, over and over; long and short
    ones are mixed.
    """
    from examples.semantic_search.corpus import sentences
    from examples.semantic_search.minilm import Tokenizer

    tokenizer = Tokenizer()
    inputs = [tokenizer([sentence]) for sentence in sentences()]
    random.Random(0).shuffle(inputs)
    return itertools.cycle(inputs)


@asynccontextmanager
async def stock_encoder() -> AsyncIterator[Opened]:
    run, inputs = stock_runner(Setting(models.ENCODER, 1, 1)), encoded()

    async def measure(seconds: float) -> Measured:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            run(list(next(inputs)))
            count += 1
        return Measured({"rate": count / (time.perf_counter() - began)})

    yield Opened(measure, beginning(run(list(next(inputs)))))


@asynccontextmanager
async def encoder(batching: Batching | None) -> AsyncIterator[Opened]:
    inputs = encoded()
    async with Scheduler() as scheduler:
        package = models.ensure(models.ENCODER, "pt2")
        runner = await scheduler.load(package, instances=available_cores(), batching=batching)

        async def measure(seconds: float) -> Measured:
            return Measured(
                {"rate": await served(lambda: runner.run(*next(inputs)), CLIENTS[0], seconds)}
            )

        yield Opened(measure, beginning(await runner.run(*next(inputs))))


def encoders(scale: Scale) -> list[Entrant]:
    del scale
    ways = {
        "bare loop": (stock_encoder, "AOTIModelContainerRunnerCpu, one sentence after the other"),
        "aoti_sched": (functools.partial(encoder, None), "one by one, a run on each core"),
        "aoti_sched, equal lengths": (
            functools.partial(encoder, Batching(max_size=SENTENCES)),
            "batching, only sentences with as many tokens run as one",
        ),
        "aoti_sched, ragged": (
            functools.partial(encoder, Batching(max_size=SENTENCES, ragged=PADDED)),
            "batching, shorter ones are padded",
        ),
    }
    missing = [package for package in models.ENCODERS if importlib.util.find_spec(package) is None]
    return [
        Entrant(name, note, opened, missing=missing, files=((models.ENCODER, "pt2"),))
        for name, (opened, note) in ways.items()
    ]


# --- (k): a higher class beside batches -----------------------------------------------------------

EMBEDDERS = 96
"""Clients that ask for embeddings with LOW priority: more than a batch takes."""
FIXED = (1, 4, 16, 64)
"""The most rows of a batch, without a bound in time."""
LENGTHS = (4, 128)
"""Tokens of the shortest and the longest text; each doubling is as frequent as any other."""
PAUSE = 0.005
"""Mean seconds between a HIGH answer and the next request, so that it comes at any moment."""


def texts() -> Iterator[tuple[Tensor, Tensor]]:
    """Texts of all lengths as the encoder's inputs, one row each, over and over."""
    import torch

    chance = random.Random(0)
    shortest, longest = LENGTHS
    inputs = []
    for _ in range(512):
        tokens = round(shortest * (longest / shortest) ** chance.random())
        ids = torch.tensor([[chance.randrange(1000, 20000) for _ in range(tokens)]])
        inputs.append((ids, torch.ones_like(ids)))
    return itertools.cycle(inputs)


@asynccontextmanager
async def beside(batching: Batching) -> AsyncIterator[Opened]:
    """One lane. HIGH requests of a tiny model, one after the other, beside LOW embeddings."""
    inputs, chance = texts(), random.Random(0)
    device = DeviceConfig(lanes=1, cores=1)
    async with Scheduler(SchedulerConfig(devices={"cpu": device})) as scheduler:
        load = functools.partial(scheduler.load, placement="lane")
        encoder = await load(models.ensure(models.ENCODER, "pt2"), threads=1, batching=batching)
        tiny = await load(models.ensure("tiny", "pt2"))
        low, high = (
            runner.options(priority=priority)
            for runner, priority in ((encoder, Priority.LOW), (tiny, Priority.HIGH))
        )
        x = models.example("tiny")

        async def waits(until: float) -> list[float]:
            times = []
            while time.perf_counter() < until:
                await asyncio.sleep(chance.expovariate(1 / PAUSE))
                asked = time.perf_counter()
                await high.run(x)
                times.append(time.perf_counter() - asked)
            return times

        async def measure(seconds: float) -> Measured:
            waiting = asyncio.ensure_future(waits(time.perf_counter() + seconds))
            rate = await served(lambda: low.run(*next(inputs)), EMBEDDERS, seconds)
            times = await waiting
            p50, p95 = (percentile(times, percent) for percent in (50, 95))
            return Measured({"p50": p50, "p95": p95, "rate": rate, "each": 1 / rate})

        yield Opened(measure, beginning(await encoder.run(*next(inputs))))


def _most(rows: int) -> str:
    return f"at most {rows} {'row' if rows == 1 else 'rows'}"


LEARNED = "learned bound"


def besides(scale: Scale) -> list[Entrant]:
    del scale
    ways = {
        _most(rows): (
            "no bound in time",
            Batching(max_size=rows, max_seconds=math.inf, ragged=PADDED),
        )
        for rows in FIXED
    }
    ways[LEARNED] = ("the default: two runs of one request", Batching(ragged=PADDED))
    missing = [package for package in models.ENCODERS if importlib.util.find_spec(package) is None]
    return [
        Entrant(
            name,
            note,
            functools.partial(beside, batching),
            missing=missing,
            files=((models.ENCODER, "pt2"), ("tiny", "pt2")),
        )
        for name, (note, batching) in ways.items()
    ]


def beside_targets(scale: Scale) -> list[Target]:
    del scale
    alone = _most(1)
    waits = [
        Target(
            "HIGH's p50 beside batches, times what a run of one row takes",
            LEARNED,
            "p50",
            alone,
            of="each",
            most=2,
        ),
        Target(
            "HIGH's p95 beside batches, times that beside single rows",
            LEARNED,
            "p95",
            alone,
            most=2.2,
        ),
    ]
    return waits + [
        Target(
            f"embeddings/s, learned bound, over {_most(rows)}",
            LEARNED,
            "rate",
            _most(rows),
            least=0.95,
        )
        for rows in FIXED
    ]


# --- all ------------------------------------------------------------------------------------------


def workloads() -> list[Workload]:
    rate = Figure("rate", "requests/s", more_is_better=True)
    return [
        Workload(
            "h",
            f"(h) {' and '.join(map(str, CLIENTS))} clients, tiny model, batching: requests per "
            f"second",
            rates,
            (rate,),
            field_of.BARE.name,
            rate_targets,
            seconds=0.25,
            warm_up=1.0,
        ),
        Workload(
            "i",
            "(i) tiny model, half load, batching: time per request",
            half_loads,
            (
                Figure("p99", "p99 µs", 1e6),
                Figure("p50", "p50 µs", 1e6),
                Figure("offered", "requests/s"),
            ),
            field_of.AUTO.name,
            lambda _: [
                Target(
                    "p99 at half load, auto, batching, times that without",
                    AUTO.name,
                    "p99",
                    field_of.AUTO.name,
                    most=1.2,
                ),
            ],
            seconds=1.0,
            warm_up=1.0,
        ),
        Workload(
            "j",
            f"(j) {CLIENTS[0]} clients, MiniLM, sentences of all lengths: sentences per second",
            encoders,
            (replace(rate, heading="sentences/s"),),
            "aoti_sched",
            lambda _: [
                Target(
                    "sentences/s, ragged batches, times one by one",
                    "aoti_sched, ragged",
                    "rate",
                    "aoti_sched",
                    least=1.0,
                ),
            ],
            seconds=2.0,
            warm_up=1.0,
        ),
        Workload(
            "k",
            f"(k) {EMBEDDERS} clients, MiniLM, LOW, ragged, on one lane: how long HIGH waits",
            besides,
            (
                Figure("p50", "p50 ms", 1e3),
                Figure("p95", "p95 ms", 1e3),
                replace(rate, heading="embeddings/s"),
                Figure("each", "ms each", 1e3),
            ),
            _most(1),
            beside_targets,
            seconds=4.0,
            warm_up=4.0,
        ),
    ]
