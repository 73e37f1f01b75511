"""Loader: inspects a model, reserves memory, loads the model and warms it up, device by device.

Only reserving happens on the event loop; the rest blocks, in threads (`prepare.py`). A load goes on
to its end when its caller is cancelled, or the scheduler closes, and the engine then frees the
model. The package, its weights file and a mapping of weights may block for ever, a file on a dead
network for example. A load that is in there is left behind with its thread.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from aoti_sched.backends.contracts import LoadRequest
from aoti_sched.backends.reading import Abandoned, Reading
from aoti_sched.engine import prepare as preparing
from aoti_sched.engine.parking import claim
from aoti_sched.engine.worker import SourceThread, in_worker
from aoti_sched.errors import LoadError, RunnerClosedError, WeightsTypeError, brief
from aoti_sched.foreign import ended_by
from aoti_sched.queue.holding import Holding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import anyio

    from aoti_sched.backends.contracts import Device
    from aoti_sched.config import ModelConfig
    from aoti_sched.engine.devices import Devices
    from aoti_sched.engine.dispatcher import Dispatcher
    from aoti_sched.engine.lifecycle import Life, Lifecycle
    from aoti_sched.engine.prepare import Prepared
    from aoti_sched.engine.tasks import Housekeeping
    from aoti_sched.model.specs import TensorSpec

_T = TypeVar("_T")


class LoadedModel(msgspec.Struct, frozen=True, eq=False):
    """A model on one device, which takes no requests yet."""

    prepared: Prepared
    dispatcher: Dispatcher
    holding: Holding
    """The record of its memory in the device's queue."""


class ModelSource(msgspec.Struct, frozen=True, eq=False):
    """What a model is loaded from, besides its settings.

    Attributes:
        inputs: Specs that the user declared.
        contents: The package, where it is in memory.
        warmup_inputs: Arguments to warm it up with.
        weights: A mapping in place of the package's weights; None for those of the settings.
    """

    inputs: Sequence[TensorSpec] | None = None
    contents: bytes | None = None
    warmup_inputs: object = None
    weights: object = None


