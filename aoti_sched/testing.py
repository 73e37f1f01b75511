"""For testing your own application: a fake backend, a clock set by hand, pytest fixtures. Nothing is compiled.

    async def test_search_survives_a_slow_encoder(aoti_backend, aoti_clock, aoti_scheduler):
        aoti_backend.models["encoder"] = lambda text: [len(text)]
        encoder = await aoti_scheduler.load("encoder.pt2", timeout=0.5)
        answer = asyncio.ensure_future(my_search(encoder, "query"))
        await aoti_backend.queued(1)      # your code has called the model, nothing has run yet
        aoti_clock.advance(0.6)           # time passes only when you say so
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await answer

A model is any function of the arguments your code passes to `run`. With `FakeBackend(auto=True)` it runs by
itself, otherwise each `step()` finishes one run. The fixtures are found by pytest without an import;
the scheduler and everything behind it but the backend are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import importlib
import itertools
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from aoti_sched.backends.contracts import (
    Completion,
    ContainerInfo,
    Executor,
    HostContainer,
    Loaded,
    LoadRequest,
    StagedSet,
    Work,
)
from aoti_sched.backends.executors.batches import Staging
from aoti_sched.backends.executors.wakeup_fd import Bell
from aoti_sched.backends.reading import Reading
from aoti_sched.engine.dispatcher import Clock
from aoti_sched.errors import ConstantMismatchError, PackageNotFoundError, WeightsTypeError, brief
from aoti_sched.scheduler import Scheduler

_F = TypeVar("_F", bound=Callable[..., Any])


def _async_fixture(function: _F) -> _F:
    """pytest-asyncio's fixture where it is installed; anyio's plugin takes pytest's own."""
    fixture: Any = pytest.fixture
    with contextlib.suppress(ImportError):
        fixture = importlib.import_module("pytest_asyncio").fixture
    decorated: _F = fixture(function)
    return decorated


class ManualClock:
    """A clock that stands still until it is advanced."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._timers: list[tuple[float, int, ManualTimer]] = []
        self._count = itertools.count()

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(callback)
        heapq.heappush(self._timers, (when, next(self._count), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Let time pass; timers that fall due are called in order, each at its own time."""
        until = self._now + seconds
        while self._timers and self._timers[0][0] <= until:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            timer.fire()
        self._now = until


class ManualTimer:
    """A timer of a `ManualClock`."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class FakeCall:
    """One call's arguments on their way to a fake model."""

    nbytes = 0

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    def tensors(self) -> list[Any]:
        """The tensors among the arguments, those in tuples, lists and dicts included: what declared specs are compared with."""
        import torch
        from torch.utils import _pytree as pytree

        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class _AnyCall:
    """A call spec that takes any arguments and gives back what the function returned."""

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FakeCall]:
        return [FakeCall(args, kwargs)]

    def unflatten(self, outputs: list[Any]) -> Any:
        return outputs[0]

    def __str__(self) -> str:
        return "(*args, **kwargs)"


