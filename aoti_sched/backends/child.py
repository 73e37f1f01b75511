"""A child process for runs that may end the process they happen in. Linux only; blocking, with a time limit.

The child is a fork: it has the loaded model, and what it writes to is its own copy. It runs nothing but the work, with its outputs and core
dumps turned off, and never returns to Python's exit code. torch's data loaders fork processes of many threads in the same way. A lock that
another thread held at the moment of the fork stays locked in the child; the time limit ends a child that waits for it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

Tell = Callable[[Any], None]
"""Sends a value that JSON can express from the child to its parent."""

_DONE = "done"


def can_fork() -> bool:
    return sys.platform == "linux" and hasattr(os, "fork")


def in_child(work: Callable[[Tell], None], limit: float) -> tuple[list[Any], str]:
    """Do the work in a child process and wait for it.

    Args:
        work: Called in the child with a function that sends values to the parent. What it raises is lost.
        limit: Seconds after which the child is killed.

    Returns:
        What the child told, in order, and why it told no more: "" where the work came to its end.
    """
    found: list[tuple[list[Any], str]] = []
    # A thread of its own never entered a parallel region, so the child believes in no team of threads that it does not have.
    thread = threading.Thread(target=lambda: found.append(_fork(work, limit)), name="aoti:probe")
    thread.start()
    thread.join()
    return found[0] if found else ([], "it could not be started")


def _fork(work: Callable[[Tell], None], limit: float) -> tuple[list[Any], str]:
    import resource  # not everywhere, and not to be imported in the child

    mine, its = os.pipe()
    core_limit = (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of a fork with threads; see above
            pid = os.fork()
    except OSError as error:
        os.close(mine)
        os.close(its)
        return [], f"it could not be started: {error.strerror}"
    if pid == 0:
        _be_child(work, its, lambda: resource.setrlimit(resource.RLIMIT_CORE, core_limit))
    os.close(its)
    try:
        data, in_time = _read(mine, limit)
        if not in_time:
            os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
    finally:
        os.close(mine)
        status = _wait(pid)
    lines = data.split(b"\n")[:-1]  # what follows the last line's end was cut off
    told = [json.loads(line) for line in lines]
    if told and told[-1] == _DONE:
        return told[:-1], ""
    if not in_time:
        return told, f"it took longer than {limit:g} s"
    if status is not None and os.WIFSIGNALED(status):
        return told, f"it ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return told, "it ended early"


def _be_child(work: Callable[[Tell], None], its: int, dump_no_core: Callable[[], None]) -> NoReturn:
    try:
        gc.disable()  # what belongs to the parent is not to be finalized here
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        faulthandler.disable()
        dump_no_core()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)

        def tell(value: Any) -> None:
            os.write(its, json.dumps(value).encode() + b"\n")

        work(tell)
        tell(_DONE)
    finally:
        os._exit(0)


def _read(descriptor: int, limit: float) -> tuple[bytes, bool]:
    """All that comes until the other end is closed; False with it where that took longer."""
    data = bytearray()
    until = time.monotonic() + limit
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return bytes(data), False
        part = os.read(descriptor, 1 << 16)
        if not part:
            return bytes(data), True
        data += part


def _wait(pid: int) -> int | None:
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:  # someone waits for all children of this process
        return None
