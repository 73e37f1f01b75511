"""Settings: what a scheduler, its devices and its models are told; TOML in, validated, plain Structs.

[devices.cpu]
lanes = 2
limits = { jobs = 2048, bytes = 268435456 }

[models.encoder]
path = "encoder.pt2"          # relative to this file; "~/encoder.pt2" is in your home directory
instances = 2
overflow = "wait"
timeout = 0.5
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from aoti_sched.arguments import checked_struct, expanded, file_name, flag
from aoti_sched.errors import ConfigError, brief

Overflow = Literal["reject", "wait", "shed"]
"""What happens to a request when a bound is reached: an immediate QueueFullError; waiting for room; or the worst of those
queued, itself included, is dropped: of the lowest class, then with the latest deadline, then the newest."""

Admission = Literal["bounded", "predictive"]
"""What admission looks at: the bounds alone, or also whether a request could be finished by its deadline."""

OnFailure = Literal["report", "rebuild"]
"""What follows when runs fail again and again: `stats().health` says so; or the container is built anew, too."""

Evict = Literal["lru"]
"""Whose weights are freed when a model needs the memory: those of the idle model that was used the longest ago."""

PlacementName = Literal["auto", "lane", "inline"]
"""Where runs go: on a lane; inline, on the loop's own thread; or inline once they are known to be short."""

MOST = 1024
"""Instances of a model, and lanes of a device, at most. Each instance has memory of its own in the runtime, and each lane a thread."""

INLINE_LIMIT = 50e-6
"""Seconds. A hop to a sleeping thread costs 60 to 70 µs: a run that is hardly longer than this is over sooner inline."""

_LARGEST = 16 << 20
"""Bytes of a configuration file."""

