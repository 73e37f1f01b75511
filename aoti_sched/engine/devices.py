"""Devices: the devices of one scheduler, and the dispatcher of each.

Which devices a model's settings name, which are in service, and which cores belong to "cpu:0",
"cpu:1" and so on. Devices are opened when the first model is loaded there, in a worker thread: the
first backend imports torch.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec

from aoti_sched.config import MOST, DeviceConfig, cores_of, divided, in_full, is_part
from aoti_sched.engine.dispatcher import Dispatcher
from aoti_sched.engine.worker import in_worker
from aoti_sched.errors import ConfigError
from aoti_sched.events import log
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.recorded import RecordedQueue

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from aoti_sched.backends.contracts import Device, Executor
    from aoti_sched.config import ModelConfig, SchedulerConfig
    from aoti_sched.engine.dispatcher import Clock
    from aoti_sched.engine.lifecycle import Lifecycle
    from aoti_sched.engine.observers import Observers
    from aoti_sched.stats import DeviceStats


class Devices:
    """The devices of one scheduler.

    Args:
        given: Devices by name that are not to be opened by their names (tests).
        config: The scheduler's settings.
        clock: The scheduler's.
        lifecycle: Hears what the dispatchers report.
        limiter: Of the threads that open and close devices.
        observers: Those of the scheduler.

    Attributes:
        opened: The open devices by name.
        dispatchers: The dispatchers by the names of their devices.
    """

    def __init__(
        self,
        given: Mapping[str, Device],
        config: SchedulerConfig,
        clock: Clock,
        lifecycle: Lifecycle[Any],
        limiter: anyio.CapacityLimiter,
        observers: Observers,
    ) -> None:
        self.opened = dict(given)
        self.dispatchers: dict[str, Dispatcher] = {}
        self.queues: dict[str, RecordedQueue] = {}
        """The queues that keep their facts, those of closed devices included."""
        self._config = config
        self._settings = {in_full(name): settings for name, settings in config.devices.items()}
        self._clock = clock
        self._lifecycle = lifecycle
        self._limiter = limiter
        self._observers = observers
        self._executors: dict[str, Executor] = {}
        """Lanes that were started and have no dispatcher yet."""
        self._last: dict[str, DeviceStats] = {}
        self._drained: set[str] = set()
        self._shares: dict[str, tuple[int, ...]] = {}
        """Cores of parts of the CPU for which none were named."""

    def stats(self) -> dict[str, DeviceStats]:
        """Return the numbers of every device; of closed devices, those of their end."""
        now = {name: dispatcher.stats() for name, dispatcher in self.dispatchers.items()}
        return {**self._last, **now}

    def keep_numbers(self) -> None:
        """Keep the numbers of runners that are removed from now on: the scheduler closes."""
        for dispatcher in self.dispatchers.values():
            dispatcher.keep_numbers()

    async def close(self) -> list[BaseException]:
        """End the lanes of every device.

        Return the faults; a device that failed is closed by the next call.
        """
        faults: list[BaseException] = []
        while self._executors:  # of loads that were abandoned
            name, executor = self._executors.popitem()
            await in_worker(
                executor.close, self._limiter, f"device {name!r}: closing", or_here=True
            )
        for name, dispatcher in list(self.dispatchers.items()):
            self._last[name] = dispatcher.stats()
            dispatcher.close()
            try:
                await in_worker(
                    dispatcher.executor.close,
                    self._limiter,
                    f"device {name!r}: closing",
                    or_here=True,
                )
            except Exception as fault:  # noqa: BLE001 -- the caller raises it
                faults.append(fault)
            else:
                del self.dispatchers[name]
        return faults

    # --- in service ------------------------------------------------------------------------------

    def drain(self, name: str) -> None:
        """Take a device out of service: no model is loaded there any more.

        Raises:
            ConfigError: No model was ever loaded there.
        """
        if name not in self.dispatchers:
            raise ConfigError(
                f"drain_device({name!r}): no such device is in use, but "
                f"{', '.join(map(repr, self.dispatchers)) or 'none'}"
            )
        if name not in self._drained:
            self._drained.add(name)
            log.info("device drains", device=name)

    def must_be_in_service(self, name: str) -> None:
        """Raise ConfigError for a device that was drained."""
        if name in self._drained:
            raise ConfigError(f"device {name!r} was drained by drain_device(); load on another one")

    async def named_by(self, settings: ModelConfig) -> list[str]:
        """Return the full names of the devices that a model is to be loaded on.

        Raises:
            ConfigError: The settings name no device, one of them twice, or one that was drained.
        """
        if settings.devices is None:
            only = in_full(settings.device)
            self.must_be_in_service(only)
            return [only]
        if settings.device != "cpu":
            raise ConfigError(f"load({settings.path!r}): give device= or devices=, and not both")
        wanted = [settings.devices] if isinstance(settings.devices, str) else settings.devices
        names: list[str] = []
        for name in wanted:
            kind, _, number = name.partition(":")
            if number == "*":
                names += await self._all_of(kind, f"load({settings.path!r}): devices={name!r}")
            else:
                self.must_be_in_service(in_full(name))
                names.append(in_full(name))
        if not names or len({*names}) < len(names):
            raise ConfigError(
                f"load({settings.path!r}): devices={list(wanted)}: name one or more devices, each "
                "once"
            )
        return names

    async def _all_of(self, kind: str, setting: str) -> list[str]:
        """Return the devices of a kind that are in service."""
        known = dict.fromkeys([*self.opened, *self._settings])
        found = [name for name in known if name.startswith(f"{kind}:")]
        if not found:
            count = await anyio.to_thread.run_sync(_count_devices, kind, limiter=self._limiter)
            found = [f"{kind}:{index}" for index in range(count)]
        found = [name for name in found if name not in self._drained]
        if not found:
            raise ConfigError(f"{setting}: there is none in service")
        return found

    # --- opening ---------------------------------------------------------------------------------

    async def open(self, name: str) -> Device:
        """Return the device of a name, opened if it is not open yet."""
        device = self.opened.get(name)
        if device is None:
            cores = self._shares.get(name) or cores_of(name, self._settings)
            settings = self._settings.get(name, DeviceConfig())
            opened, executor = await anyio.to_thread.run_sync(
                _open_device, name, cores, settings, limiter=self._limiter
            )
            device = self.opened.setdefault(name, opened)
            if device is opened:
                self._executors[name] = executor
            else:  # another load was quicker
                await in_worker(executor.close, self._limiter, f"device {name!r}: closing")
        return device

    def dispatcher(self, name: str, device: Device) -> Dispatcher:
        """Return the dispatcher of an open device.

        The lanes of a device that was opened by its name run already, since starting them blocks.

        Raises:
            ConfigError: The device's settings do not fit the device, or each other.
        """
        dispatcher = self.dispatchers.get(name)
        if dispatcher is not None:
            return dispatcher
        settings = self._settings.get(name, DeviceConfig())
        lanes = _lanes(name, settings, device)
        queue = _queue(name, settings, lanes, device, self._config.flight_facts)
        executor = self._executors.pop(name, None)
        if executor is None:
            executor = _open_executor(device, lanes, settings)
        try:
            dispatcher = Dispatcher(
                asyncio.get_running_loop(),
                self._clock,
                queue,
                executor,
                log_requests=self._config.log_requests,
                slow=self._config.slow,
                on_failing=self._lifecycle.on_failing,
                on_lost=self._lifecycle.on_lost,
                on_park=self._lifecycle.on_evict,
                on_return=self._lifecycle.on_restore,
            )
        except BaseException:
            executor.close()
            raise
        self.dispatchers[name] = dispatcher
        if isinstance(queue, RecordedQueue):
            self.queues[name] = queue
        dispatcher.observers = self._observers.if_any()
        log.info("device opened", device=name, executor=executor.kind, lanes=lanes)
        return dispatcher

    # --- cores of parts of the CPU ---------------------------------------------------------------

    async def divide_cores(self, names: Sequence[str]) -> None:
        """Give cores to "cpu:0", "cpu:1" and so on where the settings name none.

        Cores are divided once, among these devices and those that the configuration names. Lanes
        are bound to their cores, so a later device would have to take some of them away.

        Raises:
            ConfigError: Cores were divided before, and not for all of these.
        """
        unnamed = self._without_cores(names)
        if not unnamed:
            return
        if not self._shares:
            numbers, count = await anyio.to_thread.run_sync(_cores_here, limiter=self._limiter)
            if not self._shares:  # another load may have been quicker
                self._share([*unnamed, *self._without_cores(self._in_config())], numbers, count)
        late = [name for name in unnamed if name not in self._shares]
        if late:
            raise ConfigError(
                f"device {late[0]!r}: the cores were divided among "
                f"{', '.join(map(repr, self._shares))} when the "
                "first model was loaded there. Name all such devices beforehand: "
                f"SchedulerConfig(devices={{{late[0]!r}: DeviceConfig(), ...}})."
            )

    def note_on_cores(self, name: str) -> tuple[str, ...]:
        """Return a note on a device whose cores were chosen here, for `RunnerInfo.notes`."""
        if name not in self._shares:
            return ()
        cores = ", ".join(map(str, self._shares[name]))
        return (f"No cores were named for {name!r}; of those there are, it has {cores}.",)

    def _share(self, names: Iterable[str], numbers: Sequence[int], count: int) -> None:
        """Divide the cores that no device has.

        Args:
            names: The devices.
            numbers: The cores that this process may use.
            count: How many of them it may use at once.
        """
        taken = {
            core
            for name, settings in self._settings.items()
            if is_part(name)
            for core in settings.affinity or ()
        }
        # Under a quota, all processes would bind themselves to the first cores.
        bound = count >= len(numbers)
        free = [core for core in numbers if core not in taken][: max(0, count - len(taken))]
        self._shares = divided(list(dict.fromkeys(names)), free)
        for name, cores in self._shares.items():
            settings = self._settings.get(name, DeviceConfig())
            if bound and settings.lanes in (None, len(cores)):
                settings = msgspec.structs.replace(settings, affinity=cores)
            else:
                settings = msgspec.structs.replace(
                    settings,
                    affinity=None,
                    lanes=settings.lanes or len(cores),
                    cores=settings.cores or len(cores),
                )
            self._settings[name] = settings
        log.info("cores divided", **{name: list(cores) for name, cores in self._shares.items()})

    def _without_cores(self, names: Iterable[str]) -> list[str]:
        return [
            name
            for name in map(in_full, names)
            if name not in self.opened
            and (name in self._shares or cores_of(name, self._settings) == ())
        ]

    def _in_config(self) -> list[str]:
        """Return every device that the configuration names."""
        names = list(self._settings)
        for model in self._config.models.values():
            wanted = model.devices or model.device
            names += [wanted] if isinstance(wanted, str) else wanted
        return names


def _lanes(name: str, settings: DeviceConfig, device: Device) -> int:
    """Return the number of a device's lanes, its settings checked."""
    lanes = settings.lanes or len(settings.affinity or ()) or device.cores()
    if settings.lanes is not None and not 1 <= settings.lanes <= MOST:
        raise ConfigError(
            f"devices.{name}: lanes={lanes}: a device has 1 to {MOST} lanes. Give fewer."
        )
    if settings.affinity is not None and len(settings.affinity) != lanes:
        raise ConfigError(
            f"devices.{name}: affinity names {len(settings.affinity)} cores for {lanes} lanes; one "
            "for each is needed"
        )
    if settings.limits.tenant_jobs is not None:
        raise ConfigError(
            f"devices.{name}: tenant_jobs bounds each tenant of a model; set it in the model's "
            "limits"
        )
    if settings.limits.waiting is not None:
        raise ConfigError(
            f"devices.{name}: waiting bounds the requests of a model that wait for room; set it in "
            "the model's limits"
        )
    if settings.evict is not None and settings.memory_limit is None:
        raise ConfigError(
            f"devices.{name}: evict={settings.evict!r} needs a memory_limit (in bytes)"
        )
    return lanes


