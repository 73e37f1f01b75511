"""Calls of other threads that wait for the event loop: `run_blocking` and `BlockingFuture`.

A waiting thread ends whatever happens to the loop, and no thread polls. These events wake it:

- its request ends, on the loop;
- its deadline passes, in the thread itself;
- the loop leaves `run_forever` (it was stopped, `asyncio.run` returned, an error ended it);
- the scheduler is closed.

asyncio has no callback for the end of `run_forever`. Both asyncio and uvloop set the thread's
asynchronous generator hooks to methods of the loop when `run_forever` begins. They restore the
previous hooks when it ends, after `loop.is_running()` has become False. The thread holds the only
reference to the bound method, so a weak reference to that method dies then, and its callback is the
hook.

The end of a loop of another kind, without such hooks, is noticed when the loop is closed, and when
a new call finds that the loop does not run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from aoti_sched.errors import DeadlineExceededError, RunnerClosedError, UnsupportedLoopError
from aoti_sched.signature import R

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from aoti_sched.engine.future import RunFuture
    from aoti_sched.events import Trace

    Ask = Callable[[Callable[[], Trace]], Trace]

CLOSED_LOOP = "its event loop is closed. Call it while the loop runs"
IDLE_LOOP = "its event loop is not running. Call it while the loop runs"
STOPPED_LOOP = (
    "its event loop stopped before the request ended. Keep the loop running while threads call it"
)
CLOSED_SCHEDULER = "the scheduler is closed. Load the model into a new one"
FAR = 1e8
"""Seconds; a timer this far away is never due."""


class BlockingCalls:
    """The calls of other threads into one scheduler.

    Args:
        loop: The scheduler's event loop. The constructor is called on its thread, while it runs.
        real_time: Whether timeouts are seconds of `time.monotonic`, which a waiting thread can
            measure itself.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, real_time: bool) -> None:
        self.loop = loop
        self._real_time = real_time
        self._process = os.getpid()
        self._waiting: set[_Call] = set()
        self._ended = ""
        self._hook: weakref.ref[Any] | None = None
        self._last_hope: asyncio.TimerHandle | None = None
        self._listen()

    def run(
        self,
        name: str,
        submit: Callable[[float | None], RunFuture],
        inherit_stream: Callable[[], AbstractContextManager[object]],
        timeout: float | None,
    ) -> Any:
        """Hand a request over to the loop and wait for its end.

        Raises as `Handle.run_blocking` does.

        Args:
            name: The runner's.
            submit: Submits the request on the loop, with the seconds that are left of its timeout.
            inherit_stream: Returns a context that makes the calling thread's stream current on the
                loop's thread.
            timeout: Seconds for all of it.
        """
        self._must_not_be_forked(name)
        call = _Wait(name, submit, inherit_stream(), timeout if self._real_time else None)
        try:
            self._hand_over(call)
            return call.wait()
        finally:
            self._waiting.discard(call)
            if call.give_up():
                self.take_back(call)

    def submit(
        self,
        name: str,
        submit: Callable[[float | None], RunFuture],
        inherit_stream: Callable[[], AbstractContextManager[object]],
        timeout: float | None,
        ask: Ask,
    ) -> BlockingFuture:
        """Hand a request over to the loop and return its future.

        Args:
            name: As for `run`, and so the next three.
            submit: Submits the request on the loop.
            inherit_stream: Makes the calling thread's stream current there.
            timeout: Seconds for all of it.
            ask: Returns a function's answer, given on the loop between two facts.

        Raises:
            RunnerClosedError: The event loop is closed, or does not run, or the scheduler is
                closed.
            UnsupportedLoopError: Called in a forked child.
        """
        self._must_not_be_forked(name)
        timeout = timeout if self._real_time else None
        call = _Promise(self, name, submit, inherit_stream(), timeout)
        future = call.future = BlockingFuture(ask)
        future._call = call  # noqa: SLF001
        try:
            self._hand_over(call)
        except BaseException:
            self._waiting.discard(call)
            raise
        return future

    def take_back(self, call: _Call) -> None:
        """Cancel the request of a thread that has left."""
        self._waiting.discard(call)
        with contextlib.suppress(RuntimeError):  # a loop that is closed runs nothing
            self.loop.call_soon_threadsafe(call.cancel)

    def forget(self, call: _Call) -> None:
        """Note that a call has ended."""
        self._waiting.discard(call)

    def _must_not_be_forked(self, name: str) -> None:
        if os.getpid() != self._process:
            raise forked(f"runner {name!r}")

    def _hand_over(self, call: _Call) -> None:
        # Before the loop's state is read: the callbacks of a loop that ends read the calls
        # afterwards.
        self._waiting.add(call)
        if self._ended:
            raise RunnerClosedError(f"runner {call.name!r}: {self._ended}")
        if not self.loop.is_running():
            why = CLOSED_LOOP if self.loop.is_closed() else IDLE_LOOP
            raise RunnerClosedError(f"runner {call.name!r}: {why}")
        try:
            self.loop.call_soon_threadsafe(call.submit)
        except RuntimeError:  # closed since
            raise RunnerClosedError(f"runner {call.name!r}: {CLOSED_LOOP}") from None

    def end(self) -> None:
        """End the calls that wait, and refuse later calls. Called on the loop's thread."""
        self._ended = CLOSED_SCHEDULER
        self._hook = None
        if self._last_hope is not None:
            self._last_hope.cancel()
            self._last_hope = None
        for call in list(self._waiting):
            call.fail(RunnerClosedError(f"runner {call.name!r}: {self._ended}"))

    def _listen(self) -> None:
        """Listen for the end of the loop. Called on the loop's thread, while the loop runs."""
        if self._ended:
            return
        hook = sys.get_asyncgen_hooks().finalizer
        if getattr(hook, "__self__", None) is self.loop:
            me = weakref.ref(self)
            self._hook = weakref.ref(hook, lambda _: _when_stopped(me))
        elif self._last_hope is None:
            # A closed loop drops its timers, and they drop what they hold.
            self._last_hope = self.loop.call_later(FAR, _Sentinel(self))

    def stopped(self) -> None:
        """End the calls that wait for a loop that has stopped. The loop may run again."""
        self._hook = None
        if self._ended:
            return
        if not self.loop.is_running():
            for call in list(self._waiting):
                if call.fail(RunnerClosedError(f"runner {call.name!r}: {STOPPED_LOOP}")):
                    self._when_it_goes_on(call.cancel)
        self._when_it_goes_on(self._listen)

    def _when_it_goes_on(self, callback: Callable[[], None]) -> None:
        """Schedule a callback for the case that the loop runs again."""
        with contextlib.suppress(RuntimeError):  # a loop that is closed
            self.loop.call_soon_threadsafe(callback)


