"""LoopThread: an event loop in a thread of its own, for programs that have none.

Calls block the calling thread until the loop has answered. A thread that is interrupted (Ctrl-C)
cancels its call. Every call ends: the thread ends after the calls that it has accepted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from aoti_sched.engine.blocking import forked
from aoti_sched.engine.callers import THREAD
from aoti_sched.errors import (
    AotiSchedError,
    ResourcesError,
    RunnerClosedError,
    UnsupportedLoopError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_T = TypeVar("_T")


class LoopThread:
    """The thread. It is a daemon: the interpreter's exit does not wait for it.

    Args:
        what: What the loop belongs to, for errors and as the thread's name.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()  # of `_open` and of the order of what is posted
        self._open = False
        self._process = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_open(self) -> bool:
        """Return whether calls are taken, in this process."""
        return self._open and os.getpid() == self._process

    def start(self) -> None:
        """Start the thread, and return when its loop runs.

        Raises:
            UnsupportedLoopError: It was started before.
            ResourcesError: No thread can be started.
        """
        with self._lock:
            if self._thread is not None:
                raise UnsupportedLoopError(f"a {self._what} is started once; make a new one")
            running: concurrent.futures.Future[None] = concurrent.futures.Future()
            self._process = os.getpid()
            self._thread = threading.Thread(
                target=self._serve, args=(running,), name=f"aoti_sched {self._what}", daemon=True
            )
            try:
                self._thread.start()
            except (RuntimeError, MemoryError) as error:
                raise ResourcesError(
                    f"{self._what}: no thread can be started: {error}. Nothing has changed; end "
                    "other threads, or raise the limit"
                ) from error
        running.result()

    def call(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run a coroutine on the loop and return its result.

        An interrupted wait cancels the coroutine.

        Raises:
            RunnerClosedError: The thread was never started, or has ended.
            UnsupportedLoopError: Called on the loop's own thread, or in a forked child.
        """
        if threading.current_thread() is self._thread:
            raise UnsupportedLoopError(
                f"{self._what}: this call was made on the thread of its event loop and would wait "
                "for itself. Do not block in callbacks of futures; call from another thread"
            )
        outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
        task: list[asyncio.Task[None]] = []
        self.post(functools.partial(self._answer, task, work, outcome))
        try:
            return outcome.result()
        except BaseException:
            if not outcome.done():  # the waiting thread was interrupted
                with suppress(AotiSchedError):  # the thread has ended, and the coroutine with it
                    self.post(functools.partial(_cancel, task))
            raise
        finally:
            del outcome  # it may hold the error, whose traceback holds this frame

    def ask(self, question: Callable[[], _T]) -> _T:
        """Return a function's answer, given on the loop between two facts.

        After the thread's end, and on the loop's thread, the function is called here.

        Raises:
            UnsupportedLoopError: Called in a forked child.
        """

        async def answer() -> _T:
            return question()

        self._must_not_be_forked()
        if threading.current_thread() is not self._thread:
            try:
                return self.call(answer)
            except RunnerClosedError:
                if self._open:
                    raise
        return question()

    def post(self, callback: Callable[[], object]) -> None:
        """Call a function on the loop, and do not wait for it.

        Raises:
            RunnerClosedError: The thread was never started, or has ended.
            UnsupportedLoopError: Called in a forked child.
        """
        self._must_not_be_forked()
        with self._lock:
            loop = self._loop
            if not self._open or loop is None:
                why = "is closed" if self._thread else "is not running. Call start(), or use `with`"
                raise RunnerClosedError(f"the {self._what} {why}")
            token = THREAD.set(threading.current_thread())
            try:
                loop.call_soon_threadsafe(callback)  # in a copy of this context
            finally:
                THREAD.reset(token)

    def start_soon(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run a coroutine on the loop, and do not wait for it. Raises as `post`."""
        self.post(lambda: self._begin(work()))

    def stop(self) -> None:
        """End the thread when its calls have ended, and wait for that. Stopping twice is fine."""
        self.end_soon()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def end_soon(self) -> None:
        """Let the thread end when its calls have ended, and take no more."""
        with self._lock:
            if self._open and self._loop is not None and self._end is not None:
                self._loop.call_soon_threadsafe(self._end.set)
            self._open = False

    def _must_not_be_forked(self) -> None:
        if self._process not in (0, os.getpid()):
            raise forked(f"the {self._what}")

    # --- on the thread ---------------------------------------------------------------------------

    def _serve(self, running: concurrent.futures.Future[None]) -> None:
        try:
            asyncio.run(self._live(running))
        except BaseException as error:
            if running.done():
                raise
            running.set_exception(error)  # no loop could be made
        finally:
            with self._lock:
                self._open = False

    def _answer(
        self,
        task: list[asyncio.Task[None]],
        work: Callable[[], Coroutine[Any, Any, _T]],
        outcome: concurrent.futures.Future[_T],
    ) -> None:
        task.append(self._begin(_carry(work, outcome)))

    def _begin(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _live(self, running: concurrent.futures.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._open = True
        running.set_result(None)
        await self._end.wait()
        while self._tasks:
            await asyncio.wait(set(self._tasks))


def _cancel(task: list[asyncio.Task[None]]) -> None:
    task[0].cancel()


async def _carry(
    work: Callable[[], Coroutine[Any, Any, _T]], outcome: concurrent.futures.Future[_T]
) -> None:
    """Run a coroutine and hand its outcome over. A cancelled one has no caller any more."""
    try:
        result = await work()
    except BaseException as error:
        outcome.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        outcome.set_result(result)
    finally:
        del outcome  # it holds the error, whose traceback holds this frame
