"""Timers: the times at which the passing of time is a fact.

These are the deadlines of live jobs, and the times at which a batch key's delay has elapsed.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import TYPE_CHECKING

from aoti_sched.queue.heap import Heap
from aoti_sched.queue.job import Job, JobState

if TYPE_CHECKING:
    from aoti_sched.queue.batching import Key
    from aoti_sched.queue.runner_state import RunnerState


def is_over(job: Job) -> bool:
    """Return whether a job has ended, so that its deadline does not matter any more."""
    return job.state > JobState.RUNNING


class Deadlines(Heap["tuple[float, int, Job]"]):
    """The deadlines of live jobs, and of some that have ended.

    Attributes:
        alive: How many entries are of live jobs.
    """

    __slots__ = ("alive",)

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0

    def is_over(self, entry: tuple[float, int, Job]) -> bool:
        return is_over(entry[2])


class Timers:
    """The deadlines and keys of one device.

    Obsolete deadlines are dropped when they surface, or outnumber the others; obsolete keys are
    dropped when they surface.
    """

    __slots__ = ("_serial", "deadlines", "keys")

    def __init__(self) -> None:
        self.deadlines = Deadlines()
        self.keys: list[tuple[float, int, RunnerState, Hashable, Key]] = []
        self._serial = 0

    def watch(self, job: Job, deadline: float) -> None:
        """Watch the deadline of a job until the job ends."""
        self.deadlines.alive += 1
        self.deadlines.add((deadline, job.id, job))

    def ended(self, job: Job) -> None:
        """Note that a job has ended. A job without a deadline was not watched."""
        if job.deadline is not None:
            deadlines = self.deadlines
            deadlines.alive -= 1
            deadlines.tidy(deadlines.alive)

    def due(self, now: float) -> Job | None:
        """Return the live job with the earliest deadline, if that is not after `now`."""
        first = self.deadlines.first_alive()
        return first[2] if first is not None and first[0] <= now else None

    def watch_key(self, runner: RunnerState, name: Hashable, key: Key) -> None:
        """Watch a key until it is ripe. Call again when `ripe_at` has changed."""
        self._serial += 1
        heapq.heappush(self.keys, (key.ripe_at, self._serial, runner, name, key))

    def ripe(self, now: float) -> tuple[RunnerState, Hashable] | None:
        """Return a key whose delay has elapsed, and watch it no more; None when there is none."""
        at = self._earliest_key()
        if at is None or at > now:
            return None
        _, _, runner, name, _ = heapq.heappop(self.keys)
        return runner, name

    def next(self) -> float | None:
        """Return the earliest time of all; None when there is none."""
        first, key = self.deadlines.first_alive(), self._earliest_key()
        if first is None or key is None:
            return key if first is None else first[0]
        return min(first[0], key)

    def _earliest_key(self) -> float | None:
        keys = self.keys
        while keys and (keys[0][4].ripe or not keys[0][4].jobs):
            heapq.heappop(keys)
        return keys[0][0] if keys else None