def _when_stopped(
    calls: weakref.ref[BlockingCalls], is_finalizing: Callable[[], bool] = sys.is_finalizing
) -> None:
    # Waking the loop would release the GIL, and a thread that takes it now ends the process.
    if is_finalizing():
        return
    there = calls()
    if there is not None:
        there.stopped()


class _Sentinel:
    """An object that is deleted with the timers of a closed loop."""

    def __init__(self, calls: BlockingCalls) -> None:
        self._calls = weakref.ref(calls)

    def __call__(self) -> None:
        """Do nothing: the timer is never due."""

    def __del__(self) -> None:
        _when_stopped(self._calls)


class BlockingFuture(concurrent.futures.Future[R]):
    """The result of a request of another thread, a `concurrent.futures.Future`.

    `concurrent.futures.wait` and `as_completed` take it. Its callbacks run on the event loop's
    thread, so they must be quick and may wait for nothing of the scheduler.
    """

    _call: _Promise
    _run: RunFuture | None = None

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self._ask = ask

    @property
    def trace(self) -> Trace | None:
        """Where and when the request ran, as far as it is known now.

        None until the event loop has taken the request, and for a request that was refused. Until
        the request has ended, and where a recording or an observer is on, the event loop is asked.
        """
        run = self._run
        if run is None:
            return None
        if run.done() and not run._is_observed:  # noqa: SLF001
            return run._trace_of_job()  # noqa: SLF001
        return self._ask(lambda: run.trace)

    def cancel(self) -> bool:
        """Cancel the request, queued or running. Returns False if the request is done already.

        A queued request frees its place. A running request finishes on its lane, and its result is
        dropped.
        """
        if not super().cancel():
            return False
        if self._call.give_up():
            self.set_running_or_notify_cancel()  # `wait` and `as_completed` count it from now on
            self._call.take_back()
        return True


