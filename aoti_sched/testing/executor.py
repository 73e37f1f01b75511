"""`FakeExecutor`: lanes on which a test finishes each run by hand."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aoti_sched.backends.contracts import Completion, Work
from aoti_sched.backends.executors.wakeup_fd import WakeupFd
from aoti_sched.engine.dispatcher import Clock


class LanesWithoutThreads:
    """The half of an executor that hands runs back to the event loop.

    Args:
        lanes: The number of lanes.
    """

    kind = "fake"

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.closed = False
        self.lost: Callable[[], str] = str
        self.workspace: Callable[[], int] = int
        self._done: deque[Completion] = deque()
        self._wakeup = WakeupFd()

    def grow(self, lanes: int) -> None:
        """Have at least this many lanes."""
        self.lanes = max(self.lanes, lanes)

    def poll(self) -> bool:
        """Return False: no loop waits for the end of a run."""
        return False

    def drain(self) -> list[Completion]:
        """Return the runs that have ended."""
        self._wakeup.clear()
        completions = list(self._done)
        self._done.clear()
        return completions

    def fileno(self) -> int:
        """Return a descriptor that is readable while there are ended runs."""
        return self._wakeup.fd

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            self.closed = True
            self._wakeup.close()

    def _end(self, completion: Completion) -> None:
        self._done.append(completion)
        self._wakeup.set()


class FakeExecutor(LanesWithoutThreads):
    """Lanes that are stepped by hand."""

    def __init__(self, lanes: int, clock: Clock | None, *, auto: bool) -> None:
        super().__init__(lanes)
        self.pending: deque[Work] = deque()
        self._clock = clock
        self.auto = auto
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, lane: int, work: Work) -> bool:
        del lane
        self.pending.append(work)
        if self.auto:
            self.step()
        return False

    def run_here(self, work: Work) -> Completion:
        return self._run(work, None)

    @property
    def running(self) -> int:
        """How many works have not ended."""
        return len(self.pending) + len(self._tasks)

    def step(self, error: BaseException | None = None) -> asyncio.Task[None] | None:
        """Finish the work that was submitted first, with its function's result or with `error`.

        An async function is started. Returns its task; None for other functions.
        """
        work = self.pending.popleft()
        completion = self._run(work, error)
        if not any(map(inspect.isawaitable, _results(completion))):
            self._end(completion)
            return None
        task = asyncio.get_running_loop().create_task(self._wait(completion))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel(self) -> None:
        """Cancel the async functions that have not ended."""
        for task in self._tasks:
            task.cancel()

    async def _wait(self, completion: Completion) -> None:
        """Wait for the results of a work, and end the work."""
        error: BaseException | None = None
        try:
            for outputs in _members(completion):
                outputs[:] = [await _value(one) for one in outputs]
        except BaseException as raised:  # noqa: BLE001 -- it is the request's
            error = raised
        for one in _results(completion):  # what was not waited for after an error
            if inspect.iscoroutine(one):
                one.close()
        results = None if error is not None else completion.outputs
        self._end(Completion(completion.token, results, error, completion.started, self._time()))

    def _run(self, work: Work, error: BaseException | None) -> Completion:
        started = self._time()
        outputs: list[Any] | None = None
        if error is None:
            try:
                run = work.container.run_raw
                outputs = (
                    run(work.inputs)
                    if work.batch is None
                    else [run(inputs) for inputs in work.batch.members]
                )
            except BaseException as raised:  # noqa: BLE001 -- it is the request's
                error = raised
        return Completion(work.token, outputs, error, started, self._time())

    def _time(self) -> float:
        return time.monotonic() if self._clock is None else self._clock.time()


def _members(completion: Completion) -> list[list[Any]]:
    """Return the outputs of each request of a run."""
    outputs = completion.outputs or []
    return outputs if type(completion.token) is tuple else [outputs]


def _results(completion: Completion) -> list[Any]:
    return [one for outputs in _members(completion) for one in outputs]


async def _value(result: Any) -> Any:
    value: Awaitable[Any] | Any = result
    return await value if inspect.isawaitable(value) else value
