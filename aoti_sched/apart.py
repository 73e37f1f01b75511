"""Run small trials in a forked child, where what they break does no harm.

A trial may end its process, change a module, or draw random numbers: this process sees nothing of it but the answer, a
text. The child shares this process's memory, so a module and its custom operators are there at no cost.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence

from aoti_sched.evidence import first_line

Trial = Callable[[], str]
"""Gives a text, in the child."""

DIED = "the run ends its process"
TOO_LONG = "it took too long to find out"


def can_fork() -> bool:
    """Whether this platform has children that share their parent's memory."""
    return hasattr(os, "fork")


def answers(trials: Sequence[Trial], *, seconds: float) -> list[str]:
    """What each trial returned; for one that raised, its error's first line; `DIED` or `TOO_LONG` for others.

    Trials run one after another in one child, and see what those before them changed there. After one that ended the child,
    the rest run in a new one.
    """
    found: list[str] = []
    deadline = time.monotonic() + seconds
    # A thread of its own: libgomp keeps a team for each thread that ran kernels in parallel, and a fork loses its members.
    # In a thread that has run nothing yet there is none to lose.
    thread = threading.Thread(target=_all, args=(trials, deadline, found), name="aoti_sched-apart")
    thread.start()
    thread.join()
    return found


def _all(trials: Sequence[Trial], deadline: float, found: list[str]) -> None:
    while len(found) < len(trials):
        lines, why = _in_one_child(trials[len(found) :], deadline)
        found.extend(lines)
        if len(found) < len(trials):
            found.append(why)
        if why == TOO_LONG:
            found.extend([TOO_LONG] * (len(trials) - len(found)))


def _in_one_child(trials: Sequence[Trial], deadline: float) -> tuple[list[str], str]:
    """The answers until the child ended, and why it did."""
    reader, writer = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # since Python 3.12: a fork with threads
            child = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    if child == 0:
        _serve(trials, writer)
    os.close(writer)
    try:
        text, why = _read(reader, deadline)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        os.close(reader)
    lines = text.split(b"\n")[:-1]
    return [json.loads(line) for line in lines], why


def _read(reader: int, deadline: float) -> tuple[bytes, str]:
    poll = select.poll()
    poll.register(reader, select.POLLIN | select.POLLHUP)
    text = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return text, TOO_LONG
        part = os.read(reader, 65536)
        if not part:
            return text, DIED
        text += part


def _serve(trials: Sequence[Trial], writer: int) -> None:
    """The child: answers, and ends without running what this process would run at its end."""
    try:
        _quiet()
        for trial in trials:
            try:
                answer = trial()
            except Exception as error:  # noqa: BLE001 -- the answer is told to the parent
                answer = first_line(error)
            os.write(writer, json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(0)


def _quiet() -> None:
    """No core file, no traceback, no words on the terminal: that a trial fails is an answer."""
    import faulthandler
    import resource

    import torch

    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
