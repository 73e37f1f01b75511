"""Chooses a device's executor: native lanes, or Python threads where native lanes are missing.

Native lanes are missing where the installation found no C++ compiler, and where the package is
imported from a source tree that was not installed in place.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence

from aoti_sched.backends.contracts import Executor
from aoti_sched.errors import ConfigError
from aoti_sched.events import log

CHOICE = "AOTI_SCHED_EXECUTOR"
"""The environment variable that forces "native" or "threads", for comparisons and tests.

Without a value, native lanes are used where they are installed.
"""


def open_executor(
    name: str,
    lanes: int,
    cores: int,
    set_threads: Callable[[int], None],
    affinity: Sequence[int] | None = None,
    *,
    launchers: int | None = None,
    most: int | None = None,
) -> Executor:
    """Open the executor of a device.

    Args:
        name: The device's name.
        lanes: The number of lanes.
        cores: The number of cores that the process may use.
        set_threads: Sets the intra-op thread count of the calling thread.
        affinity: A core for each lane, by the system's numbers; None leaves the choice to the
            system. Threads that a run starts stay on their lane's core too, so use this for models
            of one thread.
        launchers: The number of threads for all native lanes; None for one thread per lane.
        most: The most lanes that the executor may grow to; None for `lanes`.

    Raises:
        ConfigError: The environment asks for an executor that is not installed, or this process may
            not use one of the cores.
    """
    if affinity is not None:
        _check(name, lanes, affinity)
    wanted = os.environ.get(CHOICE, "")
    if wanted not in ("", "native", "threads"):
        raise ConfigError(f"{CHOICE}={wanted!r}: expected 'native' or 'threads'.")
    built = importlib.util.find_spec("aoti_sched.backends.native._native") is not None
    if wanted == "native" and not built:
        from aoti_sched.backends.native.missing import missing

        why, remedy = missing()
        raise ConfigError(f"{CHOICE}=native, but {why}. To have native lanes, {remedy}.")
    if built and wanted != "threads":
        from aoti_sched.backends.native.executor import NativeExecutor

        return NativeExecutor(
            name, lanes, cores, set_threads, affinity, launchers=launchers, most=most
        )
    if launchers is not None:
        raise ConfigError(
            f"device {name!r}: launchers={launchers} needs native lanes, and {CHOICE}=threads. "
            "Leave launchers out."
        )
    from aoti_sched.backends.executors.threads import ThreadsExecutor

    if not wanted:
        warn_of_threads()
    return ThreadsExecutor(name, lanes, set_threads, affinity)


@functools.cache
def warn_of_threads() -> None:
    """Log, once in a process, what an installation without native lanes costs."""
    from aoti_sched.backends.native.missing import missing

    why, remedy = missing()
    log.warning(
        "lanes are Python threads",
        why=f"{why}, so its native lanes are missing",
        cost=f"80 to 200 us more per request; {remedy}",
    )


def _check(name: str, lanes: int, affinity: Sequence[int]) -> None:
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError(
            f"device {name!r}: affinity={list(affinity)}: this system can't bind a thread to a "
            "core. Leave affinity out."
        )
    if len(affinity) != lanes:
        raise ConfigError(
            f"device {name!r}: affinity={list(affinity)}: expected one core for each of {lanes} "
            "lanes."
        )
    ours = os.sched_getaffinity(0)
    if not ours.issuperset(affinity):
        raise ConfigError(
            f"device {name!r}: affinity={list(affinity)}: this process may use the cores "
            f"{sorted(ours)} only."
        )
