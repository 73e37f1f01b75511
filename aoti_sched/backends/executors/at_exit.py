"""Waits, at interpreter exit, for lanes and for threads that are in native code without the GIL.

A thread that returned later would find torch torn down, or end the process.
"""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from typing import Protocol


class _Closable(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[_Closable] = weakref.WeakSet()


def close_at_exit(executor: _Closable) -> None:
    """Close an executor at interpreter exit, unless the executor has been freed by then.

    Closing the executor twice must do nothing.
    """
    _open.add(executor)


@atexit.register
def _close_all() -> None:
    for executor in list(_open):
        executor.close()
    native = sys.modules.get("aoti_sched.backends.native._native")
    if native is not None:
        native.wait_for_detached_threads(threading.active_count() > 1)