_T = TypeVar("_T")
_Count = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
_Few = Annotated[int, Meta(ge=1, le=MOST)]
"""Of things that take a thread, a stream or a model's memory each."""
_Core = Annotated[int, Meta(ge=0, le=65535)]
_Delay = Annotated[float, Meta(ge=0, le=3600)]
_Seconds = Annotated[float, Meta(gt=0)]
_Share = Annotated[float, Meta(gt=0, lt=1e9)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much may be queued (not running) at once; `bytes` counts the inputs. None is no bound.

    `tenant_jobs` is for each tenant of a model (`runner.options(tenant=...)`), and means nothing for a device.
    """

    jobs: _Count | None = 1024
    bytes: _Count | None = None
    tenant_jobs: _Count | None = None


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device.

    `lanes` is how many runs go on at once, at most 1024; by default one per core of the process. `affinity` binds each
    lane's thread to one core, by number; by default the system places them. Of "cpu:0", "cpu:1" and so on, which are parts of the
    CPU, it says which cores they are; for those where it does not, what other cores there are is divided among them. Runs never use more than `cores` together, each as many as it has threads; by default what
    the process may use, and on other devices than CPUs one for each lane. A request that was queued for `max_wait` seconds is
    overdue, and every second run is of the one that came first, whatever its priority class; None for strict classes. On CUDA, `launchers`
    is how many threads launch the runs of all lanes and look what is done; by default each lane has a thread, which waits for its runs.

    The weights of its models take at most `memory_limit` bytes together, staged and previous sets included. A load or an update that would not
    fit is refused with MemoryLimitError; with `evict="lru"`, models that are idle are parked for it, and come back when they are asked for.
    """

    lanes: _Few | None = None
    cores: _Few | None = None
    max_wait: Annotated[float, Meta(ge=0)] | None = None
    affinity: tuple[_Core, ...] | None = None
    launchers: _Few | None = None
    limits: Limits = Limits(jobs=4096)
    memory_limit: _Count | None = None
    evict: Evict | None = None


class Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests that come together run as one, and each gets its own rows back.

    Args:
        max_size: Rows of one batch; by default what the model was compiled for, or 64.
        max_delay: Seconds that a request waits for others to join it, though never past a deadline. With 0.0, only those go
            together that would have waited anyway, or come in the same turn of the loop.
        dim: The dimension along which the rows of every input and output lie. A package that `compile_package` made says it by
            itself; of another one, only you know that a request's rows do not depend on one another.
        pad_to: Run the model with one of these numbers of rows only, for models that were compiled for them or would
            compile anew; "powers_of_two" for 1, 2, 4 and so on. What is padded is zeros, and never given back.
        ragged: Inputs, by name, that may differ in their other free dimensions within a batch, and what they are padded with to
            the longest: `{"input_ids": 0, "attention_mask": 0}`. Without, only requests of the same sizes go together.
        detach_rows: Give each request a copy of its rows, and not a view of all of them.
        assume_independent: Take your word that no row influences another. Otherwise a model is refused where running it, when it was
            compiled or as it is loaded, shows that rows do, or can't show that they don't.
    """

    max_size: _Count | None = None
    max_delay: _Delay = 0.0
    dim: Annotated[int, Meta(ge=0, le=63)] | None = None
    pad_to: Annotated[tuple[_Count, ...], Meta(min_length=1)] | Literal["powers_of_two"] | None = (
        None
    )
    ragged: dict[str, bool | float] = {}
    detach_rows: bool = False
    assume_independent: bool = False


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model, as `Scheduler.load` takes it; see there."""

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
    sha256: str | None = None
    weights: str | None = None
    weights_strict: bool = True


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of a scheduler.

    `cache_dir` is where packages are extracted (default: the user's cache directory); `~` is your home directory. `log_requests`
    logs one event per request; otherwise only loads, closes and faults are logged.
    """

    devices: dict[str, DeviceConfig] = {}
    models: dict[str, ModelConfig] = {}
    cache_dir: str | None = None
    log_requests: bool = False


def read_config(path: str | os.PathLike[str]) -> SchedulerConfig:
    """Read a TOML file. Paths in it are relative to its folder, and `~` is a home directory.

    Raises:
        ConfigError: The file is missing, not TOML, or a setting is unknown, of the wrong type or out of
            range; the message gives the setting's path.
    """
    file = Path(file_name("the configuration", path))
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{file}: the configuration can't be read: {error.strerror}") from error
    if len(content) > _LARGEST:
        raise ConfigError(
            f"{file}: larger than {_LARGEST} bytes. A configuration is a few lines of TOML."
        )
    try:
        settings = msgspec.toml.decode(content)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error
    except RecursionError as error:
        raise ConfigError(
            f"{file}: nested too deeply. No setting is nested more than four deep."
        ) from error
    # Each device and model by itself first: msgspec's path of a fault in the whole would not name it.
    for section, kind in (("devices", DeviceConfig), ("models", ModelConfig)):
        entries = settings.get(section)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            _convert(entry, kind, file, f"{section}.{name}")
    config = _convert(settings, SchedulerConfig, file)
    models = {
        name: msgspec.structs.replace(
            model,
            path=_beside(file, f"models.{name}.path", model.path),
            weights=model.weights and _beside(file, f"models.{name}.weights", model.weights),
        )
        for name, model in config.models.items()
    }
    cache_dir = config.cache_dir and _beside(file, "cache_dir", config.cache_dir)
    return msgspec.structs.replace(config, models=models, cache_dir=cache_dir)


def _beside(file: Path, setting: str, path: str) -> str:
    """The path that a setting of the file means."""
    what = f"{file}: {setting}"
    return str(file.parent / expanded(what, file_name(what, path)))


def _convert(settings: Any, kind: type[_T], file: Path, section: str = "") -> _T:
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        place = f"{section}{path.rstrip('`')}".lstrip(".")
        raise ConfigError(
            f"{file}: {place}: {message}" if place else f"{file}: {message}"
        ) from error


def in_full(device: str) -> str:
    """A device's name, with its number where torch lets it be left out, and without zeros before it."""
    parts = re.fullmatch(r"(cpu|cuda|xpu):([0-9]{1,9})", device)
    if parts is not None:
        return f"{parts[1]}:{int(parts[2])}"
    return f"{device}:0" if device in ("cuda", "xpu") else device


def is_part(device: str) -> bool:
    """Whether a device is a part of the CPU: "cpu:0", "cpu:1" and so on."""
    return re.fullmatch(r"cpu:[0-9]{1,9}", device) is not None


def cores_of(device: str, devices: Mapping[str, DeviceConfig]) -> tuple[int, ...] | None:
    """The cores that are named for "cpu:0", "cpu:1" and so on and are nobody else's; () when none are, None for other devices.

    Raises:
        ConfigError: Another such device has one of them, too.
    """
    if not is_part(device):
        return None
    cores = devices[device].affinity or () if device in devices else ()
    for other, settings in devices.items():
        shared = sorted({*cores} & {*(settings.affinity or ())})
        if other != device and is_part(other) and shared:
            raise ConfigError(
                f"devices.{device}: affinity: core {shared[0]} is {other!r}'s, too; such devices have no core in common"
            )
    if len({*cores}) < len(cores):
        raise ConfigError(f"devices.{device}: affinity={list(cores)}: a core is named twice")
    return cores


def divided(devices: Sequence[str], cores: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Divide cores among parts of the CPU, by number: as many for each, and of what is left one for each of the first.

    Raises:
        ConfigError: There are fewer cores than devices.
    """
    devices = sorted(devices, key=lambda name: int(name.partition(":")[2]))
    each, more = divmod(len(cores), len(devices))
    if not each:
        raise ConfigError(
            f"devices {', '.join(map(repr, devices))}: {len(cores)} cores can't be divided among {len(devices)} devices. Use fewer of "
            "them, or 'cpu', which is all cores."
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
    """Return a scheduler's settings that were given in code, validated as if they had come from a file.

    Raises:
        ConfigError: A setting is of the wrong type or out of range; the message gives its path.
    """
    if not isinstance(config, SchedulerConfig):
        raise ConfigError(
            f"Scheduler(config=): expected a SchedulerConfig, got {brief(config)}. Of a file: Scheduler.from_config(path)."
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
        **sections, cache_dir=cache_dir, log_requests=flag("log_requests", config.log_requests)
    )
