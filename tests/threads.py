"""The threads of this process, native ones included, as the system lists them."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path


def named(prefix: str) -> list[tuple[str, int]]:
    """Return name and system id of each thread whose name begins with the prefix, sorted.

    Linux keeps 15 characters of a name; of Python's threads the whole name is known. A thread that
    was joined may be listed for a moment longer.
    """
    names = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names[int(task.name)] = (task / "comm").read_text().strip()
    for thread in threading.enumerate():
        if thread.native_id is not None:
            names[thread.native_id] = thread.name
    return sorted((name, number) for number, name in names.items() if name.startswith(prefix))


def cores_of(name: str, expected: set[int]) -> set[int]:
    """Return the cores that the one thread of this name is bound to.

    A thread is born with its parent's cores and binds itself, and one of the same name that has
    ended takes a moment to vanish. So this waits some seconds for the `expected` cores.
    """
    until = time.monotonic() + 10
    found: list[set[int]] = []
    while found != [expected] and time.monotonic() < until:
        os.sched_yield()
        found = []
        for _, number in named(name):
            with suppress(ProcessLookupError):
                found.append(os.sched_getaffinity(number))
    (cores,) = found
    return cores
