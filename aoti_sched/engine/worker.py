"""Worker threads: blocking calls of the engine.

Whatever a call raises is an `Exception` on the loop, and ends its own operation alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

import anyio
import anyio.to_thread

from aoti_sched.backends.reading import Abandoned, Reading
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


class SourceThread(Generic[_T]):
    """A call that reads a user's source, in a thread of its own.

    The thread is left behind where foreign code does not return, and then does not hold up the
    interpreter's exit.

    Args:
        call: Reads the source by the `Reading` that it is given.
        name: The thread's name.
        what: Names the call in the `ResourcesError`.
        ended: Makes the error of the call from what was raised; from `Abandoned` when the thread
            was left behind.

    Raises:
        ResourcesError: No thread can be started.
    """

    def __init__(
        self,
        call: Callable[[Reading], _T],
        name: str,
        what: str,
        ended: Callable[[BaseException], Exception],
    ) -> None:
        self._call = call
        self._ended = ended
        self._reading = Reading()
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        # What is raised is no future's: its traceback would hold the future.
        self._raised: list[Exception] = []
        self._returned: list[_T] = []
        try:
            threading.Thread(target=self._work, name=name, daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            raise ResourcesError(
                f"{what}: no thread can be started: {error}. Nothing has changed; end other "
                "threads, or raise the limit"
            ) from error

    async def result(self) -> _T:
        """Wait for the call and return its result.

        A cancelled caller leaves the thread behind, or waits for its end while the thread runs code
        of this package.
        """
        try:
            await asyncio.wait({self._done})
        except asyncio.CancelledError:
            if not self._reading.abandon():  # code of this package runs, which ends soon
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({self._done})
            raise
        if self._raised:
            raise self._raised.pop(0)
        return self._returned.pop()

    def leave(self) -> None:
        """End the call now where foreign code runs; otherwise at its next step into such code."""
        if self._reading.abandon() and not self._done.done():
            self._raised.append(self._ended(Abandoned()))
            self._done.set_result(None)

    def _work(self) -> None:
        try:
            self._returned.append(self._call(self._reading))
        except BaseException as error:  # noqa: BLE001 -- it is raised by `result`
            if isinstance(error, Abandoned) and self._reading.abandon():
                return  # the owner has left
            self._raised.append(self._ended(error))
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)