class FakeContainer(HostContainer):
    """A Python function in a container's place.

    Its weights are a dict of any values, of which an update must give all; each counts as a byte. `faults` makes the next "stage", "fold",
    "swap", "free_inactive", "rebuild", "park" or "unpark" fail with the error given for it.
    """

    def __init__(
        self, function: Callable[..., Any], instances: int, weights: Mapping[str, Any]
    ) -> None:
        self.function = function
        self.weights = dict(weights)
        self.inactive: dict[str, Any] | None = None
        self.faults: dict[str, Exception] = {}
        self.folds = False
        self.closed = False
        self.parked = False
        self.constant_bytes = len(self.weights)
        self.graphs = 0
        self.workspace: int | None = None
        self.unparkable = ""
        self.info = ContainerInfo(
            runtime="fake",
            gil="held",
            instances=instances,
            num_inputs=None,
            num_outputs=None,
            in_spec="",
            out_spec="",
            inline=False,  # a run that waits for its step takes no time that could be learned
        )

    c_run = None
    staging = Staging("fake")  # of no use: there is nothing to put together

    def own(self, outputs: list[Any]) -> list[Any]:
        return outputs

    def run_raw(self, inputs: Sequence[Any]) -> list[Any]:
        if self.parked:
            raise RuntimeError("a parked model was run")
        call: FakeCall = inputs[0]
        return [self.function(*call.args, **call.kwargs)]

    def warm_up(self, make_inputs: Callable[[], Sequence[Any]]) -> None:
        """A function is warm."""

    updatable = ""

    @property
    def inactive_ready(self) -> bool:
        return self.inactive is not None

    @property
    def inactive_bytes(self) -> int:
        return len(self.inactive or {})

    def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        check_finite: bool = False,
        reading: Reading | None = None,
    ) -> StagedSet:
        del check_finite
        self._fail("stage")
        with (reading or Reading()).source(contextlib.nullcontext(_items(weights))) as items:
            given: dict[str, Any] = dict(items)
        unknown = [name for name in given if name not in self.weights]
        faults = [(name, "is unknown") for name in unknown if strict]
        faults += [
            (name, "is missing") for name in self.weights if name not in given and not partial
        ]
        if faults:
            raise ConstantMismatchError("fake", tuple(faults))
        self.inactive = {
            **self.weights,
            **{name: given[name] for name in given if name in self.weights},
        }
        return StagedSet(len(self.inactive), tuple(unknown))

    def fold(self) -> None:
        self._fail("fold")

    def swap(self) -> None:
        self._fail("swap")
        if self.inactive is None:
            raise RuntimeError("the inactive buffer holds nothing")
        self.weights, self.inactive = self.inactive, self.weights

    def free_inactive(self) -> None:
        self._fail("free_inactive")
        self.inactive = None

    def extract(self, *, inactive: bool = False) -> dict[str, Any]:
        return dict(self.inactive or {}) if inactive else dict(self.weights)

    def rebuild(self) -> None:
        self._fail("rebuild")
        self.inactive = None

    def park(self) -> None:
        self._fail("park")
        self.parked = True

    def unpark(self) -> None:
        self._fail("unpark")
        self.parked = False

    def _fail(self, step: str) -> None:
        error = self.faults.pop(step, None)
        if error is not None:
            raise error

    def close(self) -> None:
        self.closed = True


def _items(weights: Any) -> Iterator[tuple[str, Any]]:
    """The names and values of a mapping, or of pairs.

    Raises:
        WeightsTypeError: It is neither. No file is read: a function's weights are values of any kind.
    """
    if isinstance(weights, (str, bytes, os.PathLike)):
        raise WeightsTypeError(
            f"weights: the fake backend reads no file, and {brief(weights)} is a path. Give it a mapping from names to values."
        )
    if not isinstance(weights, Iterable):
        raise WeightsTypeError(
            f"weights: expected a mapping from names to values, or pairs, got {brief(weights)}."
        )
    for pair in weights.items() if isinstance(weights, Mapping) else weights:
        try:
            name, value = pair
        except (TypeError, ValueError):
            raise WeightsTypeError(
                f"weights: expected pairs of a name and a value, got {brief(pair)}."
            ) from None
        yield name, value


class FakeExecutor:
    """Lanes that are stepped by hand."""

    kind = "fake"

    def __init__(self, lanes: int, clock: Clock | None, *, auto: bool) -> None:
        self.lanes = lanes
        self.pending: deque[Work] = deque()
        self.closed = False
        self._clock = clock
        self.auto = auto
        self.lost: Callable[[], str] = str
        self._done: deque[Completion] = deque()
        self._bell = Bell()

    def submit(self, lane: int, work: Work) -> bool:
        del lane
        self.pending.append(work)
        if self.auto:
            self.step()
        return False

    def poll(self) -> bool:
        """A step is not waited for."""
        return False

    def run_here(self, work: Work) -> Completion:
        return self._run(work, None)

    def step(self, error: BaseException | None = None) -> None:
        """Finish the work that was submitted first, with its function's result or with `error`."""
        self._done.append(self._run(self.pending.popleft(), error))
        self._bell.ring()

    def _run(self, work: Work, error: BaseException | None) -> Completion:
        started = self._time()
        outputs = None
        if error is None:
            try:
                run = work.container.run_raw
                outputs = (
                    run(work.inputs)
                    if work.batch is None
                    else [run(inputs) for inputs in work.batch.members]
                )
            except BaseException as raised:  # noqa: BLE001 -- it is the request's
                error = raised
        return Completion(work.token, outputs, error, started, self._time())

    def drain(self) -> list[Completion]:
        self._bell.hush()
        completions = list(self._done)
        self._done.clear()
        return completions

    def fileno(self) -> int:
        return self._bell.fd

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._bell.close()

    def _time(self) -> float:
        return self._clock.time() if self._clock is not None else 0.0