class Loader:
    """Loads the models of one scheduler.

    Args:
        devices: The scheduler's.
        lifecycle: Keeps the records of runners, those that load included.
        tasks: The scheduler's task group.
        limiter: Limits the loads that go on at once: they compete with runs for cores.
        closes: Limits the threads that free models whose load was given up.
        cache_dir: Where packages are extracted; None for the user's cache directory.
    """

    def __init__(
        self,
        devices: Devices,
        lifecycle: Lifecycle[Any],
        tasks: Housekeeping,
        limiter: anyio.CapacityLimiter,
        closes: anyio.CapacityLimiter,
        cache_dir: str | None,
    ) -> None:
        self._devices = devices
        self._lifecycle = lifecycle
        self._tasks = tasks
        self._limiter = limiter
        self._closes = closes
        self._cache_dir = Path(cache_dir) if cache_dir else None

    async def load(
        self,
        name: str,
        settings: ModelConfig,
        source: ModelSource,
        open_runner: Callable[[Life, ModelConfig, Sequence[LoadedModel]], _T],
    ) -> _T:
        """Load a model on all its devices and open its runner.

        Args:
            name: The runner's name.
            settings: The model's settings.
            source: What it is loaded from.
            open_runner: Makes the runner and opens its life, when the model is on every device.

        Raises:
            RunnerClosedError: The scheduler was closed meanwhile.
            AotiSchedError: As in `Scheduler.load`.
        """
        life = self._lifecycle.begin(name, settings.path)

        async def work() -> _T | None:
            loaded: list[LoadedModel] = []
            try:
                own = msgspec.structs.replace(source, weights=await self._own_weights(life, source))
                await self._load_everywhere(life, settings, own, loaded)
                await self._open_lanes(loaded)
                if life.is_wanted():
                    return open_runner(life, settings, loaded)
            except BaseException:
                await self._unload(loaded)
                raise
            await self._unload(loaded)
            return None

        try:
            runner = await asyncio.shield(self._tasks.start(work))
        except asyncio.CancelledError:
            await self._lifecycle.cancel(life)
            raise
        finally:
            self._lifecycle.abandon(life)
        if runner is None:
            raise RunnerClosedError(f"load({settings.path!r}): the scheduler was closed meanwhile")
        return runner

    async def _load_everywhere(
        self, life: Life, settings: ModelConfig, source: ModelSource, loaded: list[LoadedModel]
    ) -> None:
        """Load on one device after another, and append what is loaded to `loaded`."""
        places = await self._devices.named_by(settings)
        await self._devices.divide_cores(places)
        request = self._request(life.name, settings, source)
        for place in places:
            if not life.is_wanted():
                break
            device = await self._devices.open(place)
            if not life.is_wanted():
                break
            dispatcher = self._devices.dispatcher(place, device)
            model = await self._load_on(life, device, dispatcher, request, settings, source)
            loaded.append(model)
            await _reserve_rest(model)
        for model in loaded:
            self._devices.must_be_in_service(model.dispatcher.queue.name)

    async def _open_lanes(self, loaded: Sequence[LoadedModel]) -> None:
        """Open the lanes that the devices will have with these models.

        No lane is missing when this returns, whatever was loaded during the waits.

        Raises:
            ResourcesError: No thread can be started.
        """
        opened = True
        while opened:
            opened = False
            for model in loaded:
                queue, executor = model.dispatcher.queue, model.dispatcher.executor
                wanted = queue.lanes.with_slots(model.prepared.info.instances)
                if wanted > executor.lanes:
                    what = f"device {queue.name!r}: opening lanes"
                    await in_worker(lambda: executor.grow(wanted), self._closes, what)  # noqa: B023
                    opened = True

    async def _load_on(
        self,
        life: Life,
        device: Device,
        dispatcher: Dispatcher,
        request: LoadRequest,
        settings: ModelConfig,
        source: ModelSource,
    ) -> LoadedModel:
        """Inspect a model, reserve memory on its device, load it and warm it up."""
        holding, call = Holding(request.name), f"load({settings.path!r})"
        try:
            inspected = await self._in_thread(
                life, lambda reading: preparing.inspect(device, request, reading), call
            )
            await claim(dispatcher, holding, inspected.constant_bytes)

            def prepare(reading: Reading) -> Prepared:
                return preparing.prepare(
                    device,
                    inspected,
                    settings,
                    source.inputs,
                    dispatcher.executor.kind,
                    dispatcher.queue.lanes.cores_with_slots(inspected.request.instances),
                    source.warmup_inputs,
                    reading=reading,
                )

            prepared = await self._in_thread(life, prepare, call)
        except BaseException:
            dispatcher.forget(holding)
            raise
        return LoadedModel(prepared, dispatcher, holding)

    async def _own_weights(self, life: Life, source: ModelSource) -> object:
        """Return the weights of a load without the user's code: its mapping is read here.

        Raises:
            RunnerClosedError: The load was abandoned meanwhile.
            WeightsTypeError: The mapping does not give names and values, each name once.
            LoadError: The mapping has raised a `BaseException` that is no `Exception`.
            ResourcesError: No thread can be started.
        """
        weights = source.weights
        if not isinstance(weights, Mapping) or type(weights) in _PLAIN_MAPPINGS:
            return weights
        what = f"runner {life.name!r}: the mapping of its weights"

        def read(reading: Reading) -> object:
            with reading.foreign():
                return _items(weights)

        return await self._read(life, read, what)

    async def _in_thread(self, life: Life, call: Callable[[Reading], _T], what: str) -> _T:
        """Make a blocking call of a load, few at a time: loads compete with runs for cores."""
        async with self._limiter:  # an abandoned load gives its place to the next
            return await self._read(life, call, what)

    async def _read(self, life: Life, call: Callable[[Reading], _T], what: str) -> _T:
        """Call in a thread of its own, which is left behind when the load is abandoned.

        Raises:
            RunnerClosedError: The load was abandoned meanwhile.
            ResourcesError: No thread can be started.
        """

        def ended(error: BaseException) -> Exception:
            if isinstance(error, Abandoned):
                return abandoned_error(what)
            return ended_by(error, LoadError, what)

        if not life.is_wanted():
            raise abandoned_error(what)
        thread = SourceThread(call, f"aoti load of {life.name}", what, ended)
        life.leave = thread.leave
        try:
            return await thread.result()
        finally:
            life.leave = None

    async def _unload(self, loaded: Sequence[LoadedModel]) -> None:
        for model in loaded:
            container, name = model.prepared.container, model.prepared.info.name
            await in_worker(
                container.close, self._closes, f"runner {name!r}: closing", or_here=True
            )
            model.dispatcher.forget(model.holding)

    def _request(self, name: str, settings: ModelConfig, source: ModelSource) -> LoadRequest:
        return LoadRequest(
            name=name,
            path=Path(settings.path),
            model_name=settings.model_name,
            instances=settings.instances,
            sha256=settings.sha256,
            cache_dir=self._cache_dir,
            contents=source.contents,
            copy_inputs=settings.copy_inputs,
            copy_outputs=settings.copy_outputs,
            cuda_graphs=settings.cuda_graphs,
            stream_priority=settings.stream_priority,
            replicated=settings.devices is not None,
            weights=settings.weights if source.weights is None else source.weights,
            weights_strict=settings.weights_strict,
        )


_PLAIN_MAPPINGS = (dict, OrderedDict)


def abandoned_error(what: str) -> RunnerClosedError:
    """Return the error of a load that was cancelled, or whose scheduler closes."""
    return RunnerClosedError(f"{what}: abandoned; the scheduler was closed meanwhile")


def _items(weights: Mapping[Any, Any]) -> dict[Any, Any]:
    items: dict[Any, Any] = {}
    for pair in weights.items():
        try:
            name, value = pair
            again = name in items
        except (TypeError, ValueError):
            raise WeightsTypeError(
                f"weights: expected pairs of a name and a value, got {brief(pair)}."
            ) from None
        if again:
            raise WeightsTypeError(f"weights: {brief(name)} is given twice. Give each name once.")
        items[name] = value
    return items


async def _reserve_rest(model: LoadedModel) -> None:
    """Reserve the memory that a loaded model takes beyond what was reserved before.

    A package states how many bytes its constants take, except a bare library without its sources.
    Its size is known once it is loaded, and is reserved only then.

    Raises:
        MemoryLimitError: The memory can't be had, even if every idle model is evicted.
    """
    takes, reserved = model.prepared.container.constant_bytes, model.holding.bytes
    if takes > reserved:
        await claim(model.dispatcher, model.holding, takes - reserved)
    model.dispatcher.settle(model.holding, constants=takes)
