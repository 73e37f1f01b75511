"""Applying a changed configuration: which models it loads, closes and changes, and the report.

`plan` compares settings and does nothing. `ConfiguredModels.apply` carries a plan out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec

from aoti_sched.arguments import timeout as seconds_or_none
from aoti_sched.config import ModelConfig, SchedulerConfig
from aoti_sched.errors import AotiSchedError, ConfigError
from aoti_sched.runner import Runner, router_of, set_timeout

Load: TypeAlias = "Callable[[str, ModelConfig], Awaitable[Runner]]"
"""Loads a model under a name."""

LIVE = frozenset({"timeout", "overflow", "on_failure"})
"""Settings of a model that change while it serves.

`overflow` does so between "reject" and "wait" only: what may be shed is kept track of from the
first request on.
"""


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


class ConfiguredModels:
    """The models that configurations have loaded. Those of `load` are no business of theirs.

    Nothing here refers to the scheduler, so that a closed one is no part of a reference cycle.

    Args:
        runners: All open runners by name, kept up to date by the scheduler.
    """

    def __init__(self, runners: Mapping[str, Runner]) -> None:
        self._runners = runners
        self._models: dict[str, tuple[Runner, ModelConfig]] = {}
        self._applying = asyncio.Lock()

    async def load(self, name: str, settings: ModelConfig, load: Load) -> None:
        """Load a model; raises as `Scheduler.load` does."""
        self._models[name] = (await load(name, settings), settings)

    def clear(self) -> None:
        """Forget the models. The scheduler closes."""
        self._models.clear()

    async def apply(
        self,
        now: SchedulerConfig,
        wanted: SchedulerConfig,
        load: Load,
        must_be_open: Callable[[], None],
    ) -> ConfigReport:
        """Make the models those of a configuration, and report. One call at a time does so.

        Args:
            now: The settings that the scheduler was entered with.
            wanted: The new settings, checked.
            load: Loads a model.
            must_be_open: Raises RunnerClosedError when the scheduler closes.

        Raises:
            ConfigError: `Scheduler.load` has taken the name of a model.
            RunnerClosedError: The scheduler is closed or closes.
        """
        async with self._applying:
            must_be_open()
            todo = plan(self._settings(wanted), wanted.models)
            failed: dict[str, str] = {}

            async def attempt(name: str, step: Coroutine[Any, Any, None]) -> None:
                try:
                    await step
                except AotiSchedError as error:
                    must_be_open()
                    failed[name] = str(error)

            for name, names in todo.change.items():
                self._change(name, wanted.models[name], names)
            for name in todo.close:
                await attempt(name, self._close(name))
            for name in todo.replace:
                await attempt(name, self._replace(name, wanted.models[name], load))
            for name in todo.load:
                await attempt(name, self.load(name, wanted.models[name], load))
        return ConfigReport(
            loaded=tuple(name for name in todo.load if name not in failed),
            closed=tuple(name for name in todo.close if name not in failed),
            changed=todo.change,
            replaced={n: names for n, names in todo.replace.items() if n not in failed},
            unchanged=todo.keep,
            failed=failed,
            needs_restart=needs_restart(now, wanted),
        )

    def _settings(self, wanted: SchedulerConfig) -> dict[str, ModelConfig]:
        """Return the settings of the models that serve, by name."""
        now = {
            name: settings
            for name, (runner, settings) in self._models.items()
            if self._runners.get(name) is runner
        }
        for name in wanted.models:
            if name in self._runners and name not in now:
                raise ConfigError(
                    f"apply(): models.{name}: load() has made a runner of this name. Rename one of "
                    "them, or close that runner first."
                )
        return now

    async def _close(self, name: str) -> None:
        await self._models[name][0].aclose()
        del self._models[name]

    async def _replace(self, name: str, settings: ModelConfig, load: Load) -> None:
        """Close a model and load it anew; with its old settings where that fails."""
        old = self._models[name][1]
        await self._close(name)
        try:
            await self.load(name, settings, load)
        except AotiSchedError:
            with suppress(AotiSchedError):
                await self.load(name, old, load)
            raise

    def _change(self, name: str, settings: ModelConfig, names: Sequence[str]) -> None:
        """Change the settings of a model that serves on."""
        runner, _ = self._models[name]
        if "timeout" in names:
            set_timeout(runner, seconds_or_none("timeout", settings.timeout))
        for replica in router_of(runner).replicas:
            replica.blocks_when_full = settings.overflow == "wait"
            replica.rebuild_on_failure = settings.on_failure == "rebuild"
        self._models[name] = (runner, settings)


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
        elif setting != "models":
            found.append(setting)
    return tuple(found)


def _differences(old: msgspec.Struct, new: msgspec.Struct) -> tuple[str, ...]:
    return tuple(name for name in old.__struct_fields__ if getattr(old, name) != getattr(new, name))


def _overflows(names: tuple[str, ...], old: ModelConfig, new: ModelConfig) -> tuple[str, ...]:
    return (old.overflow, new.overflow) if "overflow" in names else ()
