"""Background: long work that gives way to the loop and the lanes when cores are scarce.

A thread that copies for a second competes with the loop's thread, which then sleeps until the kernel's next tick (4 ms) whenever
it wakes up and finds both cores taken. Where threads have priorities of their own (Linux), such work runs at a lower one.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")

NICENESS = 10
"""How much lower: about a tenth of a core is left to it, in the long run, where everybody wants all."""


def give_way(call: Callable[[], _T]) -> _T:
    """Make a call, at a lower priority, and wait for it.

    It has a thread of its own, since a priority that was lowered can't be raised again without privileges.
    """
    if sys.platform != "linux":
        return call()
    outcome: Future[_T] = Future()

    def work() -> None:
        niceness = os.getpriority(os.PRIO_PROCESS, 0)  # 0 is the calling thread
        os.setpriority(os.PRIO_PROCESS, 0, niceness + NICENESS)
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 -- it is raised where the call was made
            outcome.set_exception(error)

    threading.Thread(target=work, name="aoti:background", daemon=True).start()
    return outcome.result()
