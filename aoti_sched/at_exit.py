"""Ends native work in order at interpreter exit: loops in daemon threads, lanes, detached threads.

The interpreter's end unwinds a thread that waits for the GIL. In most of torch's functions, the
release of a tensor among them, the thread waits below C++ that may not throw, and the unwinding
aborts the process. A thread that returns from native code still later finds torch torn down.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import Any, Protocol, TypeVar

PATIENCE = 1.0
"""Seconds that the exit waits for the loops; a loop that user code blocks is left as it is."""
PAUSE = 5.0
"""Seconds that a loop pauses after the lanes are closed, which outlasts the interpreter's end.

Then the loop goes on, for an exit handler that was registered before this package was imported and
waits for the loop.
"""


_T = TypeVar("_T")


class _Closable(Protocol):
    def close(self) -> None: ...


class _Loop(Protocol):
    def is_running(self) -> bool: ...
    def call_soon_threadsafe(self, callback: Any, /, *args: Any) -> object: ...


class _Serving(Protocol):
    @property
    def loop(self) -> _Loop: ...
    @property
    def is_open(self) -> bool: ...


_executors: weakref.WeakKeyDictionary[_Closable, None] = weakref.WeakKeyDictionary()
_serving: weakref.WeakKeyDictionary[_Serving, int] = weakref.WeakKeyDictionary()


def close_at_exit(executor: _Closable) -> None:
    """Close an executor at interpreter exit, unless the executor has been freed by then.

    Closing the executor twice must do nothing.
    """
    _executors[executor] = None


def pause_at_exit(serving: _Serving) -> None:
    """Pause an event loop at interpreter exit, if the loop still runs then in another thread.

    Args:
        serving: What the loop runs; the loop is left alone when this is no longer open.
    """
    _serving[serving] = os.getpid()


@atexit.register
def _end_all() -> None:
    closed = threading.Event()
    # First of all: a loop would hand the last results of the lanes to threads that free them.
    _pause_loops(closed)
    for executor in _alive(_executors):
        executor.close()
    native = sys.modules.get("aoti_sched.backends.native._native")
    if native is not None:
        native.wait_for_detached_threads(threading.active_count() > 1)
    closed.set()


def _pause_loops(closed: threading.Event) -> None:
    loops = {
        each.loop
        for each in _alive(_serving)
        if _serving.get(each) == os.getpid() and each.is_open and each.loop.is_running()
    }
    waits = []
    for loop in loops:
        paused = threading.Event()
        with suppress(RuntimeError):  # the loop has been closed since
            loop.call_soon_threadsafe(_pause, paused, closed)
            waits.append(paused)
    deadline = time.monotonic() + PATIENCE
    for paused in waits:
        paused.wait(max(0.0, deadline - time.monotonic()))


def _alive(found: weakref.WeakKeyDictionary[_T, Any]) -> list[_T]:
    # In one step, as other threads may add to the dictionary meanwhile.
    return [one for reference in found.keyrefs() if (one := reference()) is not None]


def _pause(paused: threading.Event, closed: threading.Event) -> None:
    paused.set()
    closed.wait()
    time.sleep(PAUSE)
