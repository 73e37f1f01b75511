"""The configuration file: TOML in, `SchedulerConfig` out; each fault is named by its place.

cache_dir = "cache"            # paths are relative to this file; "~" is your home directory

[devices.cpu]
lanes = 2
memory_limit = "4 GiB"         # or a number of bytes
limits = { jobs = 2048, bytes = "256 MiB" }

[defaults]                     # of every model below
overflow = "wait"
timeout = "500 ms"             # or a number of seconds

[models.encoder]
path = "encoder.pt2"
instances = 2

[models.others]                # a runner for each file, named by the file's stem
path = "packages/*.pt2"
"""

from __future__ import annotations

import glob
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from aoti_sched.arguments import expanded, file_name, name_of_file
from aoti_sched.config import DeviceConfig, ModelConfig, SchedulerConfig
from aoti_sched.errors import ConfigError, brief

_T = TypeVar("_T")

_LARGEST = 16 << 20
"""The most bytes of a configuration file."""
SIZES = frozenset({"bytes", "cache_limit", "memory_limit"})
"""Settings in bytes."""
TIMES = frozenset(
    {"cache_age", "timeout", "inline_limit", "loop_lag", "max_delay", "max_wait", "slow"}
)
"""Settings in seconds."""
_OF_ONE_MODEL = ("path", "model_name", "sha256", "weights")
"""Settings that have no default for all models."""
_BYTES = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate(("k", "M", "G", "T"), 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate(("K", "M", "G", "T"), 1)},
}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_MEASURE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµ]+)\s*")


def read_config(path: str | os.PathLike[str]) -> SchedulerConfig:
    """Read a TOML file. Paths in it are relative to its folder, and `~` is a home directory.

    Args:
        path: The file.

    Raises:
        ConfigError: The file is missing, not TOML, or a setting is unknown, of the wrong type or
            out of range; the message gives the setting's path.
    """
    file = Path(file_name("the configuration", path))
    settings = _parsed(file)
    models = list(_models(file, settings))
    # Convert each device and model alone first: msgspec's path of a fault in the whole would not
    # have its name.
    devices = settings.get("devices")
    for name, entry in devices.items() if isinstance(devices, dict) else ():
        _convert(_measured(file, f"devices.{name}", entry), DeviceConfig, file, f"devices.{name}")
    config = _convert(_measured(file, "", {**settings, "models": {}}), SchedulerConfig, file)
    cache_dir = config.cache_dir and _beside(file, "cache_dir", config.cache_dir)
    return msgspec.structs.replace(config, models=_by_name(file, models), cache_dir=cache_dir)


def _parsed(file: Path) -> dict[str, Any]:
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
        settings: dict[str, Any] = msgspec.toml.decode(content)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error
    except RecursionError as error:
        raise ConfigError(
            f"{file}: nested too deeply. No setting is nested more than four deep."
        ) from error
    return settings


# --- models ---------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A model, or all models that a pattern matches, as the file names them."""

    name: str
    """"" for a pattern."""
    place: str
    model: ModelConfig


