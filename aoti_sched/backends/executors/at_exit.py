"""Waits, at interpreter exit, for lanes and for threads that are in native code without the GIL.

A thread that came back later would find torch torn down, or end the process.
"""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from typing import Protocol


class Closable(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_at_exit(executor: Closable) -> None:
    """Close this executor at interpreter exit, unless it is gone by then.

    Closing twice must do nothing.
    """
    _open.add(executor)


@atexit.register
def _close_all() -> None:
    for executor in list(_open):
        executor.close()
    native = sys.modules.get("aoti_sched.backends.native._native")
    if native is not None:
        native.wait_for_detached_threads(threading.active_count() > 1)
