"""Scheduler: owns the devices and their runners. A value, not a singleton; made, used and closed on one event loop."""

from __future__ import annotations

import asyncio
import functools
import io
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec

from aoti_sched.arguments import file_name, text
from aoti_sched.arguments import timeout as seconds_or_none
from aoti_sched.backends.contracts import LoadRequest
from aoti_sched.config import (
    INLINE_LIMIT,
    MOST,
    Admission,
    Batching,
    DeviceConfig,
    Limits,
    ModelConfig,
    OnFailure,
    Overflow,
    PlacementName,
    SchedulerConfig,
    checked,
    checked_config,
    cores_of,
    divided,
    in_full,
    is_part,
    read_config,
)
from aoti_sched.engine import prepare as loading
from aoti_sched.engine.blocking import BlockingCalls
from aoti_sched.engine.dispatcher import Clock, Dispatcher, LoopClock
from aoti_sched.engine.parking import Parking, claim
from aoti_sched.engine.replica import Replica
from aoti_sched.engine.router import Router
from aoti_sched.engine.tasks import Housekeeping
from aoti_sched.engine.weights.report import UpdateReport
from aoti_sched.engine.weights.staging import StageOptions
from aoti_sched.engine.weights.transaction import Barrier, Updates
from aoti_sched.engine.worker import in_worker
from aoti_sched.errors import (
    ConfigError,
    DeviceLostError,
    RunnerClosedError,
    UnsupportedLoopError,
    WeightsTypeError,
    brief,
)
from aoti_sched.events import log
from aoti_sched.foreign import said
from aoti_sched.handle import Options
from aoti_sched.model.input_check import declared
from aoti_sched.package.given import named
from aoti_sched.queue import device_queue
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching as QueueBatching
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.memory import Holding
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.runner_state import UNHEALTHY, Phase
from aoti_sched.runner import Runner, router_of
from aoti_sched.stats import SchedulerStats

if TYPE_CHECKING:
    from typing_extensions import Self

    from aoti_sched.backends.contracts import Device
    from aoti_sched.engine.prepare import Prepared
    from aoti_sched.model.specs import TensorSpec
    from aoti_sched.queue.runner_state import RunnerState

_T = TypeVar("_T")

SLOW_CLOSE = 60.0
"""Seconds after which a close that still waits for runs or leases is logged, as asyncpg's pool does."""

RULES = "python" if device_queue.__file__.endswith(".py") else "compiled"