def _most_lanes(settings: DeviceConfig, device: Device) -> int | None:
    """Return the most lanes that models bring along; None where the number of lanes is fixed."""
    most = device.most_lanes
    if most is None or settings.lanes is not None or settings.affinity is not None:
        return None
    return min(most, settings.cores or most)


def _queue(name: str, settings: DeviceConfig, lanes: int, device: Device, keep: int) -> DeviceQueue:
    on_device, most = not name.startswith("cpu"), _most_lanes(settings, device)
    cores: int | None = None  # as many as lanes, which may become more
    if most is None:
        cores = settings.cores or device.cores()
        if on_device and not settings.cores:  # a lane that waits for its device keeps no core busy
            cores = max(cores, lanes)
    make = partial(RecordedQueue, keep=keep) if keep else DeviceQueue
    return make(
        name,
        lanes,
        Bounds(settings.limits.jobs, settings.limits.bytes),
        cores=cores,
        # Libraries of a device keep memory for each pair of a thread and a stream.
        policy=Policy(max_wait=settings.max_wait, keeps_lanes=on_device, most_lanes=most),
        memory_limit=settings.memory_limit,
        evicts=settings.evict is not None,
    )


def _open_device(
    name: str, cores: Sequence[int] | None, settings: DeviceConfig
) -> tuple[Device, Executor]:
    """Open a device and start its lanes.

    The first backend imports torch, which takes a second or two.
    """
    from aoti_sched.backends.devices import open_device

    device = open_device(name, cores)
    lanes = _lanes(name, settings, device)
    return device, _open_executor(device, lanes, settings)


def _open_executor(device: Device, lanes: int, settings: DeviceConfig) -> Executor:
    return device.open_executor(lanes, settings.affinity, settings.launchers, settings.wait)


def _cores_here() -> tuple[list[int], int]:
    """Return the cores that this process may use by number, and how many of them at once."""
    from aoti_sched.backends.cpu import available_cores

    count = available_cores()
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0)), count
    return list(range(count)), count


def _count_devices(kind: str) -> int:
    from aoti_sched.backends.devices import count_devices

    return count_devices(kind)
