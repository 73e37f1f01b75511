"""The pure-Python executor: one Python thread per lane, over runs that release the GIL.

Waking the loop costs a write to one descriptor per burst of completions. A hop to a Python thread costs
80 to 200 µs where two threads fight over the GIL; that is what this executor can't help.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from aoti_sched.backends.at_exit import close_at_exit
from aoti_sched.backends.base import Completion, Work
from aoti_sched.backends.bell import Bell
from aoti_sched.backends.run_here import refused, run_here, run_raw, without_frames
from aoti_sched.errors import UnsupportedLoopError

DRAIN_LIMIT = 256
"""Completions per `drain`, so that a burst does not hold the loop."""


class ThreadsExecutor:
    """Lanes as Python threads.

    Args:
        name: The device's name; lane threads are named `aoti:<name>:<lane>`.
        lanes: How many.
        set_threads: Sets the calling thread's intra-op thread count; called on the lane's thread when a
            work asks for another count than the one before.
        affinity: A core for each lane; None leaves them to the system.
        ring: Tells of completions in the place of a descriptor of its own.
    """

    kind = "threads"

    def __init__(
        self,
        name: str,
        lanes: int,
        set_threads: Callable[[int], None],
        affinity: Sequence[int] | None = None,
        *,
        ring: Callable[[], None] | None = None,
    ) -> None:
        self.lanes = lanes
        self._name = name
        self._process = os.getpid()
        self._set_threads = set_threads
        self._bell: Bell | None = None
        if ring is None:
            self._bell = Bell()
            ring = self._bell.ring
        self._ring = ring
        self._done: deque[Completion] = deque()
        self._inboxes: list[queue.SimpleQueue[Work | None]] = [queue.SimpleQueue() for _ in range(lanes)]
        cores: Sequence[int | None] = affinity or [None] * lanes
        self._threads = [
            threading.Thread(target=self._serve, args=(inbox, core), name=f"aoti:{name}:{lane}", daemon=True)
            for lane, (inbox, core) in enumerate(zip(self._inboxes, cores, strict=True))
        ]
        self._closed = False
        self.lost: Callable[[], str] = str  # a device says more
        for thread in self._threads:
            thread.start()
        close_at_exit(self)

    def submit(self, lane: int, work: Work) -> bool:
        if os.getpid() != self._process:
            raise self._forked()
        self._inboxes[lane].put(work)
        return False

    def poll(self) -> bool:
        """What Python threads do is never back so soon."""
        return False

    def run_here(self, work: Work) -> Completion:
        return run_here(work) if os.getpid() == self._process else refused(work, self._forked())

    def drain(self) -> list[Completion]:
        if self._bell is not None:
            self._bell.hush()
        done = self._done
        completions = [done.popleft() for _ in range(min(len(done), DRAIN_LIMIT))]
        if done:
            self._ring()
        return completions

    def fileno(self) -> int:
        return self._bell.fd if self._bell is not None else -1

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()
        if self._bell is not None:
            self._bell.close()

    def _forked(self) -> UnsupportedLoopError:
        return UnsupportedLoopError(
            f"device {self._name}: the process was forked after the lanes were made; make a new Scheduler in the child"
        )

    def _serve(self, inbox: queue.SimpleQueue[Work | None], core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # 0 is the calling thread
        threads = 0
        while (work := inbox.get()) is not None:
            outputs: list[object] | None = None
            error: BaseException | None = None
            started = time.monotonic()
            try:
                if work.threads != threads:
                    self._set_threads(work.threads)
                    threads = work.threads
                outputs = run_raw(work)
            except BaseException as caught:  # noqa: BLE001 -- it is the request's, and must not end the lane
                error = without_frames(caught)
            completion = Completion(work.token, outputs, error, started, time.monotonic())
            # Let go of the job's tensors before anybody can see it finished.
            del work, outputs, error
            self._done.append(completion)
            del completion
            self._ring()
