"""`SimulatedBackend`: a device whose runs take the time that a model of service times gives them.

The first argument of a request is its number; the times may depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from aoti_sched.backends.contracts import Completion, Inspected, LoadRequest, Work
from aoti_sched.simulation.virtual_loop import VirtualLoop
from aoti_sched.testing.backend import FakeBackend
from aoti_sched.testing.container import AnyCall, FakeCall, FakeContainer
from aoti_sched.testing.executor import LanesWithoutThreads


class Times(Protocol):
    """How long the runs of one model take."""

    def seconds(self, requests: Sequence[int]) -> float:
        """Return the seconds of a run of these requests, the leader first."""


class Costs(msgspec.Struct, frozen=True):
    """What the event loop and the hops between threads cost, in seconds.

    Attributes:
        request: Work of the loop for each request.
        run: Further work of the loop for each run.
        hop: From a submission to the start of its run, and from the end to the answer, where
            nothing is in the way.
    """

    request: float = 0.0
    run: float = 0.0
    hop: float = 0.0


FREE = Costs()
"""Neither the loop's work nor a hop takes any time."""


class _Call(FakeCall):
    nbytes = 1 << 10
    """Every request counts the same: what a batch may grow to depends on ratios alone."""


class _CallSpec(AnyCall):
    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FakeCall]:
        return [_Call(args, kwargs)]


class _Container(FakeContainer):
    """A container that knows how long its runs take."""

    def __init__(self, times: Times, instances: int) -> None:
        super().__init__(_number, instances, {})
        self.times = times
        self.info = msgspec.structs.replace(self.info, inline=True)


def _number(number: int) -> int:
    return number


class SimulatedExecutor(LanesWithoutThreads):
    """Lanes on which time passes, and nothing else happens."""

    def __init__(self, lanes: int, loop: VirtualLoop, costs: Costs) -> None:
        super().__init__(lanes)
        self._costs = costs
        self._loop = loop
        self._free = [0.0] * lanes

    def submit(self, lane: int, work: Work) -> bool:
        """Let the run's time pass on a lane."""
        self._loop.pass_time(self._costs.run)
        started = max(self._loop.time(), self._free[lane])  # a lane may have works ahead
        finished = self._free[lane] = started + _seconds(work)
        self._loop.call_at(finished, self._end, _completion(work, started, finished))
        return False

    def run_here(self, work: Work) -> Completion:
        """Let the run's time pass at once: the loop is held."""
        self._loop.pass_time(self._costs.run)
        started = self._loop.time()
        self._loop.pass_time(_seconds(work))
        return _completion(work, started, self._loop.time())


def _completion(work: Work, started: float, finished: float) -> Completion:
    outputs = [[None]] * len(work.batch.members) if work.batch is not None else [None]
    return Completion(work.token, outputs, None, started, finished)


def _seconds(work: Work) -> float:
    members = [work.inputs] if work.batch is None else work.batch.members
    container: Any = work.container
    seconds: float = container.times.seconds([member[0].args[0] for member in members])
    return seconds


class SimulatedBackend(FakeBackend):
    """A device of known service times.

    Args:
        name: The device's name.
        times: The service times of each model, by the name of its runner.
        cores: Cores of the device.
        loop: The loop whose time passes.
        costs: What the loop's own work costs.
    """

    def __init__(
        self,
        name: str,
        times: Mapping[str, Times],
        cores: int,
        loop: VirtualLoop,
        costs: Costs = FREE,
    ) -> None:
        super().__init__(dict.fromkeys(times, _number), lanes=cores, clock=loop, name=name)
        self._times = times
        self._loop = loop
        self._costs = costs

    def open_executor(
        self,
        lanes: int,
        affinity: Sequence[int] | None = None,
        launchers: int | None = None,
        wait: str | None = None,
    ) -> SimulatedExecutor:
        """Return lanes on which time passes."""
        del affinity, launchers, wait
        return SimulatedExecutor(lanes, self._loop, self._costs)

    def inspect(self, request: LoadRequest) -> Inspected:
        """Describe a model without reading any package."""
        return Inspected(
            request=msgspec.structs.replace(request, weights={}),
            constant_bytes=0,
            metadata={},
            wrapper_source=None,
            sha256="",
            thread_limit=None,
            call_spec=_CallSpec(),
        )

    def load(self, inspected: Inspected) -> FakeContainer:
        """Return a container that knows how long its runs take."""
        request = inspected.request
        container = _Container(self._times[request.name], request.instances)
        self.containers.append(container)
        return container