class FakeBackend:
    """A device whose models are Python functions.

    Args:
        models: Functions by the runner's name or the package's stem.
        weights: What a model's weights are when it is loaded, by the same names.
        lanes: How many runs go on at once.
        auto: Whether runs finish by themselves; otherwise call `step`.
        clock: Where runs get their times from.
    """

    records_runs = False

    def __init__(
        self,
        models: Mapping[str, Callable[..., Any]] | None = None,
        *,
        weights: Mapping[str, Mapping[str, Any]] | None = None,
        lanes: int = 2,
        auto: bool = False,
        clock: Clock | None = None,
        name: str = "cpu",
    ) -> None:
        self.models = dict(models or {})
        self.weights = dict(weights or {})
        self.name = name
        self.containers: list[FakeContainer] = []
        self._lanes = lanes
        self._auto = auto
        self._clock = clock
        self._executor: FakeExecutor | None = None

    def cores(self) -> int:
        return self._lanes

    def open_executor(
        self, lanes: int, affinity: Sequence[int] | None = None, launchers: int | None = None
    ) -> Executor:
        del affinity, launchers
        self._executor = FakeExecutor(lanes, self._clock, auto=self._auto)
        return self._executor

    def load(self, request: LoadRequest) -> Loaded:
        function = self.models.get(request.name) or self.models.get(Path(request.path).stem)
        if function is None:
            raise PackageNotFoundError(
                f"the fake backend has no model {request.name!r}; it has {sorted(self.models)}. "
                f"Add one: backend.models[{request.name!r}] = function",
                path=str(request.path),
            )
        weights = self.weights.get(request.name) or self.weights.get(Path(request.path).stem) or {}
        if request.weights is not None:
            weights = dict(_items(request.weights))
        request.make_room(len(weights))
        container = FakeContainer(function, request.instances, weights)
        self.containers.append(container)
        return Loaded(
            container=container,
            metadata={},
            wrapper_source=None,
            sha256="",
            thread_limit=None,
            call_spec=_AnyCall(),
        )

    @property
    def running(self) -> int:
        """How many runs wait for a step."""
        return len(self._executor.pending) if self._executor is not None else 0

    async def step(self, error: BaseException | None = None, *, patience: float = 5.0) -> None:
        """Finish the oldest run, with its function's result or with `error`, and let its awaiters see it.

        If nothing runs yet, other tasks go on until something does, as with `queued(1)`.

        Raises:
            LookupError: Nothing does, for `patience` seconds of real time.
        """
        await self.queued(1, patience=patience)
        if self._executor is not None:
            self._executor.step(error)
        await settle()

    def finish_all(self) -> None:
        """Finish what runs, and from now on every run by itself."""
        self._auto = True
        if self._executor is not None:
            self._executor.auto = True
            while self._executor.pending:
                self._executor.step()

    async def queued(self, count: int, *, patience: float = 5.0) -> None:
        """Let other tasks run until `count` runs wait for a step.

        Raises:
            LookupError: They do not, for `patience` seconds of real time.
        """
        until = time.monotonic() + patience
        while self.running < count:
            if time.monotonic() > until:
                raise LookupError(
                    f"{count} runs were expected to wait for a step, {self.running} do"
                )
            await asyncio.sleep(0)


async def settle(turns: int = 10) -> None:
    """Let the loop turn until what has happened has been seen everywhere; no time passes."""
    for _ in range(turns):
        await asyncio.sleep(0)


@pytest.fixture
def aoti_clock() -> ManualClock:
    """A `ManualClock`; the `aoti_scheduler` fixture lives by it."""
    return ManualClock()


@pytest.fixture
def aoti_backend(aoti_clock: ManualClock) -> FakeBackend:
    """A hand-stepped `FakeBackend` with two lanes; the `aoti_scheduler` fixture runs on it."""
    return FakeBackend(clock=aoti_clock)


@asynccontextmanager
async def fake_scheduler(
    backend: FakeBackend, clock: Clock | None = None
) -> AsyncIterator[Scheduler]:
    """A real `Scheduler` on a fake backend. On leaving, queued requests fail and running ones are finished."""
    async with Scheduler(devices={backend.name: backend}, clock=clock) as scheduler:
        try:
            yield scheduler
        finally:
            closing = asyncio.ensure_future(scheduler.terminate())
            await settle()  # what is queued has failed now, and will not follow on what finishes
            backend.finish_all()
            await closing


@_async_fixture
async def aoti_scheduler(
    aoti_clock: ManualClock, aoti_backend: FakeBackend
) -> AsyncIterator[Scheduler]:
    """A real `Scheduler` on the `aoti_backend` and `aoti_clock`."""
    async with fake_scheduler(aoti_backend, aoti_clock) as scheduler:
        yield scheduler
