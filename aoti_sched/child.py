"""Run work in a child process, where what it breaks does no harm.

Linux only; blocking, with a time limit.

Knows no torch and nothing of the package but its errors. The child is a fork. It shares this
process's memory, so a loaded model, a module and its custom operators are there at no cost, and
what it writes to is its own copy. It may end its process, change a module or draw random numbers:
this process sees nothing of that but the values that the child tells.

The child runs nothing but the work, with its output and core dumps turned off, and never returns to
Python's exit code. torch's data loaders fork processes of many threads in the same way. A lock that
another thread held at the moment of the fork stays locked in the child; the time limit ends a child
that waits for it.

No function here raises for what the child does, nor for a child that can't be started: either is an
answer.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from aoti_sched.errors import first_line

Tell = Callable[[Any], None]
"""Sends a value that JSON can express from the child to its parent."""

Trial = Callable[[], str]
"""Returns a text, in the child."""

DIED = "the run ends its process"
TOO_LONG = "it took too long to find out"
NOT_STARTED = "no process could be started to try it"
"""The beginning of the answer where no child can be forked; the reason follows."""

FAULT = "trying it failed by itself"
"""The beginning of the answer where the code that tries raised an error; the error follows."""

_DONE = "done"


def can_fork() -> bool:
    """Return whether child processes share their parent's memory here and may run threads."""
    return sys.platform == "linux" and hasattr(os, "fork")


def is_unknown(answer: str) -> bool:
    """Return whether an answer says nothing of the trial.

    It had no time, no process, or a fault of its own.
    """
    return answer == TOO_LONG or answer.startswith((NOT_STARTED, FAULT))


def in_child(work: Callable[[Tell], None], limit: float) -> tuple[list[Any], str]:
    """Do the work in a child process and wait for it.

    Args:
        work: Called in the child with a function that sends values to the parent. An error that it
            raises ends the child.
        limit: Seconds after which the child is killed.

    Returns:
        What the child told, in order, and why it told no more: "" where the work came to its end;
        a text that begins with `FAULT` where it raised an error.
    """
    found: list[tuple[list[Any], str]] = []
    # libgomp keeps a team for each thread that ran kernels in parallel, and a fork loses its
    # members. A thread of its own has run none, so the child believes in no team that it does not
    # have.
    thread = threading.Thread(
        target=lambda: found.append(_fork(work, limit)), name="aoti_sched-child"
    )
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        return [], f"{NOT_STARTED} ({first_line(error)})"
    thread.join()
    return found[0] if found else ([], NOT_STARTED)


def answers(
    trials: Sequence[Trial], *, seconds: float, prepare: Callable[[], None] | None = None
) -> list[str]:
    """Run trials one after another in a child and return an answer for each.

    The trials see what those before them changed there. After one that ended the child, the rest
    run in a new one.

    Args:
        trials: What to run.
        seconds: How long all of them together may take.
        prepare: Called first in each child.

    Returns:
        What each trial returned; for one that raised, its error's first line; `DIED`, `TOO_LONG` or
        a text that begins with `NOT_STARTED` for the others.
    """
    found: list[str] = []
    deadline = time.monotonic() + seconds

    def work(tell: Tell) -> None:
        if prepare is not None:
            prepare()
        for trial in trials[len(found) :]:
            try:
                answer = trial()
            except Exception as error:  # noqa: BLE001 -- a trial's error is its answer
                answer = first_line(error)
            tell(answer)

    while len(found) < len(trials):
        told, end = in_child(work, max(0.0, deadline - time.monotonic()))
        found += told
        left = len(trials) - len(found)
        if end.startswith(NOT_STARTED):
            found += [end] * left
        elif time.monotonic() >= deadline:
            found += [TOO_LONG] * left
        elif left:
            found.append(end if end.startswith(FAULT) else DIED)
    return found


def _fork(work: Callable[[Tell], None], limit: float) -> tuple[list[Any], str]:
    import resource  # not everywhere, and not to be imported in the child

    core_limit = (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
    try:
        mine, its = os.pipe()
    except OSError as error:
        return [], f"{NOT_STARTED} ({error.strerror})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of a fork with threads; see above
            pid = os.fork()
    except OSError as error:
        os.close(mine)
        os.close(its)
        return [], f"{NOT_STARTED} ({error.strerror})"
    if pid == 0:
        _be_child(work, its, lambda: resource.setrlimit(resource.RLIMIT_CORE, core_limit))
    os.close(its)
    in_time = False
    try:
        data, in_time = _read(mine, limit)
    finally:
        if not in_time:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
        os.close(mine)
        status = _wait(pid)
    lines = data.split(b"\n")[:-1]  # what follows the last line's end was cut off
    told = [json.loads(line) for line in lines]
    if told and told[-1] == [_DONE]:
        return told[:-1], ""
    if told and isinstance(told[-1], dict) and FAULT in told[-1]:
        return told[:-1], f"{FAULT}: {told[-1][FAULT]}"
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
            _write(its, json.dumps(value).encode() + b"\n")

        try:
            work(tell)
        except Exception as error:  # noqa: BLE001 -- the parent reports it
            tell({FAULT: first_line(error)})
        else:
            tell([_DONE])
    finally:
        os._exit(0)


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


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
    except ChildProcessError:  # the application waits for all children of this process
        return None
