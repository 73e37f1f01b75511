"""`FakeExecutor`: lanes on which a test finishes each run by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from aoti_sched.backends.contracts import Completion, Work
from aoti_sched.backends.executors.wakeup_fd import WakeupFd
from aoti_sched.engine.dispatcher import Clock


class FakeExecutor:
    """Lanes that are stepped by hand."""

    kind = "fake"

    def __init__(self, lanes: int, clock: Clock | None, *, auto: bool) -> None:
        self.lanes = lanes
        self.pending: deque[Work] = deque()
        self.closed = False
        self._clock = clock
        self.auto = auto
        self.lost: Callable[[], str] = str
        self._done: deque[Completion] = deque()
        self._wakeup = WakeupFd()

    def submit(self, lane: int, work: Work) -> bool:
        del lane
        self.pending.append(work)
        if self.auto:
            self.step()
        return False

    def poll(self) -> bool:
        """Return False: no loop waits for a step."""
        return False

    def run_here(self, work: Work) -> Completion:
        return self._run(work, None)

    def step(self, error: BaseException | None = None) -> None:
        """Finish the work that was submitted first, with its function's result or with `error`."""
        self._done.append(self._run(self.pending.popleft(), error))
        self._wakeup.set()

    def _run(self, work: Work, error: BaseException | None) -> Completion:
        started = self._time()
        outputs = None
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

    def drain(self) -> list[Completion]:
        self._wakeup.clear()
        completions = list(self._done)
        self._done.clear()
        return completions

    def fileno(self) -> int:
        return self._wakeup.fd

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._wakeup.close()

    def _time(self) -> float:
        return self._clock.time() if self._clock is not None else 0.0
