"""Replay: sends requests through a scheduler in virtual time, and returns what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.config import SchedulerConfig
from aoti_sched.errors import AotiSchedError
from aoti_sched.events import Observer, Run, Trace
from aoti_sched.queue.job import Priority
from aoti_sched.scheduler import Scheduler
from aoti_sched.simulation.device import FREE, Costs, SimulatedBackend, Times
from aoti_sched.simulation.virtual_loop import VirtualLoop

if TYPE_CHECKING:
    from aoti_sched.engine.future import RunFuture
    from aoti_sched.recording import Recording


class Arrival(msgspec.Struct, frozen=True):
    """A request that comes.

    Attributes:
        at: Seconds after the first request.
        runner: The model's runner.
        priority: "HIGH", "NORMAL" or "LOW".
        tenant: The tenant; "" for none.
        timeout: Seconds up to its deadline; None for no deadline.
        leaves_after: Seconds after which the caller cancels it; None for a caller that waits.
    """

    at: float
    runner: str
    priority: str = "NORMAL"
    tenant: str = ""
    timeout: float | None = None
    leaves_after: float | None = None


class Replay(Observer):
    """What became of the requests.

    Attributes:
        requests: The requests that have ended, in the order of their ends.
        runs: The runs, in the order of their ends.
        latencies: For each arrival, the seconds from when it was due to its answer; None without an
            answer.
    """

    def __init__(self, count: int) -> None:
        self.requests: list[Trace] = []
        self.runs: list[Run] = []
        self.latencies: list[float | None] = [None] * count

    def finished(self, trace: Trace) -> None:
        """Keep a request."""
        self.requests.append(trace)

    def ran(self, run: Run) -> None:
        """Keep a run."""
        self.runs.append(run)


def replay(
    arrivals: Sequence[Arrival],
    config: SchedulerConfig,
    times: Mapping[str, Times],
    *,
    costs: Costs = FREE,
    timeline: Path | None = None,
) -> Replay:
    """Run requests in virtual time. No event loop may run on the calling thread.

    Args:
        arrivals: The requests, in the order in which they come.
        config: The settings. Each device must have `cores` or `lanes`.
        times: The service times of each model that a request asks for.
        costs: What the loop's own work costs; by default it costs nothing.
        timeline: Where to write the simulation, in the format of `Recording.save`.

    Raises:
        ConfigError: The settings do not fit together.
    """
    loop = VirtualLoop()
    return loop.run(lambda: _replay(loop, arrivals, config, times, costs, timeline))


async def _replay(
    loop: VirtualLoop,
    arrivals: Sequence[Arrival],
    config: SchedulerConfig,
    times: Mapping[str, Times],
    costs: Costs,
    timeline: Path | None,
) -> Replay:
    wanted = {arrival.runner for arrival in arrivals}
    models = {name: model for name, model in config.models.items() if name in wanted}
    devices = {
        name: SimulatedBackend(name, times, settings.cores or settings.lanes or 1, loop, costs)
        for name, settings in config.devices.items()
    }
    seen = Replay(len(arrivals))
    plain = SchedulerConfig(devices=config.devices, models=models)
    async with Scheduler(plain, devices=devices, clock=loop) as scheduler:
        scheduler.add_observer(seen)
        recorded: AbstractContextManager[Recording | None]
        recorded = nullcontext() if timeline is None else scheduler.record(max(1, len(arrivals)))
        with recorded as recording:
            loop.waits = False
            try:
                await _Arrivals(loop, scheduler, arrivals, costs, seen.latencies).all_ended()
            finally:
                loop.waits = True
        if recording is not None and timeline is not None:
            recording.save(timeline)
    return seen


class _Arrivals:
    """Submits each request when it is due."""

    def __init__(
        self,
        loop: VirtualLoop,
        scheduler: Scheduler,
        arrivals: Sequence[Arrival],
        costs: Costs,
        latencies: list[float | None],
    ) -> None:
        self._loop = loop
        self._costs = costs
        self._latencies = latencies
        self._runners = scheduler.runners
        self._arrivals = arrivals
        self._begin = loop.time()
        self._next = 0
        self._views: dict[tuple[str, str, str, float | None], Any] = {}
        self._pending: set[RunFuture[Any]] = set()
        self._all = loop.create_future()

    async def all_ended(self) -> None:
        """Submit all requests, and return when the last has ended."""
        self._submit_due()
        await self._all

    def _submit_due(self) -> None:
        now = self._loop.time() - self._begin + 1e-9
        arrivals = self._arrivals
        while self._next < len(arrivals) and arrivals[self._next].at <= now:
            self._submit(self._next, arrivals[self._next])
            self._next += 1
        if self._next < len(arrivals):
            self._loop.call_at(self._begin + arrivals[self._next].at, self._submit_due)
        elif not self._pending and not self._all.done():
            self._all.set_result(None)

    def _submit(self, number: int, arrival: Arrival) -> None:
        self._loop.pass_time(self._costs.request)
        try:
            future = self._view(arrival).submit(number)
        except AotiSchedError:
            return  # its trace says so
        self._pending.add(future)
        future.add_done_callback(partial(self._ended, number))
        if arrival.leaves_after is not None:
            self._loop.call_later(arrival.leaves_after, future.cancel)

    def _view(self, arrival: Arrival) -> Any:
        key = (arrival.runner, arrival.priority, arrival.tenant, arrival.timeout)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._runners[arrival.runner].options(
                priority=Priority[arrival.priority],
                tenant=arrival.tenant or None,
                timeout=arrival.timeout,
            )
        return view

    def _ended(self, number: int, future: RunFuture[Any]) -> None:
        self._pending.discard(future)
        if not future.cancelled() and future.exception() is None:  # otherwise its trace says so
            due = self._begin + self._arrivals[number].at
            self._latencies[number] = self._loop.time() - due + self._costs.hop
        if not self._pending and self._next == len(self._arrivals) and not self._all.done():
            self._all.set_result(None)
