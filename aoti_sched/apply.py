"""Applying a changed configuration: which models it loads, closes and changes, and the report.

`plan` compares settings and does nothing. `Scheduler.apply` carries a plan out.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from aoti_sched.config import ModelConfig, SchedulerConfig

LIVE = frozenset({"timeout", "overflow", "on_failure"})
"""Settings of a model that change while it serves.

`overflow` does so between "reject" and "wait" only: what may be shed is kept track of from the
first request on.
"""
_AT_ENTRY = ("devices", "cache_dir", "cache_limit", "cache_age", "log_requests", "slow")


class ConfigReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `Scheduler.apply` has done, by the names of runners.

    Attributes:
        loaded: Models that were not there before.
        closed: Models that the configuration does not name any more.
        changed: The changed settings of each model that serves on.
        replaced: The changed settings of each model that was closed and loaded anew.
        unchanged: Models that were left alone.
        failed: Why a model could not be loaded or closed. One that was to be replaced serves with
            its old settings, unless these can't be loaded any more either.
        needs_restart: Changed settings of the scheduler and its devices, such as
            "devices.cpu.lanes". They take effect with a new scheduler only.
    """

    loaded: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    changed: dict[str, tuple[str, ...]] = {}
    replaced: dict[str, tuple[str, ...]] = {}
    unchanged: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    needs_restart: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done so that the models are those of a configuration.

    Attributes:
        load: New models.
        close: Models to close.
        change: For each model that serves on, its changed settings.
        replace: For each model that is loaded anew, its changed settings.
        keep: Models that are left alone.
    """

    load: tuple[str, ...]
    close: tuple[str, ...]
    change: dict[str, tuple[str, ...]]
    replace: dict[str, tuple[str, ...]]
    keep: tuple[str, ...]


def plan(now: Mapping[str, ModelConfig], wanted: Mapping[str, ModelConfig]) -> Plan:
    """Return what turns the models that are loaded into those that are wanted."""
    differences = {
        name: _differences(now[name], model) for name, model in wanted.items() if name in now
    }
    live = {
        name: names
        for name, names in differences.items()
        if LIVE.issuperset(names) and "shed" not in _overflows(names, now[name], wanted[name])
    }
    return Plan(
        load=tuple(name for name in wanted if name not in now),
        close=tuple(name for name in now if name not in wanted),
        change={name: names for name, names in live.items() if names},
        replace={name: names for name, names in differences.items() if name not in live},
        keep=tuple(name for name, names in live.items() if not names),
    )


def needs_restart(now: SchedulerConfig, wanted: SchedulerConfig) -> tuple[str, ...]:
    """Return the changed settings that a running scheduler can't change."""
    found = []
    for setting in _differences(now, wanted):
        if setting == "devices":
            for name in {**now.devices, **wanted.devices}:
                old, new = now.devices.get(name), wanted.devices.get(name)
                if old is None or new is None:
                    found.append(f"devices.{name}")
                else:
                    found += [f"devices.{name}.{part}" for part in _differences(old, new)]
        elif setting in _AT_ENTRY:
            found.append(setting)
    return tuple(found)


def _differences(old: msgspec.Struct, new: msgspec.Struct) -> tuple[str, ...]:
    return tuple(name for name in old.__struct_fields__ if getattr(old, name) != getattr(new, name))


def _overflows(names: tuple[str, ...], old: ModelConfig, new: ModelConfig) -> tuple[str, ...]:
    return (old.overflow, new.overflow) if "overflow" in names else ()
