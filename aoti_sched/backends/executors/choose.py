"""Which executor a device gets: native lanes, or Python threads where no compiler was at hand
at install.
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
"""Environment: "native" or "threads" forces one, for comparisons and tests; otherwise the best
there is.
"""


def open_executor(
    name: str,
    lanes: int,
    cores: int,
    set_threads: Callable[[int], None],
    affinity: Sequence[int] | None = None,
    *,
    launchers: int | None = None,
) -> Executor:
    """The executor of a device.

    Args:
        name: The device's name.
        lanes: How many lanes.
        cores: How many cores the process may use.
        set_threads: Sets the intra-op thread count of the thread that calls it.
        affinity: A core for each lane, by the system's numbers; None leaves them to the system. The
            threads that a run starts stay on their lane's core too, so this is for models of one
            thread.
        launchers: So many threads for all native lanes; None for one each.

    Raises:
        ConfigError: The environment asks for an executor that is not there, or a lane's core is not
            this process's.
    """
    if affinity is not None:
        _check(name, lanes, affinity)
    wanted = os.environ.get(CHOICE, "")
    if wanted not in ("", "native", "threads"):
        raise ConfigError(f"{CHOICE}={wanted!r}: expected 'native' or 'threads'")
    built = importlib.util.find_spec("aoti_sched.backends.native._native") is not None
    if wanted == "native" and not built:
        raise ConfigError(f"{CHOICE}=native, but this installation was made without a C++ compiler")
    if built and wanted != "threads":
        from aoti_sched.backends.native.executor import NativeExecutor

        return NativeExecutor(name, lanes, cores, set_threads, affinity, launchers=launchers)
    if launchers is not None:
        raise ConfigError(
            f"device {name!r}: launchers={launchers} needs native lanes, and {CHOICE}=threads"
        )
    from aoti_sched.backends.executors.threads import ThreadsExecutor

    if not wanted:
        warn_of_threads()
    return ThreadsExecutor(name, lanes, set_threads, affinity)


@functools.cache
def warn_of_threads() -> None:
    """Say, once in a process, what an installation without native lanes costs."""
    log.warning(
        "lanes are Python threads",
        why="aoti_sched was installed without a C++ compiler, so its native lanes are missing",
        cost="80 to 200 us more per request; install a compiler (g++) and reinstall aoti_sched",
    )


def _check(name: str, lanes: int, affinity: Sequence[int]) -> None:
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError(
            f"device {name!r}: affinity={list(affinity)}: this system can't keep a thread on a core"
        )
    if len(affinity) != lanes:
        raise ConfigError(
            f"device {name!r}: affinity={list(affinity)}: expected one core for each of {lanes} "
            f"lanes"
        )
    ours = os.sched_getaffinity(0)
    if not ours.issuperset(affinity):
        raise ConfigError(
            f"device {name!r}: affinity={list(affinity)}: this process may use the cores "
            f"{sorted(ours)} only"
        )
