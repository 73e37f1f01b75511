"""Settings of a scheduler, its devices and its models: validated, plain Structs.

`config_file` reads them from TOML.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from aoti_sched.arguments import checked_struct, converted, expanded, file_name, flag
from aoti_sched.errors import ConfigError, brief

Overflow = Literal["reject", "wait", "shed"]
"""What happens to a request when a bound is reached.

- "reject": an immediate QueueFullError.
- "wait": the request waits for room.
- "shed": the worst queued request is dropped, perhaps the new one: of the lowest class, then with
  the latest deadline, then the newest.
"""

Admission = Literal["bounded", "predictive"]
"""What admission checks: the bounds alone, or also whether a request can meet its deadline."""

OnFailure = Literal["report", "rebuild"]
"""What happens when five runs in a row fail.

- "report": `stats().health` and the log show it.
- "rebuild": the container is also rebuilt from the package.
"""

Evict = Literal["lru"]
"""Which weights are evicted when a model needs the memory.

- "lru": those of the idle model that was used the longest ago.
"""

PlacementName = Literal["auto", "lane", "inline"]
"""Where runs happen.

- "lane": on a lane.
- "inline": on the event loop's own thread.
- "auto": on lanes, and inline once runs are known to be short.
"""

MOST = 1024
"""The most instances of a model, and the most lanes of a device.

Each instance has memory of its own in the runtime, and each lane has a thread.
"""

INLINE_LIMIT = 50e-6
"""The longest run, in seconds, that "auto" places inline by default.

