"""Scheduler: the public verbs, from loading a model to closing everything.

A scheduler is a value, not a singleton. It is entered, used and closed on one event loop.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import anyio
import anyio.to_thread
import msgspec

from aoti_sched import arguments
from aoti_sched.apply import ConfigReport, ConfiguredModels
from aoti_sched.arguments import file_name, function, name_of_file, text
from aoti_sched.arguments import timeout as seconds_or_none
from aoti_sched.config import (
    INLINE_LIMIT,
    Admission,
    Batching,
    Limits,
    ModelConfig,
    OnFailure,
    Overflow,
    PlacementName,
    SchedulerConfig,
    checked,
    checked_config,
    in_full,
)
from aoti_sched.engine.blocking import BlockingCalls
from aoti_sched.engine.devices import Devices
from aoti_sched.engine.dispatcher import Clock, LoopClock
from aoti_sched.engine.lifecycle import Lifecycle
from aoti_sched.engine.loop_lag import LoopLag
from aoti_sched.engine.observers import Observers, must_be_called
from aoti_sched.engine.parking import Parking
from aoti_sched.engine.replica import Replica
from aoti_sched.engine.router import Router
from aoti_sched.engine.tasks import Housekeeping
from aoti_sched.engine.traces import loaded_of
from aoti_sched.engine.weights.report import UpdateReport
from aoti_sched.engine.weights.staging import StageOptions
from aoti_sched.engine.weights.transaction import Barrier, Updates
from aoti_sched.errors import (
    ConfigError,
    ExposeError,
    RunnerClosedError,
    UnsupportedLoopError,
    WeightsTypeError,
    brief,
)
from aoti_sched.events import Observer, log
from aoti_sched.flight import FlightRecord, flight_record_of
from aoti_sched.handle import Options
from aoti_sched.model.call_spec import must_fit
from aoti_sched.model.input_check import declared
from aoti_sched.queue import device_queue
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import Batching as QueueBatching
from aoti_sched.recording import Recording
from aoti_sched.runner import Runner, router_of
from aoti_sched.signature import P, R
from aoti_sched.split import Split, Traffic
from aoti_sched.stats import SchedulerStats

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Concatenate

    from typing_extensions import Self, Unpack

    from aoti_sched.backends.contracts import Device
    from aoti_sched.engine.lifecycle import Life
    from aoti_sched.engine.loader import LoadedModel, ModelSource
    from aoti_sched.expose.reports import Exposure
    from aoti_sched.expose.server import Door
    from aoti_sched.load_settings import LoadSettings, Package
    from aoti_sched.model.specs import TensorSpec

RULES = "python" if device_queue.__file__.endswith(".py") else "compiled"


class Scheduler:
    """Runs compiled models for one asyncio application.

    Use it as `async with Scheduler() as scheduler:`. When the block ends, accepted requests are
    finished. When the block fails, queued requests fail with RunnerClosedError, and only running
    requests are waited for.

    Args:
        config: Settings. The models in them are loaded on entry. See `from_config`.
        devices: Devices by name, in place of the machine's own (for tests).
        clock: A clock in place of the event loop's (for tests).

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
        self._given = dict(devices or {})
        self._given_clock = clock
        self._runners: dict[str, Runner] = {}
        self._configured = ConfiguredModels(self._runners)
        self._all_closed: asyncio.Future[None] | None = None
        self._house: Housekeeping | None = None
        self._closed = False
        self._loop_lag: LoopLag | None = None
        self._observers = Observers()
        self._door: Door | None = None

    @classmethod
    def from_config(
        cls,
        path: str | os.PathLike[str],
        *,
        devices: Mapping[str, Device] | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """Make a scheduler as a TOML file describes it. Its models are loaded on entry.

        Args:
            path: The file. docs/configuration.md describes its settings.
            devices: Devices by name, in place of the machine's own (for tests).
            clock: A clock in place of the event loop's (for tests).

        Raises:
            ConfigError: A setting is wrong; the message gives its path.
        """
        from aoti_sched.config_file import read_config

        return cls(read_config(path), devices=devices, clock=clock)

    async def __aenter__(self) -> Self:
        # The public function raises an error of its own.
        if asyncio._get_running_loop() is None:  # noqa: SLF001
            raise UnsupportedLoopError(
                "aoti_sched runs on asyncio (and uvloop), and no asyncio loop is running here. "
                "Under "
                "trio, run the scheduler in an asyncio thread of its own and call "
                "runner.run_blocking(...) through trio.to_thread.run_sync."
            )
        if self._house is not None or self._closed:
            raise UnsupportedLoopError("a Scheduler is entered once; make a new one")
        # What reads packages and loads models is half of the imports; entering needs it, and
        # importing this package does not.
        from aoti_sched.engine.loader import Loader

        loop = asyncio.get_running_loop()
        self._clock = self._given_clock or LoopClock(loop)
        self._blocking = BlockingCalls(loop, real_time=self._given_clock is None)
        self._house = Housekeeping(self._blocking.end)
        # Loads, closes and the rest compete with runs for cores. None waits for the others' places.
        loads, closes, limiter = (anyio.CapacityLimiter(2) for _ in range(3))
        parking = Parking(limiter)
        self._updates = Updates(
            self._house.start, self._house.start_soon, parking, limiter, self._clock
        )
        self._lifecycle = Lifecycle(self._runners, self._house, self._updates, parking, closes)
        self._devices = Devices(
            self._given, self._config, self._clock, self._lifecycle, closes, self._observers
        )
        self._observers.begin(loop, self._devices.dispatchers)
        self._loader = Loader(
            self._devices, self._lifecycle, self._house, loads, closes, self._config.cache_dir
        )
        await self._house.open()
        try:
            for name, model in self._config.models.items():
                await self._configured.load(name, model, self._load_configured)
            self._prune_cache(loads)
            if self._config.loop_lag is not None:
                self._loop_lag = LoopLag(loop, self._config.loop_lag)
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
        """The open runners by name: a live, read-only view."""
        return MappingProxyType(self._runners)

    def stats(self) -> SchedulerStats:
        """Return the numbers of every device and runner: as they are now, or were at the end."""
        devices = {} if self._house is None else self._devices.stats()
        lag = None if self._loop_lag is None else self._loop_lag.snapshot()
        return SchedulerStats(devices=devices, rules=RULES, loop_lag=lag)

    def flight_record(self) -> FlightRecord:
        """Return the last facts of every device, which `aoti_sched.testing.replay` can replay.

        Save them with a report of a fault. They are kept after the scheduler is closed. Facts are
        read from the record later, when `devices` or `save` is first used, in any thread.
        """
        devices = {} if self._house is None else self._devices.queues
        return flight_record_of(devices.values())

    @overload
    async def load(self, path: Package, **settings: Unpack[LoadSettings]) -> Runner: ...

    @overload
    async def load(
        self,
        path: Package,
        *,
        signature: Callable[Concatenate[Any, P], R],
        **settings: Unpack[LoadSettings],
    ) -> Runner[P, R]: ...

    async def load(
        self,
        path: Package,
        *,
        signature: Callable[..., Any] | None = None,
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
        stream_priority: int = 0,
        sha256: str | None = None,
        weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        weights_strict: bool = True,
        inputs: Sequence[TensorSpec] | None = None,
        warmup_inputs: object = None,
    ) -> Runner[Any, Any]:
        """Load a model from a `.pt2` package or a bare `.so`, and return its runner.

        The work happens off the event loop. Loading a package runs its native code: load only
        packages that you trust.

        Args:
            path: The package: a path, or its content as bytes or an `io.BytesIO`. `bytes` that
                begin as a zip or a shared library are content, other `bytes` a path. Content is
                extracted to the cache as a file's is, and not kept.
            signature: The `forward` of the compiled module's class, as `Encoder.forward`. A type
                checker then knows what `run` takes and returns: the runner is a `Runner[P, R]`. A
                function that can't be called with the model's arguments is refused.
            name: The runner's name in errors, logs and stats. By default the file's stem, or
                "model" for a package in memory.
            model_name: Which model to load, when the package holds several.
            device: Where it runs: "cpu", "cuda:0", "xpu:0" or "mps".
            devices: Several devices in place of `device`: `["cpu:0", "cpu:1"]`, or "cuda:*" for all
                of a kind. The runner has a replica on each. A request goes where it is predicted
                to finish first, so devices other than CPUs need `copy_inputs=True` and
                `copy_outputs="cpu"`.
            instances: Runs that may go on at once on a device, 1 to 1024. All share one set of
                weights.
            threads: Intra-op threads per run. By default the number that it was compiled for.
            share: Weight of its share of the device's time, when other models want it too. A model
                with 2.0 gets twice the time of a model with 1.0.
            overflow: What happens when a bound is reached. "reject" raises QueueFullError. "wait"
                waits for room. "shed" drops the worst queued request: of the lowest class, then
                with the latest deadline, then the newest.
            admission: "predictive" also refuses a request that is predicted to miss its deadline,
                with DeadlineUnreachableError. "bounded" checks the bounds alone.
            on_failure: What happens when five runs in a row have failed. "report" shows it in
                `stats().health` and the log. "rebuild" also rebuilds the container from the
                package with the current weights; queued requests wait meanwhile.
            limits: Bounds of this runner's queue, in requests and bytes.
            timeout: Default timeout of its requests, in seconds; None for no timeout.
            placement: "lane" runs on a lane. "inline" runs on the event loop's own thread, at most
                1 ms per iteration of the loop. "auto" uses lanes until runs are known to be shorter
                than `inline_limit`, then the loop's thread.
            inline_limit: Longest predicted run, in seconds, that "auto" places inline. Useful up to
                what a hop to another thread costs.
            batching: Run requests that arrive together as one. True takes the settings from the
                package.
            warmup: Run the model before it takes requests: on `warmup_inputs`, on values like the
                example that it was compiled with, or on zeros. A model that writes to its buffers
                is not run.
            copy_inputs: Copy inputs in the host's memory to the device; otherwise such inputs are
                refused.
            copy_outputs: "cpu" copies outputs to the host's memory; None leaves them on the device.
            cuda_graphs: On CUDA, record each run by the sizes of its inputs, and launch later runs
                of the same sizes as one CUDA graph.
            stream_priority: On CUDA, the priority of the model's streams among all work on the
                device: 0, or less for models whose kernels go first. The driver has few levels,
                and takes the nearest.
            sha256: The file's SHA-256 digest in hexadecimal. A file with another digest is refused
                before anything of it is mapped.
            weights: A full set of weights in place of the package's, which may have none. A path of
                a file, or a mapping from names to tensors, both as in `Runner.update`. A file must
                not change while the model is loaded: restoring evicted weights reads it again. A
                mapping's tensors are copied.
            weights_strict: Refuse names in `weights` that the model does not know. Otherwise
                `info.notes` lists them.
            inputs: Specs of its tensor inputs, where the package does not bring its own. They are
                on the model's device. They override what the wrapper's source states and what
                running the model showed of least sizes.
            warmup_inputs: Arguments of `run` to warm up with: a tuple of positional arguments, or a
                tuple and a dict, `((x, lengths), {"scale": s})`. Other values for trial runs are
                made like these.

        Raises:
            PackageError: The file is missing or broken, for another platform or a wider CPU, or has
                another digest.
            LoadError: Its library or weights can't be loaded.
            ConstantMismatchError: `weights` do not fit the model.
            WeightsFileError: The file of `weights` can't be read.
            WeightsTypeError: `weights` are of a type that can't be read.
            MemoryLimitError: Its weights do not fit into the device's `memory_limit`.
            DeviceLostError: The device has failed before, and nothing runs on it any more.
            ConfigError: A setting is out of range, the name is taken, or the device does not exist.
        """
        from aoti_sched.engine.loader import ModelSource
        from aoti_sched.package.path_or_bytes import named

        file, contents = named(path)
        call = f"load({file!r}): "
        if name is not None:
            text(f"{call}name", name)
        if devices is not None and not isinstance(devices, str):
            if not isinstance(devices, Collection):
                raise ConfigError(f"{call}devices: expected a list of names, got {brief(devices)}.")
            devices = tuple(devices)
        if signature is not None:
            function(f"{call}signature", signature)
        if inputs is not None:
            inputs = declared(f"{call}inputs", inputs)
        if isinstance(weights, (str, os.PathLike)):
            weights = file_name(f"{call}weights", weights)
        elif weights is not None and not isinstance(weights, Mapping):
            raise WeightsTypeError(
                f"{call}weights: expected the path of a weights file, or a mapping from names to "
                f"tensors, got {brief(weights)}."
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
            stream_priority=stream_priority,
            sha256=sha256,
            weights=weights if isinstance(weights, str) else None,
            weights_strict=weights_strict,
        )
        source = ModelSource(inputs, contents, warmup_inputs, weights)
        return await self._load(name or name_of_file(file), checked(settings), source, signature)

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
        """Replace the weights of several runners at one instant, all or none.

        A client that calls one runner and then another never meets new weights and then old ones.
        `Runner.update` describes the arguments and errors.
        """
        if not isinstance(changes, Mapping):
            raise ConfigError(f"update(changes): expected weights by runner, got {brief(changes)}.")
        self._must_own(changes)
        _must_not_wait_for_own_lease(changes, "update()")
        for runner in changes:
            router_of(runner).sessions.must_not_wait_for_own("update()")
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
        """Publish the staged weights of several runners at one instant, all or none."""
        self._must_own(runners)
        _must_not_wait_for_own_lease(runners, "commit()")
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
        """Publish the previous weights of several runners again, at one instant, all or none."""
        self._must_own(runners)
        _must_not_wait_for_own_lease(runners, "rollback()")
        reports = await self._updates.rollback(
            [router_of(runner) for runner in runners], barrier=barrier, timeout=timeout
        )
        return {runner: reports[router_of(runner)] for runner in runners}

    def split(self, name: str, shares: Mapping[Runner, float], *, sticky: bool = False) -> Split:
        """Share out the requests of one name among runners: a canary takes a part of the traffic.

        The split has `run`, `submit`, `run_blocking` and `options` like a runner. `Split.change`
        changes the shares, and `Split.shadow` sends copies to one more runner.

        Args:
            name: The name of the split, for `stats()` and logs.
            shares: The share of each runner, 0 or more; only their proportions count. All runners
                should take the same arguments.
            sticky: Whether all requests of a tenant (`options(tenant=)`) go to one runner.

        Raises:
            ConfigError: A share is no such number, or all are 0.
            RunnerClosedError: A runner is closed, or belongs to another scheduler.
        """
        arguments.flags("split", sticky=sticky)
        name = arguments.text("split(name=)", name)
        return Split(Traffic(name, self._must_own, shares, sticky=sticky), {})

    def add_observer(self, observer: Observer) -> None:
        """Let an observer see what happens from now on. `Observer` says how it is called.

        An observer may be added before the scheduler is entered, and then sees every load.

        Raises:
            ConfigError: The argument is no `Observer`, or a method of it is an `async def`.
        """
        if not isinstance(observer, Observer):
            raise ConfigError(f"add_observer(): expected an Observer, got {brief(observer)}.")
        must_be_called(observer)
        self._observers.add(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Let an observer see no more. One that was dropped or never added is ignored."""
        self._observers.remove(observer)

    @contextmanager
    def record(self, limit: int = 100_000) -> Iterator[Recording]:
        """Record requests, runs, updates and changes of memory for the duration of a block.

        Use it as `with scheduler.record() as recording:`. Inside, `explain(future.trace)` tells why
        a request waited. Afterwards, `recording.requests` and `recording.slowest()` do.

        Args:
            limit: How many of the last requests are kept, and of the last runs.

        Raises:
            ConfigError: The limit is no positive number.
        """
        recording = Recording(arguments.whole("record(limit=)", limit, least=1))
        self._observers.add(recording)
        try:
            yield recording
        finally:
            self._observers.remove(recording)

    async def expose(
        self, name: str | None = None, *, port: int | None = None, weights: bool = False
    ) -> Exposure:
        """Let other processes of this user look inside, until the scheduler is closed.

        Opens a Unix socket for the commands `aoti-sched stats`, `top` and `timeline`. It needs the
        extra `expose`. No request waits for a client.

        Args:
            name: The name that commands take; by default the program's name.
            port: A port of 127.0.0.1 with the live page, for reading alone; 0 for any free port.
                Every user of this machine can read it.
            weights: Let `aoti-sched weights` change the weights, through the socket.

        Raises:
            ConfigError: An argument is wrong, or another scheduler of this process has the name.
            ExposeError: The scheduler is exposed already, a package is missing, the port is taken,
                or no folder is fit for the socket.
        """
        self._must_be_open()
        arguments.flags("expose", weights=weights)
        try:
            # Beside the loop, which it would hold up for tens of milliseconds.
            await anyio.to_thread.run_sync(importlib.import_module, "aoti_sched.expose.server")
            from aoti_sched.expose.server import Door
        except ModuleNotFoundError as error:
            raise ExposeError(
                f"expose(): {error.name} is missing. Run: pip install 'aoti_sched[expose]'"
            ) from None
        self._must_be_open()  # it may have been closed meanwhile
        if self._door is not None:
            one = self._door.exposure
            raise ExposeError(
                f"expose(): this scheduler is exposed already, as {one.name!r} at {one.path} and "
                f"{one.url or 'without a port'}. Ask for a port, and for weights=True, in the "
                "first call."
            )
        start = self._house.start  # type: ignore[union-attr]  # it is open
        door = self._door = Door(self, start, name=name, port=port, weights=bool(weights))
        try:
            await door.opened()
        except BaseException:
            self._door = None
            raise
        return door.exposure

    async def apply(self, config: SchedulerConfig | str | os.PathLike[str]) -> ConfigReport:
        """Make the models those of a configuration: load, close and change them, and report.

        Only models that a configuration has loaded are closed or changed; those of `load` stay.
        `timeout`, `on_failure`, and `overflow` between "reject" and "wait", change while the model
        serves. After a change of any other setting, the model finishes its accepted requests, is
        closed, and is loaded anew with the weights of its package. Its old runner then raises
        RunnerClosedError: take the new one from `runners`. A model that fails is reported, and the
        others go on. When the call is cancelled, the next call does the rest.

        Args:
            config: The settings, or the path of a TOML file. All of them are checked before
                anything is done.

        Raises:
            ConfigError: A setting is wrong, or `load` has taken the name of a model.
            RunnerClosedError: The scheduler is closed or closes.
        """
        self._must_be_open()
        from aoti_sched.config_file import read_config

        if isinstance(config, (str, os.PathLike)):
            config = await anyio.to_thread.run_sync(read_config, config)
        wanted = checked_config(config)
        report = await self._configured.apply(
            self._config, wanted, self._load_configured, self._must_be_open
        )
        log.info("configuration applied", **msgspec.structs.asdict(report))
        return report

    async def drain_device(self, device: str) -> None:
        """Take a device out of service, and return when no model is left there.

        The device takes no new requests and no new models. Running requests are finished, and so
        are leases. Queued requests of a runner on several devices are rerouted to its others. A
        runner on this device alone finishes its accepted requests and is closed. Cancelling this
        call does not bring the device back.

        Args:
            device: The device's name, such as "cuda:0".

        Raises:
            ConfigError: No model was ever loaded there.
            LeaseError: This task itself holds a lease there, and would wait for ever.
        """
        self._must_be_open()
        device = in_full(text("drain_device(device)", device))
        _must_not_wait_for_own_lease(self._runners.values(), "drain_device()", device)
        self._devices.drain(device)
        await self._lifecycle.drain_device(device)

    async def aclose(self) -> None:
        """Finish accepted requests, then free every model and lane.

        Closing goes on to its end when the caller is cancelled. Closing twice does nothing.

        Raises:
            LeaseError: This task itself holds a lease, and would wait for ever.
        """
        if self._house is not None and self._house.is_open:
            self._house.must_be_here()
            _must_not_wait_for_own_lease(self._runners.values(), "aclose()")
        await self._close_all(terminate=False)

    async def terminate(self) -> None:
        """Fail queued requests with RunnerClosedError, wait for running requests, free the rest."""
        await self._close_all(terminate=True)

    # --- loading ---------------------------------------------------------------------------------

    async def _load(
        self,
        name: str,
        settings: ModelConfig,
        source: ModelSource,
        signature: Callable[..., Any] | None = None,
    ) -> Runner:
        self._must_be_open()
        open_runner = functools.partial(self._open_runner, signature)
        return await self._loader.load(name, settings, source, open_runner)

    def _prune_cache(self, limiter: anyio.CapacityLimiter) -> None:
        """Begin to prune the cache, where that is asked for. The scheduler serves meanwhile."""
        limit, age = self._config.cache_limit, self._config.cache_age
        if self._house is not None and (limit is not None or age is not None):
            from aoti_sched.engine.pruning import prune_cache

            self._house.start_soon(
                functools.partial(prune_cache, self._config.cache_dir, limit, age, limiter)
            )

    async def _load_configured(self, name: str, settings: ModelConfig) -> Runner:
        from aoti_sched.engine.loader import ModelSource

        return await self._load(name, settings, ModelSource())

    def _open_runner(
        self,
        signature: Callable[..., Any] | None,
        life: Life,
        settings: ModelConfig,
        loaded: Sequence[LoadedModel],
    ) -> Runner:
        """Make the runner of a model that is loaded on every device, and open it for requests."""
        if signature is not None:
            must_fit(f"load({settings.path!r})", signature, loaded[0].prepared.call_spec)
        alone = len(loaded) == 1
        replicas = [self._open_replica(model, settings, alone=alone) for model in loaded]
        router = Router(replicas, self._clock, self._blocking)
        runner: Runner = Runner(
            router,
            options=Options(timeout=seconds_or_none("timeout", settings.timeout)),
            updates=self._updates,
            close=self._lifecycle.close,
        )
        self._lifecycle.open(life, runner, router)
        return runner

    def _open_replica(self, model: LoadedModel, settings: ModelConfig, *, alone: bool) -> Replica:
        """Make a loaded model known to its device's queue."""
        prepared, dispatcher = model.prepared, model.dispatcher
        device = dispatcher.queue.name
        notes = (*prepared.info.notes, *self._devices.note_on_cores(device))
        info = msgspec.structs.replace(prepared.info, device=device, notes=notes)
        limits = settings.limits
        bounds = Bounds(limits.jobs, limits.bytes, limits.tenant_jobs, limits.waiting)
        grouping = prepared.grouping
        rule = None
        if grouping is not None:
            rule = QueueBatching(
                grouping.max_rows, grouping.max_delay, grouping.max_seconds, grouping.max_tokens
            )
        replica = Replica(
            info,
            state=dispatcher.queue.add_runner(
                info.name,
                info.instances,
                bounds,
                placing=prepared.placing,
                batching=rule,
                width=prepared.width,
                share=settings.share,
                sheds=settings.overflow == "shed",
                predicts=settings.admission == "predictive",
                routable=not alone,
                memory=model.holding,
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
        if dispatcher.observers is not None:
            dispatcher.observers.tell(loaded_of(dispatcher.queue, replica.state))
        replica.refresh_memory_use()
        log.info(
            "model loaded",
            runner=info.name,
            device=info.device,
            runtime=info.runtime,
            gil=info.gil,
            instances=info.instances,
            threads=info.threads,
            specs=info.spec_source.value,
            notes=info.notes,
        )
        return replica

    # --- closing ---------------------------------------------------------------------------------

    async def _close_all(self, *, terminate: bool) -> None:
        house = self._house
        if house is None or not house.is_open:
            self._closed = True
            return  # never entered, or closed
        house.must_be_here()
        self._closed = True
        self._lifecycle.abandon_loads()
        self._devices.keep_numbers()

        async def work() -> None:
            faults = await self._lifecycle.close_all(terminate=terminate)
            faults += await self._devices.close()  # whatever became of the models
            self._blocking.end()
            self._configured.clear()
            if self._loop_lag is not None:
                self._loop_lag.close()
            door, self._door = self._door, None  # it refers to this object
            if door is not None:
                await door.close()
            if faults:
                self._all_closed = None  # the next call tries again
                raise faults[0]
            house.finish()

        if self._all_closed is None:
            self._all_closed = house.start(work)
        elif terminate:  # the close under way has less to wait for
            self._lifecycle.terminate()
        await asyncio.shield(self._all_closed)
        await house.ended()

    # --- checks ----------------------------------------------------------------------------------

    def _must_own(self, runners: Iterable[Runner]) -> None:
        self._must_be_open()
        runners = tuple(runners)
        for runner in runners:
            if not isinstance(runner, Runner):
                raise ConfigError(f"expected the runner that load() returned, got {brief(runner)}.")
        self._lifecycle.must_own(runners)

    def _must_be_open(self) -> None:
        if self._closed:
            raise RunnerClosedError("the scheduler is closed")
        if self._house is None:
            raise RunnerClosedError(
                "the scheduler is not running; use `async with Scheduler() as scheduler:`"
            )
        self._house.must_be_here()


def _must_not_wait_for_own_lease(
    runners: Iterable[Runner], call: str, device: str | None = None
) -> None:
    """Check that this task does not wait for the end of a lease that it holds."""
    for runner in runners:
        holders = router_of(runner).holders
        if holders.held:
            holders.must_hold_none(call, device)
            holders.watch()
