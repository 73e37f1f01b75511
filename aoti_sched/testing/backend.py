"""`FakeBackend`: a device whose models are Python functions, stepped by a test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from aoti_sched.backends.contracts import Executor, Inspected, LoadRequest
from aoti_sched.engine.dispatcher import Clock
from aoti_sched.errors import PackageNotFoundError
from aoti_sched.testing.container import AnyCall, FakeContainer, weight_items
from aoti_sched.testing.executor import FakeExecutor


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

    def inspect(self, request: LoadRequest) -> Inspected:
        self._function(request)
        weights = request.weights
        if weights is None:
            weights = self.weights.get(request.name) or self.weights.get(request.path.stem) or {}
        weights = dict(weight_items(weights))
        return Inspected(
            request=msgspec.structs.replace(request, weights=weights),
            constant_bytes=len(weights),
            metadata={},
            wrapper_source=None,
            sha256="",
            thread_limit=None,
            call_spec=AnyCall(),
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
    def running(self) -> int:
        """How many runs wait for a step."""
        return len(self._executor.pending) if self._executor is not None else 0

    async def step(self, error: BaseException | None = None, *, patience: float = 5.0) -> None:
        """Finish the oldest run with its function's result or `error`, and let tasks see it.

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
