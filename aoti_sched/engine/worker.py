"""Worker threads: blocking calls of the engine.

Whatever a call raises is an `Exception` on the loop, and ends its own operation alone.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import anyio
import anyio.to_thread

from aoti_sched.errors import LoadError, ResourcesError
from aoti_sched.foreign import ended_by

_T = TypeVar("_T")


async def in_worker(
    call: Callable[[], _T], limiter: anyio.CapacityLimiter, what: str, *, or_here: bool = False
) -> _T:
    """Call in a worker thread.

    When the caller is cancelled, the call goes on to its end, and so does the caller's wait.

    Args:
        call: Blocks.
        limiter: Limits the threads.
        what: Names the call in the `LoadError` that replaces a `BaseException` of the call.
        or_here: Call on the loop's thread where no thread can be started.

    Raises:
        ResourcesError: No thread can be started, or the call has met such a limit.
    """
    began = False
    # What is raised is handed back as a value: anyio's future would hold it, and its traceback the
    # future.
    raised: list[Exception] = []
    returned: list[_T] = []

    def guarded() -> None:
        nonlocal began
        began = True
        try:
            returned.append(call())
        except BaseException as error:  # noqa: BLE001 -- it is raised below
            raised.append(ended_by(error, LoadError, what))

    try:
        await anyio.to_thread.run_sync(guarded, limiter=limiter)
    except (RuntimeError, MemoryError, OSError) as error:
        if began:
            raise
        if not or_here:
            raise ResourcesError(
                f"{what}: no thread can be started: {error}. Nothing has changed; end other "
                "threads, or raise the limit"
            ) from error
    if not began:
        guarded()
    if raised:
        raise raised.pop()
    return returned.pop()


def in_own_thread(call: Callable[[], _T], name: str, what: str) -> asyncio.Future[_T]:
    """Call foreign code, which may never return, in a thread of its own.

    A caller that cancels the future leaves the thread behind. The thread does not hold up the
    interpreter's exit.

    Args:
        call: The foreign code.
        name: The thread's name.
        what: Names the call in the `LoadError` that replaces a `BaseException` of the call.

    Raises:
        ResourcesError: No thread can be started.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def finish(set_outcome: Callable[[], None]) -> None:
        if not done.done():
            set_outcome()

    def work() -> None:
        try:
            value = call()
            set_outcome = functools.partial(done.set_result, value)
        except BaseException as error:  # noqa: BLE001 -- it is the future's
            set_outcome = functools.partial(done.set_exception, ended_by(error, LoadError, what))
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, set_outcome)

    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except (RuntimeError, MemoryError) as error:
        raise ResourcesError(
            f"{what}: no thread can be started: {error}. Nothing has changed; end other threads, "
            "or raise the limit"
        ) from error
    return done
