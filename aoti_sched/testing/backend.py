"""`FakeBackend`: a device whose models are Python functions, stepped by a test."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.backends.contracts import Executor, Inspected, LoadRequest
from aoti_sched.engine.dispatcher import Clock
from aoti_sched.errors import PackageError, PackageNotFoundError
from aoti_sched.model.specs import ModelSpec, spec_from_metadata
from aoti_sched.package import open_package
from aoti_sched.testing.container import AnyCall, FakeContainer, weight_items
from aoti_sched.testing.executor import FakeExecutor

if TYPE_CHECKING:
    from aoti_sched.scheduler import Scheduler


_EXPECTED = {
    "running": "{} runs were expected to wait for a step, {} do",
    "queued": "{} requests were expected to be queued, {} are",
}


class Count(int):
    """How many there are now; a call waits until there are at least as many as it says.

    `assert backend.running == 1` compares, and `await backend.running(1)` waits.
    """

    _backend: FakeBackend
    _what: str

    async def __call__(self, count: int, *, patience: float = 5.0) -> None:
        """Let other tasks go on until there are at least `count`.

        Raises:
            LookupError: There are not, for `patience` seconds of real time.
        """
        until = time.monotonic() + patience
        while (now := int(getattr(self._backend, self._what))) < count:
            if time.monotonic() > until:
                raise LookupError(_EXPECTED[self._what].format(count, now))
            await asyncio.sleep(0)


class FakeBackend:
    """A device whose models are Python functions, which may be async.

    Args:
        models: Functions by the runner's name or the package's stem.
        weights: What a model's weights are when it is loaded, by the same names.
        lanes: How many runs go on at once.
        auto: Whether runs finish by themselves; otherwise call `step`.
        clock: Where runs get their times from. It must be the scheduler's; None for the clock of a
            scheduler that has no other, `time.monotonic`.
    """

    records_runs = False
    most_lanes: int | None = None

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
        self._scheduler: Scheduler | None = None

    def cores(self) -> int:
        return self._lanes

    def open_executor(
        self,
        lanes: int,
        affinity: Sequence[int] | None = None,
        launchers: int | None = None,
        wait: str | None = None,
    ) -> Executor:
        del affinity, launchers, wait
        self._executor = FakeExecutor(lanes, self._clock, auto=self._auto)
        return self._executor

    def inspect(self, request: LoadRequest) -> Inspected:
        self._function(request)
        weights = request.weights
        if weights is None:
            weights = self.weights.get(request.name) or self.weights.get(request.path.stem) or {}
        weights = dict(weight_items(weights))
        own = _spec_of(request)
        return Inspected(
            request=msgspec.structs.replace(request, weights=weights),
            constant_bytes=len(weights),
            own=own,
            metadata={},
            wrapper_source=None,
            sha256="",
            thread_limit=None,
            call_spec=AnyCall(() if own is None else own.parameters),
        )

    def load(self, inspected: Inspected) -> FakeContainer:
        request = inspected.request
        weights = dict(weight_items(request.weights))
        container = FakeContainer(self._function(request), request.instances, weights)
        self.containers.append(container)
        return container

    def _function(self, request: LoadRequest) -> Callable[..., Any]:
        function = self.models.get(request.name) or self.models.get(request.path.stem)
        if function is None:
            raise PackageNotFoundError(
                f"the fake backend has no model {request.name!r}; it has {sorted(self.models)}. "
                f"Add one: backend.models[{request.name!r}] = function",
                path=str(request.path),
            )
        return function

    @property
    def running(self) -> Count:
        """How many runs go on: they wait for a step, or their async function has not ended.

        `await backend.running(2)` waits for two.
        """
        return self._count("running", self._executor.running if self._executor is not None else 0)

    @property
    def queued(self) -> Count:
        """How many requests wait for a lane and a slot, and do not run.

        `await backend.queued(2)` waits for two. Only a scheduler that the backend watches is known:
        that of `fake_scheduler` or of the fixtures, or one given to `watch`.

        Raises:
            LookupError: The backend watches no scheduler.
        """
        if self._scheduler is None:
            raise LookupError(
                "the fake backend knows no scheduler, so it can't tell what is queued. Use "
                "fake_scheduler(backend), or call backend.watch(scheduler)."
            )
        devices = self._scheduler.stats().devices
        return self._count("queued", devices[self.name].queued if self.name in devices else 0)

    def keep_time(self, clock: Clock | None) -> None:
        """Take the times of runs from this clock, unless the backend has one."""
        self._clock = self._clock or clock

    def watch(self, scheduler: Scheduler) -> None:
        """Count the requests that are queued in this scheduler."""
        self._scheduler = scheduler

    def _count(self, what: str, now: int) -> Count:
        count = Count(now)
        count._backend, count._what = self, what  # noqa: SLF001
        return count

    async def step(self, error: BaseException | None = None, *, patience: float = 5.0) -> None:
        """Finish the oldest run with its function's result or `error`, and let tasks see it.

        If nothing runs yet, other tasks go on until something does, as with `running(1)`. An async
        function is started and waited for.

        Raises:
            LookupError: Nothing runs, or the async function does not end, for `patience` seconds of
                real time.
        """
        until = time.monotonic() + patience
        while self._executor is None or not self._executor.pending:
            if time.monotonic() > until:
                raise LookupError("1 runs were expected to wait for a step, 0 do")
            await asyncio.sleep(0)
        run = self._executor.step(error)
        if run is not None:
            await asyncio.wait({run}, timeout=patience)
            if not run.done():
                raise LookupError(
                    f"an async model was expected to end within {patience:g} s, and has not"
                )
        await settle()

    def finish_all(self) -> None:
        """Finish what runs, and from now on every run by itself."""
        self._auto = True
        if self._executor is not None:
            self._executor.auto = True
            while self._executor.pending:
                self._executor.step()

    def cancel_all(self) -> None:
        """Cancel the async functions that have not ended. Their runs fail with RunError."""
        if self._executor is not None:
            self._executor.cancel()


def _spec_of(request: LoadRequest) -> ModelSpec | None:
    """Return the specs that a package of `compile_package` brings, where there is one at the path.

    What is there and is no such package stands for a package, as a missing file does.
    """
    if importlib.util.find_spec("torch") is None:  # which compares inputs with specs
        return None
    try:
        package = open_package(request.path, contents=request.contents)
        return spec_from_metadata(package.model(request.model_name).metadata)
    except PackageError:
        return None


async def settle(turns: int = 10) -> None:
    """Let the loop turn until what has happened has been seen everywhere; no time passes."""
    for _ in range(turns):
        await asyncio.sleep(0)
