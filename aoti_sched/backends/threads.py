"""The pure-Python executor: one Python thread per lane, over runs that release the GIL.

Waking the loop costs a write to one descriptor per burst of completions. A hop to a Python thread costs
80 to 200 µs where two threads fight over the GIL; that is what this executor can't help.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from aoti_sched.backends.at_exit import close_at_exit
from aoti_sched.backends.base import Completion, Work
from aoti_sched.backends.bell import Bell

DRAIN_LIMIT = 256
"""Completions per `drain`, so that a burst does not hold the loop."""


class ThreadsExecutor:
    """Lanes as Python threads.

    Args:
        name: The device's name; lane threads are named `aoti:<name>:<lane>`.
        lanes: How many.
        set_threads: Sets the calling thread's intra-op thread count; called on the lane's thread when a
            work asks for another count than the one before.
        ring: Tells of completions in the place of a descriptor of its own.
    """

    kind = "threads"

    def __init__(
        self,
        name: str,
        lanes: int,
        set_threads: Callable[[int], None],
        *,
        ring: Callable[[], None] | None = None,
    ) -> None:
        self.lanes = lanes
        self._set_threads = set_threads
        self._bell: Bell | None = None
        if ring is None:
            self._bell = Bell()
            ring = self._bell.ring
        self._ring = ring
        self._done: deque[Completion] = deque()
        self._inboxes: list[queue.SimpleQueue[Work | None]] = [queue.SimpleQueue() for _ in range(lanes)]
        self._threads = [
            threading.Thread(target=self._serve, args=(inbox,), name=f"aoti:{name}:{lane}", daemon=True)
            for lane, inbox in enumerate(self._inboxes)
        ]
        self._closed = False
        for thread in self._threads:
            thread.start()
        close_at_exit(self)

    def submit(self, lane: int, work: Work) -> None:
        self._inboxes[lane].put(work)

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

    def _serve(self, inbox: queue.SimpleQueue[Work | None]) -> None:
        threads = 0
        while (work := inbox.get()) is not None:
            outputs: list[object] | None = None
            error: BaseException | None = None
            started = time.monotonic()
            try:
                if work.threads != threads:
                    self._set_threads(work.threads)
                    threads = work.threads
                outputs = work.container.run_raw(work.inputs)
            except BaseException as caught:  # noqa: BLE001 -- it is the request's, and must not end the lane
                error = caught
            completion = Completion(work.token, outputs, error, started, time.monotonic())
            # Let go of the job's tensors before anybody can see it finished.
            del work, outputs, error
            self._done.append(completion)
            del completion
            self._ring()