A hop to a sleeping thread costs 60 to 70 µs, so a run of hardly more ends sooner inline.
"""

_T = TypeVar("_T")
_Count = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
_Few = Annotated[int, Meta(ge=1, le=MOST)]
"""A number of lanes or instances. Each takes a thread, a stream or a model's memory."""
_Facts = Annotated[int, Meta(ge=0, le=1 << 30)]
_Core = Annotated[int, Meta(ge=0, le=65535)]
_Delay = Annotated[float, Meta(ge=0, le=3600)]
_Seconds = Annotated[float, Meta(gt=0)]
_Share = Annotated[float, Meta(gt=0, lt=1e9)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of what is queued and not running. None sets no bound.

    Args:
        jobs: Requests.
        bytes: Bytes of the requests' inputs.
        tenant_jobs: Requests of each tenant of a model (`runner.options(tenant=...)`). Not for
            devices.
        waiting: Requests of a model that wait for room with overflow="wait". Not for devices.
    """

    jobs: _Count | None = 1024
    bytes: _Count | None = None
    tenant_jobs: _Count | None = None
    waiting: _Count | None = None


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device.

    Args:
        lanes: Runs that go on at once, 1 to 1024. By default one for each core of the process, and
            on accelerators one for each instance that is loaded, 32 at most (on MPS one).
        cores: Cores that all runs may use together; a run uses as many as it has threads. By
            default the cores of the process, and on accelerators one for each lane.
        max_wait: Seconds after which a queued request is overdue. Every second run is of the
            oldest overdue request, whatever its priority class. None for strict classes.
        affinity: For each lane, the number of the core that its thread is bound to. By default the
            system places threads. "cpu:0", "cpu:1" and so on are the parts of the CPU that
            `affinity` names; those without `affinity` divide the remaining cores.
        launchers: On CUDA, threads that launch the runs of all lanes and poll what is done. By
            default each lane has a thread, which waits for its runs.
        wait: On CUDA, how a lane waits for its run. "block", the default, spins for 50 µs and then
            sleeps; "spin" keeps a core busy until the run ends, to notice the end sooner.
        limits: Bounds of the device's queue.
        memory_limit: Bytes that the weights of all its models may take, staged and previous sets
            included. A load or an update that does not fit is refused with MemoryLimitError.
        evict: "lru" evicts the weights of idle models where memory is needed, and restores them
            when the models are used again.
    """

    lanes: _Few | None = None
    cores: _Few | None = None
    max_wait: Annotated[float, Meta(ge=0)] | None = None
    affinity: tuple[_Core, ...] | None = None
    launchers: _Few | None = None
    wait: Literal["block", "spin"] | None = None
    limits: Limits = Limits(jobs=4096)
    memory_limit: _Count | None = None
    evict: Evict | None = None


class Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings for running requests together. Each request gets its own rows back.

    Args:
        max_size: The most rows of one batch. By default what the model was compiled for, or 64.
        max_seconds: The most seconds that a batch is expected to take, by the learned run times. By
            default, while requests of a higher class come to the device, twice what one request
            takes alone: its first, or one of the mean size of those queued with it, whichever takes
            longer. Otherwise eight times what its first request takes. Always at least a
            millisecond. `math.inf` for no bound.
        max_tokens: The most tokens of one batch: its rows times the longest request. The length of
            a request is the largest dimension that `ragged` pads.
        max_delay: Seconds that a request waits for others to join it, never past a deadline. With
            0.0, only requests that would wait anyway, or come in the same iteration of the event
            loop, run together.
        dim: The dimension along which the rows of every input and output lie. A package that
            `compile_package` made states it. For other packages, only you know that a request's
            rows do not depend on one another.
        pad_to: Numbers of rows that the model is run with, for models that were compiled for them.
            "powers_of_two" stands for 1, 2, 4 and so on. Padded rows are zeros, and are not
            returned.
        ragged: Inputs whose other free dimensions may differ within a batch, and the value that
            pads them to the longest: `{"input_ids": 0, "attention_mask": 0}`. Without it, only
            requests of the same sizes run together. Requests of like length go together, as far as
            that is faster than one by one.
        detach_rows: Give each request a copy of its rows instead of a view of all rows.
        assume_independent: Trust that no row influences another. Otherwise running the model must
            show it, at compile time or at load, and the model is refused where it does not.
    """

    max_size: _Count | None = None
    max_seconds: _Seconds | None = None
    max_tokens: _Count | None = None
    max_delay: _Delay = 0.0
    dim: Annotated[int, Meta(ge=0, le=63)] | None = None
    pad_to: Annotated[tuple[_Count, ...], Meta(min_length=1)] | Literal["powers_of_two"] | None = (
        None
    )
    ragged: dict[str, bool | float] = {}
    detach_rows: bool = False
    assume_independent: bool = False


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model. `Scheduler.load` describes the settings."""

    path: str
    model_name: str | None = None
    device: str = "cpu"
    devices: tuple[str, ...] | str | None = None
    instances: _Few = 1
    threads: _Few | None = None
    share: _Share = 1.0
    overflow: Overflow = "reject"
    admission: Admission = "bounded"
    on_failure: OnFailure = "report"
    limits: Limits = Limits()
    timeout: _Seconds | None = None
    placement: PlacementName = "auto"
    inline_limit: _Seconds = INLINE_LIMIT
    batching: Batching | bool | None = None
    warmup: bool = True
    copy_inputs: bool = False
    copy_outputs: Literal["cpu"] | None = None
    cuda_graphs: bool = False
    stream_priority: Annotated[int, Meta(ge=-100, le=0)] = 0
    sha256: str | None = None
    weights: str | None = None
    weights_strict: bool = True


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings of a scheduler.

    Args:
        devices: Settings of devices by name.
        models: Models that are loaded on entry, by the names of their runners.
        cache_dir: Where packages are extracted; `~` is your home directory. By default the user's
            cache directory.
        cache_limit: Bytes that extracted packages may take. On entry, once the models are loaded,
            those that no process uses are deleted, the least recently used first.
        cache_age: Seconds since its last use after which an extracted package that no process uses
            is deleted, on entry.
        log_requests: Log one event for each request. Otherwise only loads, closes and faults are
            logged.
        slow: Log a warning for each request that takes this many seconds or more, from its
            submission to its end; None for no such log.
        loop_lag: Seconds between two samples of the event loop's lag, which
            `SchedulerStats.loop_lag` counts; None for no samples.
        flight_facts: How many of the last facts each device keeps, at least, for
            `Scheduler.flight_record`: a request has three or more. 0 for none.
    """

    devices: dict[str, DeviceConfig] = {}
    models: dict[str, ModelConfig] = {}
    cache_dir: str | None = None
    cache_limit: _Count | None = None
    cache_age: _Seconds | None = None
    log_requests: bool = False
    slow: _Delay | None = None
    loop_lag: _Delay | None = None
    flight_facts: _Facts = 1_000


def in_full(device: str) -> str:
    """Return a device's full name: "cuda:0" for "cuda" and for "cuda:00"."""
    parts = re.fullmatch(r"(cpu|cuda|xpu):([0-9]{1,9})", device)
    if parts is not None:
        return f"{parts[1]}:{int(parts[2])}"
    return f"{device}:0" if device in ("cuda", "xpu") else device


def is_part(device: str) -> bool:
    """Return whether a device is a part of the CPU: "cpu:0", "cpu:1" and so on."""
    return re.fullmatch(r"cpu:[0-9]{1,9}", device) is not None


def cores_of(device: str, devices: Mapping[str, DeviceConfig]) -> tuple[int, ...] | None:
    """Return the cores that are named for a part of the CPU.

    Args:
        device: The device's name.
        devices: Settings by name.

    Returns:
        The numbers of the cores; () where none are named, None for other devices.

    Raises:
        ConfigError: Another part of the CPU has one of the cores, or a core is named twice.
    """
    if not is_part(device):
        return None
    cores = devices[device].affinity or () if device in devices else ()
    for other, settings in devices.items():
        shared = sorted({*cores} & {*(settings.affinity or ())})
        if other != device and is_part(other) and shared:
            raise ConfigError(
                f"devices.{device}: affinity: core {shared[0]} also belongs to {other!r}. Give "
                "each core to one of them."
            )
    if len({*cores}) < len(cores):
        raise ConfigError(f"devices.{device}: affinity={list(cores)}: a core is named twice")
    return cores


def divided(devices: Sequence[str], cores: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Divide cores among parts of the CPU, in the order of their numbers.

    Each part gets the same number of cores; the first parts get one more each while any are left.

    Raises:
        ConfigError: There are fewer cores than devices.
    """
    devices = sorted(devices, key=lambda name: int(name.partition(":")[2]))
    each, more = divmod(len(cores), len(devices))
    if not each:
        raise ConfigError(
            f"devices {', '.join(map(repr, devices))}: {len(cores)} cores can't be divided among "
            f"{len(devices)} devices. Use fewer of them, or 'cpu', which is all cores."
        )
    shares = {}
    begin = 0
    for index, device in enumerate(devices):
        end = begin + each + (index < more)
        shares[device] = tuple(cores[begin:end])
        begin = end
    return shares


def checked(settings: ModelConfig) -> ModelConfig:
    """Return the same settings, validated as if they had come from a file."""
    return checked_struct(settings, f"load({settings.path!r}): ")


def checked_config(config: object) -> SchedulerConfig:
    """Return a scheduler's settings from code, validated as if they had come from a file.

    Raises:
        ConfigError: A setting is of the wrong type or out of range; the message gives its path.
    """
    if not isinstance(config, SchedulerConfig):
        raise ConfigError(
            f"Scheduler(config=): expected a SchedulerConfig, got {brief(config)}. For a file, use "
            "Scheduler.from_config(path)."
        )
    sections = {}
    for section, kind in (("devices", DeviceConfig), ("models", ModelConfig)):
        entries = getattr(config, section)
        if not isinstance(entries, Mapping):
            raise ConfigError(f"{section}: expected settings by name, got {brief(entries)}.")
        for name, entry in entries.items():
            if not isinstance(name, str) or not isinstance(entry, kind):
                raise ConfigError(
                    f"{section}: expected {kind.__name__} by name, got {brief({name: entry})}."
                )
        sections[section] = {
            name: checked_struct(entry, f"{section}.{name}.") for name, entry in entries.items()
        }
    cache_dir = config.cache_dir
    if cache_dir is not None:
        cache_dir = expanded("cache_dir", file_name("cache_dir", cache_dir))
    return SchedulerConfig(
        **sections,
        cache_dir=cache_dir,
        cache_limit=_optional(config.cache_limit, _Count, "cache_limit"),
        cache_age=_duration(config.cache_age, _Seconds, "cache_age"),
        log_requests=flag("log_requests", config.log_requests),
        slow=_duration(config.slow, _Delay, "slow"),
        loop_lag=_duration(config.loop_lag, _Delay, "loop_lag"),
        flight_facts=converted(config.flight_facts, _Facts, "flight_facts"),
    )


def _optional(value: object, kind: type[_T], what: str) -> _T | None:
    return None if value is None else converted(value, kind, what)


def _duration(value: object, kind: type[_T], what: str) -> _T | None:
    if value is not None and not isinstance(value, numbers.Real):
        raise ConfigError(
            f"{what}: expected a number of seconds, such as 0.05, got {brief(value)}."
        )
    return _optional(value, kind, what)