class Scheduler:
    """Runs compiled models for one asyncio application.

    Args:
        config: Settings; models named in it are loaded on entry. See `from_config`.
        devices: Devices by name, where others than the machine's own are wanted (tests).
        clock: Another clock (tests).

    Use it as `async with Scheduler() as scheduler:`. On leaving, accepted requests are finished; when the
    block fails, queued ones fail with RunnerClosedError and only running ones are waited for.

    Raises:
        ConfigError: A setting is of the wrong type or out of range; the message gives its path.
    """

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        devices: Mapping[str, Device] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config = SchedulerConfig() if config is None else checked_config(config)
        self._devices = dict(devices or {})
        self._of_device = {
            in_full(name): settings for name, settings in self._config.devices.items()
        }
        self._clock = clock
        self._dispatchers: dict[str, Dispatcher] = {}
        self._runners: dict[str, Runner] = {}
        self._names: set[str] = set()  # of runners, those still loading included
        self._closing: dict[str, asyncio.Future[None]] = {}
        self._freed: dict[Replica, asyncio.Future[None]] = {}
        self._drained: set[str] = set()  # devices
        self._shares: dict[
            str, tuple[int, ...]
        ] = {}  # cores of parts of the CPU for which none were named
        self._all_closed: asyncio.Future[None] | None = None
        self._house: Housekeeping | None = None
        self._closed = False

    @classmethod
    def from_config(cls, path: str | os.PathLike[str]) -> Self:
        """A scheduler as a TOML file describes it (see `aoti_sched.config`); models load on entry.

        Raises:
            ConfigError: with the setting's path.
        """
        return cls(read_config(path))

    async def __aenter__(self) -> Self:
        if asyncio._get_running_loop() is None:  # noqa: SLF001 -- the public one raises its own error
            raise UnsupportedLoopError(
                "aoti_sched runs on asyncio (and uvloop), and no asyncio loop is running here. Under trio, run the "
                "scheduler in an asyncio thread of its own and call runner.run_blocking(...) through "
                "trio.to_thread.run_sync."
            )
        if self._house is not None or self._closed:
            raise UnsupportedLoopError("a Scheduler is entered once; make a new one")
        self._loop = asyncio.get_running_loop()
        self._blocking = BlockingCalls(self._loop, real_time=self._clock is None)
        self._limiter = anyio.CapacityLimiter(
            2
        )  # loads and deletes: they compete with runs for cores
        limiter = anyio.CapacityLimiter(2)
        self._parking = Parking(limiter)
        self._house = Housekeeping(self._blocking.end)
        clock = self._clock or LoopClock(self._loop)
        self._updates = Updates(self._house.start, self._parking, limiter, clock)
        await self._house.open()
        try:
            for name, model in self._config.models.items():
                await self._load(name, model, None)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._house is None:
            return
        with anyio.CancelScope(shield=True):  # anyio would cancel each wait in here anew
            try:
                await self._close_all(terminate=kind is not None)
            except asyncio.CancelledError:
                if self._all_closed is not None:
                    await asyncio.wait({self._all_closed})
                raise

    @property
    def runners(self) -> Mapping[str, Runner]:
        """The open runners by name; a live, read-only view."""
        return MappingProxyType(self._runners)

    def stats(self) -> SchedulerStats:
        """Numbers of every device and runner, now."""
        return SchedulerStats(
            devices={name: d.stats() for name, d in self._dispatchers.items()}, rules=RULES
        )

    async def load(
        self,
        path: str
        | os.PathLike[str]
        | os.PathLike[bytes]
        | bytes
        | bytearray
        | memoryview
        | io.BytesIO,
        *,
        name: str | None = None,
        model_name: str | None = None,
        device: str = "cpu",
        devices: Sequence[str] | str | None = None,
        instances: int = 1,
        threads: int | None = None,
        share: float = 1.0,
        overflow: Overflow = "reject",
        admission: Admission = "bounded",
        on_failure: OnFailure = "report",
        limits: Limits | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 -- of the requests to come, not of this call
        placement: PlacementName = "auto",
        inline_limit: float = INLINE_LIMIT,
        batching: Batching | bool | None = None,
        warmup: bool = True,
        copy_inputs: bool = False,
        copy_outputs: Literal["cpu"] | None = None,
        cuda_graphs: bool = False,
        sha256: str | None = None,
        weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        weights_strict: bool = True,
        inputs: Sequence[TensorSpec] | None = None,
        warmup_inputs: object = None,
    ) -> Runner:
        """Load a model from a `.pt2` package or a bare `.so`, off the loop, and return its runner.

        Loading a package runs its native code: load only what you trust.

        Args:
            path: The package, as a path, or in memory as bytes or an `io.BytesIO`. `bytes` that begin as a zip or a shared library
                are a package, others a path. What is in memory is extracted to the cache as a file's content is, and not kept.
            name: The runner's name, in errors, logs and stats; by default the file's stem, or "model" for one in memory.
            model_name: Which model, when the package holds several.
            device: Where it shall run: "cpu", "cuda:0", "xpu:0", "mps".
            devices: In place of `device`, several: one runner with a replica on each, to which requests go where they are predicted to
                be finished first. `["cpu:0", "cpu:1"]`, or "cuda:*" for all of a kind. On other devices than CPUs it takes
                `copy_inputs=True` and `copy_outputs="cpu"`: nobody knows beforehand on which device a request runs.
            instances: Copies that can run at once on a device (they share one set of weights); at most 1024.
            threads: Intra-op threads per run; by default what it was compiled for.
            share: Of the device's time, when other models want it, too: one with 2.0 gets twice that of one with 1.0.
            overflow: When a bound is reached: "reject" with QueueFullError; "wait" for room; or "shed" the worst of those
                queued: of the lowest class, then with the latest deadline, then the newest.
            admission: "predictive" refuses a request that could not be finished by its deadline, by what is known of the runs
                there were, with DeadlineUnreachableError; "bounded" looks at the bounds alone.
            on_failure: When five runs in a row have failed: "report" it in `stats().health` and the log, or also "rebuild" the
                container from the package with the current weights. What is queued waits for that.
            limits: Bounds of this runner's queue.
            timeout: Default timeout of its requests, in seconds.
            placement: "lane"; "inline", on the loop's own thread, at most 1 ms per turn of the loop; or "auto": on lanes
                until its runs are known to be shorter than `inline_limit`, and then inline.
            inline_limit: Seconds; less than what a hop to another thread costs is worth it.
            batching: Run requests that come together as one; True asks for what the package says of the model.
            warmup: Run it before it takes requests: on `warmup_inputs`, on values like the example that it was compiled with, or on
                zeros. A model that writes to its buffers is not run.
            copy_inputs: On a device, copy inputs there that are in the host's memory; otherwise they are refused.
            copy_outputs: "cpu" brings a device's outputs to the host's memory; by default they stay.
            cuda_graphs: On CUDA, record each run by the sizes of its inputs, and launch it as one thing from then on.
            sha256: Refuse the file, before anything of it is mapped, unless its digest is this one.
            weights: The weights to load in place of those in the package, which may have none: the path of a file, or a mapping
                from names to tensors, both as in `Runner.update`, and a full set. They are written before the first run. A file
                must stay as it is: it is read again when a parked model is restored. A mapping's tensors are copied.
            weights_strict: Refuse names in `weights` that nobody knows, as `Runner.update` does by `strict`; otherwise `info.notes`
                names them.
            inputs: Specs of its tensor inputs, where the package does not bring its own; they are all of the model's device. They
                override what its wrapper source states, and what running it showed of the least sizes.
            warmup_inputs: Arguments of `run` to warm it up with, and to make up others like them: a tuple of the positional ones, or
                a tuple and a dict, `((x, lengths), {"scale": s})`.

        Raises:
            PackageError: The file is missing, broken, for another platform or a wider CPU, not the one hashed.
            LoadError: Its library or weights can't be loaded.
            ConstantMismatchError, WeightsFileError, WeightsTypeError: `weights` do not fit, or can't be read.
            MemoryLimitError: Its weights do not fit into the device's `memory_limit`.
            DeviceLostError: The device has failed before, and works no more.
            ConfigError: A setting is out of range, the name is taken, or there is no such device.
        """
        file, contents = named(path)
        call = f"load({file!r}): "
        if name is not None:
            text(f"{call}name", name)
        if devices is not None and not isinstance(devices, str):
            if not isinstance(devices, Collection):
                raise ConfigError(f"{call}devices: expected a list of names, got {brief(devices)}.")
            devices = tuple(devices)
        if inputs is not None:
            inputs = declared(f"{call}inputs", inputs)
        if isinstance(weights, (str, os.PathLike)):
            weights = file_name(f"{call}weights", weights)
        elif weights is not None and not isinstance(weights, Mapping):
            raise WeightsTypeError(
                f"{call}weights: expected the path of a weights file, or a mapping from names to tensors, got {brief(weights)}."
            )
        settings = ModelConfig(
            path=file,
            model_name=model_name,
            device=device,
            devices=devices,
            instances=instances,
            threads=threads,
            share=share,
            overflow=overflow,
            admission=admission,
            on_failure=on_failure,
            limits=Limits() if limits is None else limits,
            timeout=timeout,
            placement=placement,
            inline_limit=inline_limit,
            batching=batching,
            warmup=warmup,
            copy_inputs=copy_inputs,
            copy_outputs=copy_outputs,
            cuda_graphs=cuda_graphs,
            sha256=sha256,
            weights=weights if isinstance(weights, str) else None,
            weights_strict=weights_strict,
        )
        return await self._load(
            name or Path(file).stem,
            checked(settings),
            inputs,
            contents,
            warmup_inputs=warmup_inputs,
            weights=weights,
        )

    async def update(
        self,
        changes: Mapping[Runner, object],
        *,
        partial: bool = False,
        strict: bool = True,
        fold: bool = True,
        barrier: Barrier = "drain",
        keep_previous: bool = True,
        check_finite: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> dict[Runner, UpdateReport]:
        """Replace the weights of several runners at one instant, all or none; for the rest as `Runner.update`.

        A client that calls one of them and then another never meets the new set and then an old one.
        """
        if not isinstance(changes, Mapping):
            raise ConfigError(f"update(changes): expected weights by runner, got {brief(changes)}.")
        self._must_own(changes)
        reports = await self._updates.update(
            {router_of(runner): weights for runner, weights in changes.items()},
            StageOptions(partial, strict, fold, check_finite),
            barrier=barrier,
            keep_previous=keep_previous,
            timeout=timeout,
        )
        return {runner: reports[router_of(runner)] for runner in changes}

    async def commit(
        self,
        *runners: Runner,
        barrier: Barrier = "drain",
        keep_previous: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> dict[Runner, UpdateReport]:
        """Publish what is staged on several runners at one instant, all or none."""
        self._must_own(runners)
        reports = await self._updates.commit(
            [router_of(runner) for runner in runners],
            barrier=barrier,
            keep_previous=keep_previous,
            timeout=timeout,
        )
        return {runner: reports[router_of(runner)] for runner in runners}

    async def rollback(
        self,
        *runners: Runner,
        barrier: Barrier = "drain",
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> dict[Runner, UpdateReport]:
        """Take several runners back to their previous sets at one instant, all or none."""
        self._must_own(runners)
        reports = await self._updates.rollback(
            [router_of(runner) for runner in runners], barrier=barrier, timeout=timeout
        )
        return {runner: reports[router_of(runner)] for runner in runners}

    async def drain_device(self, device: str) -> None:
        """Take a device out of service: no new requests, no new models. Returns when nothing is left there.

        What is queued there for a runner on several devices moves to its others. What runs there is finished, and so are held leases.
        A runner on this device alone finishes what it accepted and is closed. Cancelling this does not bring the device back.

        Raises:
            ConfigError: No model was ever loaded there.
        """
        self._must_be_open()
        device = in_full(text("drain_device(device)", device))
        if device not in self._dispatchers:
            raise ConfigError(
                f"drain_device({device!r}): no such device is in use, but {', '.join(map(repr, self._dispatchers)) or 'none'}"
            )
        if device not in self._drained:
            self._drained.add(device)
            log.info("device drains", device=device)
        ends = []
        for runner in list(self._runners.values()):
            router = router_of(runner)
            for replica in router.replicas:
                if replica.device != device:
                    continue
                if not replica.removed_because:
                    self._leave(router, replica, f"{device!r} was drained")
                if router.serving:
                    ends.append(self._free(replica))
                else:
                    ends.append(asyncio.ensure_future(self._close_runner(runner, terminate=False)))
        await asyncio.shield(asyncio.gather(*ends))

    async def aclose(self) -> None:
        """Finish what was accepted and free every model and lane. Shielded; closing twice is fine."""
        await self._close_all(terminate=False)

    async def terminate(self) -> None:
        """Fail what is queued with RunnerClosedError, wait for what runs, and free everything."""
        await self._close_all(terminate=True)

    # --- loading -------------------------------------------------------------------------------------

    async def _load(
        self,
        name: str,
        settings: ModelConfig,
        inputs: Sequence[TensorSpec] | None,
        contents: bytes | None = None,
        *,
        warmup_inputs: object = None,
        weights: object = None,
    ) -> Runner:
        self._must_be_open()
        if name in self._names:
            raise ConfigError(
                f"load({settings.path!r}): a runner named {name!r} exists; give it another name="
            )
        self._names.add(name)
        wanted = True

        loaded: list[tuple[Prepared, Dispatcher, Holding]] = []

        async def load_on(place: str) -> None:
            device = await self._device(place)
            if self._closed:
                return
            dispatcher = self._dispatcher(place, device)
            holding = Holding(name)

            def make_room(size: int) -> None:
                anyio.from_thread.run(claim, dispatcher, holding, size)

            request = LoadRequest(
                name=name,
                path=Path(settings.path),
                model_name=settings.model_name,
                instances=settings.instances,
                sha256=settings.sha256,
                cache_dir=Path(self._config.cache_dir) if self._config.cache_dir else None,
                contents=contents,
                copy_inputs=settings.copy_inputs,
                copy_outputs=settings.copy_outputs,
                cuda_graphs=settings.cuda_graphs,
                replicated=settings.devices is not None,
                weights=settings.weights if weights is None else weights,
                weights_strict=settings.weights_strict,
                make_room=make_room,
            )
            try:
                prepared = await in_worker(
                    functools.partial(
                        loading.prepare,
                        device,
                        request,
                        settings,
                        inputs,
                        dispatcher.executor.kind,
                        dispatcher.queue.lanes.cores,
                        warmup_inputs,
                    ),
                    self._limiter,
                    f"load({settings.path!r})",
                )
            except BaseException:
                dispatcher.forget(holding)
                raise
            loaded.append((prepared, dispatcher, holding))
            takes = prepared.container.constant_bytes
            if takes > holding.bytes:  # the package did not say so
                await claim(dispatcher, holding, takes - holding.bytes)
            dispatcher.settle(holding, constants=takes)

        async def work() -> Runner | None:
            try:
                places = await self._places(settings)
                await self._divide_cores(places)
                for place in places:
                    if not wanted or self._closed:
                        break
                    await load_on(place)
                for _, dispatcher, _ in loaded:
                    self._must_be_in_service(dispatcher.queue.name)
                if wanted and not self._closed:
                    return self._open_runner(name, settings, loaded)
            except BaseException:
                await self._unload(loaded)
                raise
            await self._unload(loaded)
            return None

        try:
            runner = await self._housekeep(work)
        except asyncio.CancelledError:
            wanted = False  # the load goes on in its thread; what it brings is freed there
            if name in self._runners:  # it had just succeeded
                await self._close_runner(self._runners[name], terminate=True)
            raise
        finally:
            if name not in self._runners:
                self._names.discard(name)
        if runner is None:
            raise RunnerClosedError(f"load({settings.path!r}): the scheduler was closed meanwhile")
        return runner

    def _open_runner(
        self,
        name: str,
        settings: ModelConfig,
        loaded: Sequence[tuple[Prepared, Dispatcher, Holding]],
    ) -> Runner:
        replicas = [
            self._open_replica(
                name, settings, prepared, dispatcher, holding, alone=len(loaded) == 1
            )
            for prepared, dispatcher, holding in loaded
        ]
        clock = self._clock or LoopClock(self._loop)
        runner = Runner(
            Router(replicas, clock, self._blocking),
            options=Options(timeout=seconds_or_none("timeout", settings.timeout)),
            updates=self._updates,
            close=self._close_runner,
        )
        self._runners[name] = runner
        return runner

    def _open_replica(
        self,
        name: str,
        settings: ModelConfig,
        prepared: Prepared,
        dispatcher: Dispatcher,
        holding: Holding,
        *,
        alone: bool,
    ) -> Replica:
        info = msgspec.structs.replace(prepared.info, device=dispatcher.queue.name)
        if info.device in self._shares:
            cores = ", ".join(map(str, self._shares[info.device]))
            note = f"No cores were named for {info.device!r}; of those there are, it has {cores}."
            info = msgspec.structs.replace(info, notes=(*info.notes, note))
        limits = settings.limits
        bounds = Bounds(limits.jobs, limits.bytes, limits.tenant_jobs)
        grouping = prepared.grouping
        rule = None if grouping is None else QueueBatching(grouping.max_rows, grouping.max_delay)
        replica = Replica(
            info,
            state=dispatcher.queue.add_runner(
                name,
                info.instances,
                bounds,
                placing=prepared.placing,
                batching=rule,
                width=prepared.width,
                share=settings.share,
                sheds=settings.overflow == "shed",
                predicts=settings.admission == "predictive",
                foreseen=not alone,
                memory=holding,
            ),
            batch_layout=grouping,
            container=prepared.container,
            call_spec=prepared.call_spec,
            input_check=prepared.input_check,
            dispatcher=dispatcher,
            blocks_when_full=settings.overflow == "wait",
            rebuild_on_failure=settings.on_failure == "rebuild",
            not_evictable_because=prepared.fixed,
        )
        replica.refresh_memory_use()
        log.info(
            "model loaded",
            runner=name,
            device=info.device,
            runtime=info.runtime,
            gil=info.gil,
            instances=info.instances,
            threads=info.threads,
            specs=info.spec_source.value,
            notes=info.notes,
        )
        return replica

    async def _unload(self, loaded: Sequence[tuple[Prepared, Dispatcher, Holding]]) -> None:
        for prepared, dispatcher, holding in loaded:
            await self._close_here_or_there(
                prepared.container.close, f"runner {prepared.info.name!r}"
            )
            dispatcher.forget(holding)

    async def _places(self, settings: ModelConfig) -> list[str]:
        """The devices that a model shall be loaded on."""
        if settings.devices is None:
            only = in_full(settings.device)
            self._must_be_in_service(only)
            return [only]
        if settings.device != "cpu":
            raise ConfigError(f"load({settings.path!r}): give device= or devices=, and not both")
        wanted = [settings.devices] if isinstance(settings.devices, str) else settings.devices
        places = []
        for name in wanted:
            kind, _, number = name.partition(":")
            if number != "*":
                one = in_full(name)
                self._must_be_in_service(one)
                places.append(one)
                continue
            named = [*self._devices, *(one for one in self._of_device if one not in self._devices)]
            found = [one for one in named if one.startswith(f"{kind}:")]
            if not found:
                count = await anyio.to_thread.run_sync(_count_devices, kind, limiter=self._limiter)
                found = [f"{kind}:{index}" for index in range(count)]
            found = [one for one in found if one not in self._drained]
            if not found:
                raise ConfigError(
                    f"load({settings.path!r}): devices={name!r}: there is none in service"
                )
            places += found
        if not places or len({*places}) < len(places):
            raise ConfigError(
                f"load({settings.path!r}): devices={list(wanted)}: name one or more devices, each once"
            )
        return places

    def _must_be_in_service(self, device: str) -> None:
        if device in self._drained:
            raise ConfigError(
                f"device {device!r} was drained by drain_device(); load on another one"
            )

    async def _divide_cores(self, places: Sequence[str]) -> None:
        """Give cores to the parts of the CPU among these places, and those that the configuration names, for which none were named.

        That happens once: lanes are bound to their cores, so a part that comes later would have to take some of them away.

        Raises:
            ConfigError: Cores were divided before, and not for all of these.
        """
        unnamed = self._parts_without_cores(places)
        if not unnamed:
            return
        if not self._shares:
            numbers, count = await anyio.to_thread.run_sync(_cores_here, limiter=self._limiter)
            if not self._shares:  # another load may have been quicker
                self._share_cores(
                    [*unnamed, *self._parts_without_cores(self._places_of_config())], numbers, count
                )
        late = [name for name in unnamed if name not in self._shares]
        if late:
            raise ConfigError(
                f"device {late[0]!r}: the cores were divided among {', '.join(map(repr, self._shares))} when the first model was loaded there. "
                f"Name all such devices beforehand: SchedulerConfig(devices={{{late[0]!r}: DeviceConfig(), ...}})."
            )

    def _share_cores(self, names: Sequence[str], numbers: Sequence[int], count: int) -> None:
        taken = {
            core
            for name, settings in self._of_device.items()
            if is_part(name)
            for core in settings.affinity or ()
        }
        bound = count >= len(
            numbers
        )  # under a quota, all processes would bind themselves to the first cores
        free = [core for core in numbers if core not in taken][: max(0, count - len(taken))]
        self._shares = divided(list(dict.fromkeys(names)), free)
        for name, cores in self._shares.items():
            settings = self._of_device.get(name, DeviceConfig())
            fits = settings.lanes in (None, len(cores))
            self._of_device[name] = (
                msgspec.structs.replace(settings, affinity=cores)
                if bound and fits
                else msgspec.structs.replace(
                    settings,
                    affinity=None,
                    lanes=settings.lanes or len(cores),
                    cores=settings.cores or len(cores),
                )
            )
        log.info("cores divided", **{name: list(cores) for name, cores in self._shares.items()})

    def _parts_without_cores(self, names: Iterable[str]) -> list[str]:
        return [
            name
            for name in map(in_full, names)
            if name not in self._devices
            and (name in self._shares or cores_of(name, self._of_device) == ())
        ]

    def _places_of_config(self) -> list[str]:
        places = list(self._of_device)
        for model in self._config.models.values():
            wanted = model.devices or model.device
            places += [wanted] if isinstance(wanted, str) else wanted
        return places

    async def _device(self, name: str) -> Device:
        device = self._devices.get(name)
        if device is None:
            cores = self._shares.get(name) or cores_of(name, self._of_device)
            opened = await anyio.to_thread.run_sync(
                _open_device, name, cores, limiter=self._limiter
            )
            device = self._devices.setdefault(name, opened)  # another load may have been quicker
        return device

    def _dispatcher(self, name: str, device: Device) -> Dispatcher:
        dispatcher = self._dispatchers.get(name)
        if dispatcher is None:
            settings = self._of_device.get(name, DeviceConfig())
            lanes = settings.lanes or len(settings.affinity or ()) or device.cores()
            if settings.lanes is not None and not 1 <= settings.lanes <= MOST:
                raise ConfigError(
                    f"devices.{name}: lanes={lanes}: a device has 1 to {MOST} lanes. Give fewer."
                )
            if settings.affinity is not None and len(settings.affinity) != lanes:
                raise ConfigError(
                    f"devices.{name}: affinity names {len(settings.affinity)} cores for {lanes} lanes; one for each is needed"
                )
            if settings.limits.tenant_jobs is not None:
                raise ConfigError(
                    f"devices.{name}: tenant_jobs bounds each tenant of a model; set it in the model's limits"
                )
            bounds = Bounds(settings.limits.jobs, settings.limits.bytes)
            cores = device.cores()
            if not name.startswith("cpu"):  # a lane that waits for its device keeps no core busy
                cores = max(cores, lanes)
            cores = settings.cores or cores
            if settings.evict is not None and settings.memory_limit is None:
                raise ConfigError(
                    f"devices.{name}: evict={settings.evict!r} needs a memory_limit (in bytes)"
                )
            policy = Policy(max_wait=settings.max_wait)
            queue = DeviceQueue(
                name,
                lanes,
                bounds,
                cores=cores,
                policy=policy,
                memory_limit=settings.memory_limit,
                evicts=settings.evict is not None,
            )
            executor = device.open_executor(lanes, settings.affinity, settings.launchers)
            try:
                dispatcher = Dispatcher(
                    self._loop,
                    self._clock or LoopClock(self._loop),
                    queue,
                    executor,
                    log_requests=self._config.log_requests,
                    on_failing=self._look_after,
                    on_lost=self._lose,
                    on_park=lambda state: self._run_errand(self._parking.park, state),
                    on_return=lambda state: self._run_errand(self._parking.bring_back, state),
                )
            except BaseException:
                executor.close()
                raise
            self._dispatchers[name] = dispatcher
            log.info("device opened", device=name, executor=dispatcher.executor.kind, lanes=lanes)
        return dispatcher

    def _look_after(self, state: RunnerState) -> None:
        """The last runs of a runner have all failed."""
        replica = self._replica_of(state)
        log.warning(
            "runs fail again and again",
            runner=replica.name,
            device=replica.device,
            failures=UNHEALTHY,
        )
        if replica.rebuild_on_failure:
            self._run_errand(self._updates.renew, state)

    def _run_errand(
        self, errand: Callable[[Replica], Awaitable[object]], state: RunnerState
    ) -> None:
        self._at_work().start_soon(functools.partial(errand, self._replica_of(state)))

    def _replica_of(self, state: RunnerState) -> Replica:
        replicas = router_of(self._runners[state.name]).replicas
        return next(replica for replica in replicas if replica.state is state)

    def _lose(self, device: str, error: DeviceLostError) -> None:
        """A run has met a device that is lost: who has a replica elsewhere goes on there. Called for each such run."""
        for runner in list(self._runners.values()):
            router = router_of(runner)
            for replica in list(router.serving):
                others = [one for one in router.serving if one is not replica]
                if replica.device == device and any(
                    one.state.phase is Phase.OPEN for one in others
                ):
                    log.error("device lost", device=device, runner=runner.name, error=error)
                    self._leave(router, replica, f"{device!r} was lost: {said(error)}")
                    self._at_work().start_soon(functools.partial(self._free_lost, replica))

    async def _free_lost(self, replica: Replica) -> None:
        try:
            await self._free(replica)
        except Exception as error:  # noqa: BLE001 -- nobody waits for it
            log.warning(
                "model can't be freed", runner=replica.name, device=replica.device, error=error
            )

    def _leave(self, router: Router, replica: Replica, why: str) -> None:
        moved = router.remove(replica, why)
        log.info("replica left", runner=replica.name, device=replica.device, why=why, moved=moved)

    # --- closing -------------------------------------------------------------------------------------

    async def _close_runner(self, runner: Runner, terminate: bool) -> None:
        if self._runners.get(runner.name) is not runner:
            return  # closed before
        self._at_work().must_be_here()
        router = router_of(runner)
        for replica in router.replicas:
            replica.dispatcher.drain(replica.state, terminate=terminate)
        closing = self._closing.get(runner.name)
        if closing is None:

            async def work() -> None:
                try:
                    frees = [self._free(replica) for replica in router.replicas]
                    faults = [
                        f
                        for f in await asyncio.gather(*frees, return_exceptions=True)
                        if f is not None
                    ]
                    if faults:
                        raise faults[0]  # closing again tries again
                finally:
                    del self._closing[runner.name]
                for replica in router.replicas:
                    del self._freed[replica]
                del self._runners[runner.name]
                self._names.discard(runner.name)
                router.close()

            closing = self._closing[runner.name] = self._at_work().start(work)
        await asyncio.shield(closing)

    def _free(self, replica: Replica) -> asyncio.Future[None]:
        """Drain what is on one device, and free it; done when it is gone. After a failure the next call tries again."""
        freed = self._freed.get(replica)
        if freed is None:
            drained = replica.dispatcher.drain(replica.state, terminate=False)
            self._updates.leave_sources(replica)

            async def work() -> None:
                slow = self._loop.call_later(SLOW_CLOSE, _log_slow_close, replica)
                try:
                    await drained
                    slow.cancel()
                    async with replica.weights.lock:  # an update under way ends first
                        await self._parking.settled_residency(replica)
                        replica.dispatcher.remove(replica.state)
                        await self._close_here_or_there(
                            replica.container.close, f"runner {replica.name!r}"
                        )
                        replica.dispatcher.forget(replica.state.memory)
                except BaseException:
                    del self._freed[replica]
                    raise
                finally:
                    slow.cancel()
                log.info("model closed", runner=replica.name, device=replica.device)

            freed = self._freed[replica] = self._at_work().start(work)
        return freed

    async def _close_here_or_there(self, close: Callable[[], None], what: str) -> None:
        """Close in a thread, since that may wait; where no thread can be started, on the loop's: it must be closed."""
        await in_worker(close, self._limiter, f"{what}: closing", or_here=True)

    async def _close_all(self, *, terminate: bool) -> None:
        house = self._house
        if house is None or not house.is_open:
            self._closed = True
            return  # never entered, or closed
        house.must_be_here()
        self._closed = True

        async def work() -> None:
            closes = [
                self._close_runner(runner, terminate) for runner in list(self._runners.values())
            ]
            faults = [
                f for f in await asyncio.gather(*closes, return_exceptions=True) if f is not None
            ]
            for name, dispatcher in list(
                self._dispatchers.items()
            ):  # whatever became of the models, no thread stays
                dispatcher.close()
                try:
                    await self._close_here_or_there(dispatcher.executor.close, f"device {name!r}")
                except Exception as fault:  # noqa: BLE001 -- it is raised below
                    faults.append(fault)
                else:
                    del self._dispatchers[name]
            self._blocking.end()
            if faults:
                self._all_closed = None  # closing again tries again
                raise faults[0]
            house.finish()

        if self._all_closed is None:
            self._all_closed = house.start(work)
        elif terminate:  # whoever closes already has less to wait for
            for runner in list(self._runners.values()):
                for replica in router_of(runner).replicas:
                    replica.dispatcher.drain(replica.state, terminate=True)
        await asyncio.shield(self._all_closed)
        await house.ended()

    # --- housekeeping --------------------------------------------------------------------------------

    def _must_own(self, runners: Iterable[Runner]) -> None:
        self._must_be_open()
        for runner in runners:
            if not isinstance(runner, Runner):
                raise ConfigError(f"expected the runner that load() returned, got {brief(runner)}.")
            if self._runners.get(runner.name) is not runner:
                raise RunnerClosedError(
                    f"runner {runner.name!r} is closed, or belongs to another scheduler"
                )

    def _must_be_open(self) -> None:
        if self._closed:
            raise RunnerClosedError("the scheduler is closed")
        if self._house is None:
            raise RunnerClosedError(
                "the scheduler is not running; use `async with Scheduler() as scheduler:`"
            )
        self._house.must_be_here()

    async def _housekeep(self, work: Callable[[], Awaitable[_T]]) -> _T:
        return await asyncio.shield(self._at_work().start(work))

    def _at_work(self) -> Housekeeping:
        if self._house is None:
            raise RunnerClosedError("the scheduler is not running")
        return self._house


def _open_device(name: str, cores: Sequence[int] | None) -> Device:
    """Off the loop: the first backend imports torch, which takes a second or two."""
    from aoti_sched.backends.devices import open_device

    return open_device(name, cores)


def _cores_here() -> tuple[list[int], int]:
    """The cores that this process may use by number, and how many of them at once."""
    from aoti_sched.backends.cpu import available_cores

    count = available_cores()
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0)), count
    return list(range(count)), count


def _count_devices(kind: str) -> int:
    from aoti_sched.backends.devices import count_devices

    return count_devices(kind)


def _log_slow_close(replica: Replica) -> None:
    log.warning("closing waits for runs or leases", runner=replica.name, stats=replica.stats())
