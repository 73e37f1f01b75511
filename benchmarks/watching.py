"""The workload (l): what it costs to watch.

64 clients of the tiny model, with nothing attached, and with each of the ways to see what happens.
All runs go inline, so the event loop's thread does all the work. Its CPU time is
measured, since the differences are smaller than what other processes do to wall clock time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import aoti_sched
from aoti_sched import Observer, Scheduler, SchedulerConfig

from . import models
from .clients import ask, serving
from .contestants import Contestant, Run, Setting
from .plan import Figure, Measured, Target, Workload


async def loop_time(contestant: Contestant, setting: Setting, run: Run, seconds: float) -> Measured:
    """CPU time of the event loop's thread for each request."""
    del contestant
    before, started = time.thread_time(), time.perf_counter()
    until = started + seconds
    requests = sum(await asyncio.gather(*(ask(run, until) for _ in range(setting.clients))))
    took = time.perf_counter() - started
    return Measured({"cost": (time.thread_time() - before) / requests, "rate": requests / took})


class Ends(Observer):
    """An observer that does hardly anything itself."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def finished(self, trace: aoti_sched.Trace) -> None:
        self.seen.add(trace.state)


def _nothing(_: Scheduler) -> Any:
    return nullcontext()


def _observer(scheduler: Scheduler) -> Any:
    scheduler.add_observer(Ends())
    return nullcontext()


def _recording(scheduler: Scheduler) -> Any:
    return scheduler.record()


def _tracing(scheduler: Scheduler) -> Any:
    from aoti_sched.exporters.opentelemetry import Tracing

    scheduler.add_observer(Tracing())
    return nullcontext()


def watched(
    attach: Callable[[Scheduler], Any], **settings: Any
) -> Callable[[Setting], AbstractAsyncContextManager[Run]]:
    @asynccontextmanager
    async def open_runner(setting: Setting) -> AsyncIterator[Run]:
        async with Scheduler(SchedulerConfig(**settings)) as scheduler:
            package = models.ensure(setting.model, setting.kind)
            runner = await scheduler.load(package, instances=setting.instances, placement="inline")
            with attach(scheduler):
                yield partial(runner.run, models.example(setting.model))

    return open_runner


NOTHING = Contestant("nothing attached", "aoti_sched as it comes", watched(_nothing))
NO_FACTS = Contestant(
    "no flight record", "SchedulerConfig(flight_facts=0)", watched(_nothing, flight_facts=0)
)
RECORDING = Contestant("recording", "inside scheduler.record()", watched(_recording))
OBSERVER = Contestant("observer", "an Observer of the ends of requests", watched(_observer))
TRACING = Contestant(
    "tracing, no spans",
    "OpenTelemetry's Tracing; no caller's span is recording",
    watched(_tracing),
    needs=("opentelemetry",),
)


def workloads(cores: int) -> list[Workload]:
    tiny = Setting("tiny", cores, clients=64)
    everyone = (NOTHING, NO_FACTS, RECORDING, OBSERVER, TRACING)
    return [
        Workload(
            "l",
            "(l) 64 clients, tiny model, watched: CPU time of the loop per request",
            lambda _: serving(loop_time, tiny, everyone),
            (
                Figure("cost", "loop µs", 1e6),
                Figure("rate", "requests/s", more_is_better=True),
            ),
            NOTHING.name,
            lambda _: [
                Target(
                    "loop time inside a recording, times that with nothing attached",
                    RECORDING.name,
                    "cost",
                    NOTHING.name,
                    most=1.1,
                )
            ],
            seconds=0.5,
            warm_up=1.0,
        )
    ]