def _models(file: Path, settings: dict[str, Any]) -> Iterator[_Entry]:
    """Take the models out of the settings, with the defaults for all of them."""
    defaults = settings.pop("defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(f"{file}: defaults: expected a table, got {brief(defaults)}.")
    for setting in _OF_ONE_MODEL:
        if setting in defaults:
            raise ConfigError(
                f"{file}: defaults.{setting}: belongs to one model. Write it in the model's own "
                "table."
            )
    _convert({"path": "-", **_measured(file, "defaults", defaults)}, ModelConfig, file, "defaults")
    models = settings.pop("models", {})
    if isinstance(models, str):
        models = [models]
    if isinstance(models, list):
        for pattern in models:
            place = "models"
            entry = _convert({**defaults, "path": pattern}, ModelConfig, file, place)
            yield _Entry("", place, entry)
        return
    if not isinstance(models, dict):
        raise ConfigError(
            f"{file}: models: expected a table of models, or patterns of files, got "
            f"{brief(models)}."
        )
    for name, given in models.items():
        place = f"models.{name}"
        if not isinstance(given, dict):
            raise ConfigError(f"{file}: {place}: expected a table, got {brief(given)}.")
        entry = _convert({**defaults, **_measured(file, place, given)}, ModelConfig, file, place)
        yield _Entry(name, place, entry)


def _by_name(file: Path, entries: list[_Entry]) -> dict[str, ModelConfig]:
    """Return the models by their runners' names, with their paths in full.

    A table of its own goes before a pattern that matches the same file or gives the same name.
    """
    found: dict[str, ModelConfig] = {}
    patterns: list[tuple[_Entry, list[str]]] = []
    for entry in entries:
        path = _beside(file, f"{entry.place}.path" if entry.name else entry.place, entry.model.path)
        model = msgspec.structs.replace(
            entry.model,
            path=path,
            weights=entry.model.weights
            and _beside(file, f"{entry.place}.weights", entry.model.weights),
        )
        if glob.has_magic(path) and not Path(path).exists():
            patterns.append((entry._replace(model=model), _matches(file, entry, path)))
        else:
            found[entry.name or name_of_file(path)] = model
    own_names, own_paths = set(found), {model.path for model in found.values()}
    for entry, paths in patterns:
        for path in paths:
            name = name_of_file(path)
            if name in own_names or path in own_paths:
                continue
            if name in found and found[name].path != path:
                raise ConfigError(
                    f"{file}: {entry.place}: {path} and {found[name].path} would both be the "
                    f"runner {name!r}. Give one of them a table of its own: [models.NAME]."
                )
            found[name] = msgspec.structs.replace(entry.model, path=path)
    return found


def _matches(file: Path, entry: _Entry, pattern: str) -> list[str]:
    # Path.glob takes no absolute pattern.
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207
    paths = sorted(path for path in found if Path(path).is_file())
    if not paths:
        raise ConfigError(
            f"{file}: {entry.place}: no file matches {entry.model.path!r}. Patterns are relative "
            f"to {file.parent}."
        )
    return paths


def _beside(file: Path, setting: str, path: str) -> str:
    """Return the path that a setting of the file means."""
    what = f"{file}: {setting}"
    return str(file.parent / expanded(what, file_name(what, path)))


# --- sizes and times ------------------------------------------------------------------------------


def _measured(file: Path, place: str, table: Any) -> Any:
    """Return a table with its sizes in bytes and its times in seconds, as numbers.

    The given table is changed in place as well, and so are its limits and its batching.
    """
    if not isinstance(table, dict):
        return table
    for key, value in table.items():
        if key in ("limits", "batching"):
            _measured(file, f"{place}.{key}", value)
        elif isinstance(value, str) and key in SIZES:
            where = f"{place}.{key}".lstrip(".")
            table[key] = _number(file, where, value, _BYTES, "a size", "2 GiB")
        elif isinstance(value, str) and key in TIMES:
            where = f"{place}.{key}".lstrip(".")
            table[key] = _number(file, where, value, _SECONDS, "a time", "50 ms")
    return table


def _number(
    file: Path,
    place: str,
    text: str,
    units: dict[str, int] | dict[str, float],
    kind: str,
    example: str,
) -> int | float:
    found = _MEASURE.fullmatch(text)
    if found is None or found[2] not in units:
        raise ConfigError(
            f"{file}: {place}: {text!r} is not {kind}. Write a number, or a number and a unit as "
            f"in {example!r}; the units are {', '.join(units)}."
        )
    value = float(found[1]) * units[found[2]]
    return round(value) if kind == "a size" else value


def _convert(settings: Any, kind: type[_T], file: Path, section: str = "") -> _T:
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        place = f"{section}{path.rstrip('`')}".lstrip(".")
        raise ConfigError(
            f"{file}: {place}: {message}" if place else f"{file}: {message}"
        ) from error


# --- the schema -----------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, for editors that check TOML."""
    (top,), parts = msgspec.json.schema_components([SchedulerConfig], ref_template="#/$defs/{name}")
    parts = dict(parts)
    for part in parts.values():
        if "description" in part:  # a docstring, which Python cleans itself from 3.13 on
            part["description"] = inspect.cleandoc(part["description"])
        for key, value in part.get("properties", {}).items():
            if key in SIZES:
                part["properties"][key] = _or_text(value, _BYTES)
            elif key in TIMES:
                part["properties"][key] = _or_text(value, _SECONDS)
    model = parts["ModelConfig"]
    parts["Defaults"] = {
        **{key: value for key, value in model.items() if key not in ("required", "description")},
        "title": "Defaults",
        "description": "Settings of every model, where the model's own table has no other.",
        "properties": {
            key: value for key, value in model["properties"].items() if key not in _OF_ONE_MODEL
        },
    }
    settings = parts["SchedulerConfig"]["properties"]
    pattern = {"type": "string", "description": "A path or a pattern of paths."}
    settings["models"] = {
        "anyOf": [settings["models"], pattern, {"type": "array", "items": pattern}]
    }
    settings["defaults"] = {"$ref": "#/$defs/Defaults"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **top,
        "$defs": dict(sorted(parts.items())),
    }


def _or_text(setting: dict[str, Any], units: dict[str, int] | dict[str, float]) -> dict[str, Any]:
    text = {"type": "string", "pattern": rf"^ *[0-9]+(\.[0-9]+)? *({'|'.join(units)}) *$"}
    default = {key: setting[key] for key in ("default",) if key in setting}
    kinds = setting.get("anyOf") or [{k: v for k, v in setting.items() if k != "default"}]
    return {"anyOf": [*kinds, text], **default}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))  # noqa: T201
