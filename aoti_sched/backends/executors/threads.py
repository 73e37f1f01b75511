"""The pure-Python executor: one Python thread per lane, for runs that release the GIL.

Waking the loop costs a write to one descriptor per burst of completions. A hop to a Python thread
costs 80 to 200 µs where two threads compete for the GIL, and this executor can't avoid it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from aoti_sched.at_exit import close_at_exit
from aoti_sched.backends.contracts import Completion, Work
from aoti_sched.backends.executors.inline import refused, run_here, run_raw, without_frames
from aoti_sched.backends.executors.wakeup_fd import WakeupFd
from aoti_sched.errors import ResourcesError, UnsupportedLoopError

DRAIN_LIMIT = 256
"""The most completions per `drain`, so that a burst does not block the event loop."""


class ThreadsExecutor:
    """Lanes as Python threads.

    Args:
        name: The device's name; lane threads are named `aoti:<name>:<lane>`.
        lanes: The number of lanes.
        set_threads: Sets the calling thread's intra-op thread count. The lane's thread calls this
            when a work needs another count than the previous work.
        affinity: A core for each lane; None leaves the choice to the system.
        wake: Called after each completion. By default the executor has a descriptor of its own.
    """

    kind = "threads"

    def __init__(
        self,
        name: str,
        lanes: int,
        set_threads: Callable[[int], None],
        affinity: Sequence[int] | None = None,
        *,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self.lanes = 0
        self._name = name
        self._process = os.getpid()
        self._wakeup: WakeupFd | None = None
        if wake is None:
            try:
                self._wakeup = WakeupFd()
            except OSError as error:
                raise ResourcesError(
                    f"device {name!r}: no descriptor is left for its lanes: {error}. Nothing has "
                    "changed. Close files, or raise the limit."
                ) from error
            wake = self._wakeup.set
        self._wake = wake
        self._done: deque[Completion] = deque()
        self._running = running = _Running()
        self._inboxes = running.inboxes
        self._closed = False
        self.lost: Callable[[], str] = str  # a device sets its own function
        self.workspace: Callable[[], int] = int  # likewise
        # The threads don't refer to the executor, so an executor that is dropped without `close`
        # ends them too.
        weakref.finalize(self, running.end).atexit = False
        close_at_exit(running)
        self._cores: Sequence[int | None] = affinity or ()
        self._set_threads = set_threads
        self._growing = threading.Lock()
        try:
            self.grow(lanes)
        except BaseException:
            self.close()
            raise

    def grow(self, lanes: int) -> None:
        """As `Executor.grow`."""
        running = self._running
        with self._growing:
            try:
                while len(running.threads) < lanes and not self._closed:
                    self._start()
            except (RuntimeError, MemoryError) as error:
                raise ResourcesError(
                    f"device {self._name!r}: after {len(running.threads)} of {lanes} lanes, no "
                    f"more threads could be started: {error}. No work was lost. End other "
                    "threads, or raise the limit."
                ) from error
            self.lanes = max(self.lanes, len(running.threads))

    def _start(self) -> None:
        """Start the next lane's thread."""
        running, inbox = self._running, queue.SimpleQueue[Work | None]()
        lane = len(running.threads)
        core = self._cores[lane] if self._cores else None
        thread = threading.Thread(
            target=_serve,
            args=(running, inbox, self._done, self._wake, self._set_threads, core),
            name=f"aoti:{self._name}:{lane}",
            daemon=True,
        )
        thread.start()
        running.inboxes.append(inbox)
        running.threads.append(thread)

    def submit(self, lane: int, work: Work) -> bool:
        if os.getpid() != self._process:
            raise self._forked()
        self._inboxes[lane].put(work)
        return False

    def poll(self) -> bool:
        """Return False: a Python thread never completes a work before the loop could sleep."""
        return False

    def run_here(self, work: Work) -> Completion:
        return run_here(work) if os.getpid() == self._process else refused(work, self._forked())

    def drain(self) -> list[Completion]:
        if self._wakeup is not None:
            self._wakeup.clear()
        done = self._done
        completions = [done.popleft() for _ in range(min(len(done), DRAIN_LIMIT))]
        if done:
            self._wake()
        return completions

    def fileno(self) -> int:
        return self._wakeup.fd if self._wakeup is not None else -1

    def close(self) -> None:
        with self._growing:
            if self._closed:
                return
            self._closed = True
        self._running.close()
        if self._wakeup is not None:
            self._wakeup.close()

    def _forked(self) -> UnsupportedLoopError:
        return UnsupportedLoopError(
            f"device {self._name}: the process was forked after the lanes were made; make a new "
            "Scheduler in the child"
        )


class _Running:
    """The threads of an executor.

    Each running thread refers to this object, so the exit handler waits for the thread.
    """

    def __init__(self) -> None:
        self.inboxes: list[queue.SimpleQueue[Work | None]] = []
        self.threads: list[threading.Thread] = []

    def end(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)

    def close(self) -> None:
        self.end()
        for thread in self.threads:
            thread.join()


def _serve(
    _: _Running,
    inbox: queue.SimpleQueue[Work | None],
    done: deque[Completion],
    wake: Callable[[], None],
    set_threads: Callable[[int], None],
    core: int | None,
) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})  # 0 is the calling thread
    threads = 0
    while (work := inbox.get()) is not None:
        outputs: list[object] | None = None
        error: BaseException | None = None
        started = time.monotonic()
        try:
            if work.threads != threads:
                set_threads(work.threads)
                threads = work.threads
            outputs = run_raw(work)
        except BaseException as caught:  # noqa: BLE001 -- it is the request's, and must not end the lane
            error = without_frames(caught)
        completion = Completion(work.token, outputs, error, started, time.monotonic())
        # Free the job's tensors before the loop sees the completion.
        del work, outputs, error
        done.append(completion)
        del completion
        wake()
