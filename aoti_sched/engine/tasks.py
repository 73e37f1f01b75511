"""Housekeeping: the scheduler's own work, which goes on to its end whatever happens to the caller.

A task of its own owns the task group, so that a scheduler may be entered in one task and left in
another. Nothing here refers to the scheduler, so that a closed one is no part of a reference cycle.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from aoti_sched.at_exit import pause_at_exit
from aoti_sched.errors import AotiSchedError, RunnerClosedError, UnsupportedLoopError
from aoti_sched.foreign import ended_by, raise_again

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

_T = TypeVar("_T")


class Housekeeping:
    """The task group of one scheduler.

    Args:
        on_end: Called when the task ends: after `close`, or because the event loop ends.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._errands: asyncio.Queue[Callable[[], Awaitable[object]] | None] = asyncio.Queue()
        self._tasks: TaskGroup | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to take work."""
        pause_at_exit(self)
        ready = asyncio.Event()
        self._task = asyncio.create_task(self._keep(ready), name="aoti_sched housekeeping")
        try:
            await ready.wait()
        except BaseException:
            self._task.cancel()
            raise

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The scheduler's event loop."""
        return self._loop

    @property
    def is_open(self) -> bool:
        """Return whether work is taken."""
        return self._tasks is not None

    def start(self, work: Callable[[], Awaitable[_T]]) -> asyncio.Future[_T]:
        """Run `work` to its end in the task group, whatever happens to the caller.

        Raises:
            RunnerClosedError: No work is taken any more.
            UnsupportedLoopError: Called outside the scheduler's event loop.
        """
        self.must_be_here()
        if self._tasks is None:
            raise RunnerClosedError(
                "the scheduler is not running. Use `async with Scheduler() as scheduler:`"
            )
        outcome: asyncio.Future[Any] = self._loop.create_future()
        outcome.add_done_callback(_look_at)
        self._tasks.start_soon(_carry, work, outcome)
        return outcome

    def start_soon(self, work: Callable[[], Awaitable[object]]) -> None:
        """Start `work` in the next iteration of the loop, for callers in the middle of a step."""
        self._errands.put_nowait(work)

    def must_be_here(self) -> None:
        """Raise UnsupportedLoopError outside the scheduler's event loop."""
        # The public one raises its own error.
        if asyncio._get_running_loop() is not self._loop:  # noqa: SLF001
            raise UnsupportedLoopError(
                "the scheduler belongs to another event loop, or none is running here. Call it on "
                "the loop that entered it"
            )

    def finish(self) -> None:
        """Take no more work. The task ends with the work under way."""
        self._errands.put_nowait(None)

    async def ended(self) -> None:
        """Wait for the end that `finish` brings."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _keep(self, ready: asyncio.Event) -> None:
        try:
            async with anyio.create_task_group() as self._tasks:
                ready.set()
                while (errand := await self._errands.get()) is not None:
                    self.start(errand)
        finally:
            self._tasks = None
            self._on_end()


async def _carry(work: Callable[[], Awaitable[_T]], outcome: asyncio.Future[_T]) -> None:
    with anyio.CancelScope(shield=True):
        try:
            outcome.set_result(await work())
        # It is raised where the outcome is awaited; siblings go on.
        except BaseException as error:  # noqa: BLE001
            outcome.set_exception(ended_by(error, AotiSchedError, "the operation"))
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                outcome.get_loop().call_soon(
                    raise_again, error
                )  # out of the loop, as from any callback
        finally:
            del outcome  # it holds the error, whose traceback holds this frame


def _look_at(outcome: asyncio.Future[Any]) -> None:
    """Mark an outcome's error as retrieved: its caller may have been cancelled."""
    if not outcome.cancelled():
        outcome.exception()
