"""Which executor a device gets: native lanes, or Python threads where no compiler was at hand at install."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from aoti_sched.backends.base import Executor
from aoti_sched.errors import ConfigError
from aoti_sched.telemetry import log

CHOICE = "AOTI_SCHED_EXECUTOR"
"""Environment: "native" or "threads" forces one, for comparisons and tests; otherwise the best there is."""


def open_executor(name: str, lanes: int, cores: int, set_threads: Callable[[int], None]) -> Executor:
    """The executor of a device.

    Raises:
        ConfigError: The environment asks for one that is not there.
    """
    wanted = os.environ.get(CHOICE, "")
    if wanted not in ("", "native", "threads"):
        raise ConfigError(f"{CHOICE}={wanted!r}: expected 'native' or 'threads'")
    built = importlib.util.find_spec("aoti_sched.backends.native._native") is not None
    if wanted == "native" and not built:
        raise ConfigError(f"{CHOICE}=native, but this installation was made without a C++ compiler")
    if built and wanted != "threads":
        from aoti_sched.backends.native.executor import NativeExecutor

        return NativeExecutor(name, lanes, cores, set_threads)
    from aoti_sched.backends.threads import ThreadsExecutor

    if not wanted:
        log.warning(
            "lanes are Python threads",
            device=name,
            why="aoti_sched was installed without a C++ compiler, so its native lanes are missing",
            cost="80 to 200 us more per request; install a compiler (g++) and reinstall aoti_sched",
        )
    return ThreadsExecutor(name, lanes, set_threads)
