"""Load: clients that ask a runner, and what is measured meanwhile. Times are in seconds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.errors import AotiSchedError
from aoti_sched.percentiles import Percentiles, percentiles

if TYPE_CHECKING:
    from aoti_sched.cli.inputs import Arguments
    from aoti_sched.runner import Runner

_TICK = 0.001
_SAMPLED = 8
"""Of how many requests one has its trace read, which costs some microseconds."""


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured at one load.

    Attributes:
        clients: Clients that ask again as soon as they are answered; None for a rate.
        rate: Requests that are due in a second; None for clients.
        poisson: Whether requests are due at random.
        seconds: How long was measured.
        completed: Requests that were answered.
        failed: Requests that failed, by the name of their error.
        throughput: Answers in a second.
        latency: From the moment that a request is due, or asked, to its answer.
        queue: From the submission to the start of the run, of every eighth request.
        run: The runs, of every eighth request.
        lag: How late the event loop wakes a task that sleeps 1 ms at a time.
        cores: Cores that the process was busy on.
        batch_size: Requests of a run, in the mean.
    """

    clients: int | None
    rate: float | None
    poisson: bool
    seconds: float
    completed: int
    failed: dict[str, int]
    throughput: float
    latency: Percentiles | None
    queue: Percentiles | None
    run: Percentiles | None
    lag: Percentiles | None
    cores: float
    batch_size: float

    @property
    def name(self) -> str:
        """The load in words, such as "8 clients" and "200/s poisson"."""
        if self.clients is not None:
            return f"{self.clients} client{'s' * (self.clients != 1)}"
        return f"{self.rate:g}/s{' poisson' * self.poisson}"


class Load:
    """Asks a runner, and keeps what is measured.

    Args:
        runner: The runner.
        requests: Arguments of requests, which are sent in turn.
    """

    def __init__(self, runner: Runner, requests: Sequence[Arguments]) -> None:
        self._runner = runner
        self._requests = requests
        self._turns = enumerate(itertools.cycle(requests))
        self._clear()

    def _clear(self) -> None:
        self.latencies: list[float] = []
        self.queue: list[float] = []
        self.run: list[float] = []
        self.failed: Counter[str] = Counter()

    async def probe(self) -> None:
        """Run each request once, so that requests that can't run fail before anything is measured.

        Raises:
            AotiSchedError: A request fails.
        """
        for args, kwargs in self._requests:
            await self._runner.run(*args, **kwargs)

    async def clients(self, count: int, seconds: float) -> Level:
        """Measure clients that ask again as soon as they are answered."""
        async with self._measured() as figures:
            now = time.perf_counter()
            await asyncio.gather(*(self._ask(now, now + seconds) for _ in range(count)))
        return self._level(figures, clients=count)

    async def rate(self, rate: float, seconds: float, *, poisson: bool, seed: int) -> Level:
        """Measure requests that are due at a rate, whether earlier ones are answered or not."""
        generator = random.Random(seed)  # noqa: S311 -- arrivals, no secrets
        async with self._measured() as figures:
            start = time.perf_counter()
            due = 0.0
            asked = set()
            while due < seconds:
                wait = start + due - time.perf_counter()
                await asyncio.sleep(max(0.0, wait))
                task = asyncio.ensure_future(self._ask(start + due, start + due))
                asked.add(task)
                task.add_done_callback(asked.discard)
                due += generator.expovariate(rate) if poisson else 1 / rate
            await asyncio.gather(*asked)
        return self._level(figures, rate=rate, poisson=poisson)

    async def _ask(self, due: float, until: float) -> None:
        """Ask again as soon as there is an answer, until a time, and at least once.

        What is done here is in the figures, so it is no more than it must be.

        Args:
            due: When the first request was due.
            until: When the last request may be asked.
        """
        run, turns, latencies = self._runner.run, self._turns, self.latencies
        while True:
            number, (args, kwargs) = next(turns)
            try:
                if number % _SAMPLED:
                    await run(*args, **kwargs)
                else:
                    await self._sample(args, kwargs)
            except AotiSchedError as error:
                self.failed[type(error).__name__] += 1
                await asyncio.sleep(0)  # one whose requests fail at once must not hold the loop
                now = time.perf_counter()
            else:
                now = time.perf_counter()
                latencies.append(now - due)
            if now >= until:
                return
            due = now

    async def _sample(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        future = self._runner.submit(*args, **kwargs)
        await future
        trace = future.trace
        self.queue.append(trace.queue_seconds)
        self.run.append(trace.run_seconds)

    @asynccontextmanager
    async def _measured(self) -> AsyncIterator[dict[str, Any]]:
        """Measure the block: its duration, the loop's lag, the cores and the size of batches."""
        self._clear()
        before = self._runner.stats()
        figures: dict[str, Any] = {}
        with _ticker() as lags:
            await asyncio.sleep(0)  # the ticker is asleep before the block begins
            wall, busy = time.perf_counter(), time.process_time()
            yield figures
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
        after = self._runner.stats()
        completed = after.completed - before.completed
        batched, batches = after.batched - before.batched, after.batches - before.batches
        runs = completed - batched + batches
        figures["seconds"] = wall
        figures["cores"] = busy / wall
        figures["lag"] = percentiles(lags)
        figures["batch_size"] = completed / runs if runs else 0.0

    def _level(
        self,
        figures: dict[str, Any],
        *,
        clients: int | None = None,
        rate: float | None = None,
        poisson: bool = False,
    ) -> Level:
        return Level(
            clients=clients,
            rate=rate,
            poisson=poisson,
            completed=len(self.latencies),
            failed=dict(self.failed),
            throughput=len(self.latencies) / figures["seconds"],
            latency=percentiles(self.latencies),
            queue=percentiles(self.queue),
            run=percentiles(self.run),
            **figures,
        )


@contextlib.contextmanager
def _ticker() -> Iterator[list[float]]:
    """Collect how late the event loop wakes a task that sleeps 1 ms at a time, in the block."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            lags.append(max(0.0, time.perf_counter() - due))

    watching = asyncio.get_running_loop().create_task(watch())
    try:
        yield lags
    finally:
        watching.cancel()