def forked(what: str) -> UnsupportedLoopError:
    """Return the error of a call in a forked child."""
    return UnsupportedLoopError(
        f"{what}: the process was forked after the scheduler was made. "
        "Make a new Scheduler in the child"
    )


class _Call(ABC):
    """One request of another thread. The code that takes the only element of `_open` ends it."""

    __slots__ = ("_deadline", "_future", "_open", "_stream", "_submit", "_timeout", "name")

    def __init__(
        self,
        name: str,
        submit: Callable[[float | None], RunFuture],
        stream: AbstractContextManager[object],
        timeout: float | None,
    ) -> None:
        self.name = name
        self._submit: Callable[[float | None], RunFuture] | None = submit
        self._stream = stream
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._open = [True]  # a list's pop is atomic
        self._future: RunFuture | None = None

    def give_up(self) -> bool:
        """Take the right to end this call. Return False if the call has ended."""
        try:
            self._open.pop()
        except IndexError:
            return False
        return True

    def fail(self, error: BaseException) -> bool:
        """End the call with an error. Return False if the call has ended."""
        if not self.give_up():
            return False
        self._settle(None, error)
        return True

    @abstractmethod
    def _settle(self, result: Any, error: BaseException | None) -> None:
        """Hand the outcome to the thread."""

    def _expired(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"runner {self.name!r}: the request's timeout of {self._timeout:.3g} s passed "
            "while its thread waited for the event loop"
        )

    # --- on the loop's thread --------------------------------------------------------------------

    def submit(self) -> None:
        """Submit the request, unless its thread has left."""
        submit, self._submit = self._submit, None
        if not self._open or submit is None:
            return
        left = None
        try:
            if self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self.fail(self._expired())
                    return
            with self._stream:
                future = submit(left)
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise
            return
        self._future = future
        self._submitted(future)
        future.add_done_callback(self._end)

    def _submitted(self, future: RunFuture) -> None:  # noqa: B027 -- a hook
        """Note that the loop has taken the request."""

    def cancel(self) -> None:
        """Cancel the request of a thread that has left."""
        if self._future is not None:
            self._future.cancel()

    def _end(self, future: asyncio.Future[Any]) -> None:
        self._future = None
        if future.cancelled():
            self.fail(RunnerClosedError(f"runner {self.name!r}: the request was cancelled"))
            return
        error = future.exception()
        if error is not None:
            self.fail(error)
        elif self.give_up():
            self._settle(future.result(), None)


class _Wait(_Call):
    """A call whose thread waits for its end."""

    __slots__ = ("_done", "_error", "_result")

    def __init__(
        self,
        name: str,
        submit: Callable[[float | None], RunFuture],
        stream: AbstractContextManager[object],
        timeout: float | None,
    ) -> None:
        super().__init__(name, submit, stream, timeout)
        self._done = threading.Lock()
        self._done.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def wait(self) -> Any:
        """Return the result, or raise the error. The deadline has an error of its own."""
        seconds = -1.0
        if self._deadline is not None:
            seconds = max(0.0, min(self._deadline - time.monotonic(), threading.TIMEOUT_MAX))
        if not self._done.acquire(timeout=seconds):
            if self.give_up():  # on the loop, the job expires at the same time
                raise self._expired()
            self._done.acquire()  # the request ended meanwhile
        error, self._error = self._error, None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    def _settle(self, result: Any, error: BaseException | None) -> None:
        self._result, self._error = result, error
        self._done.release()


class _Promise(_Call):
    """A call whose outcome is a `BlockingFuture`'s."""

    __slots__ = ("_calls", "future")

    def __init__(
        self,
        calls: BlockingCalls,
        name: str,
        submit: Callable[[float | None], RunFuture],
        stream: AbstractContextManager[object],
        timeout: float | None,
    ) -> None:
        super().__init__(name, submit, stream, timeout)
        self._calls = calls
        self.future: BlockingFuture | None = None

    def take_back(self) -> None:
        """Cancel the request."""
        self.future = None  # they refer to each other
        self._calls.take_back(self)

    def _submitted(self, future: RunFuture) -> None:
        promised = self.future
        if promised is not None:
            promised._run = future  # noqa: SLF001

    def _settle(self, result: Any, error: BaseException | None) -> None:
        self._calls.forget(self)
        future, self.future = self.future, None
        # False: it was cancelled in this moment.
        if future is None or not future.set_running_or_notify_cancel():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
