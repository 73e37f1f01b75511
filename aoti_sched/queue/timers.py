"""Timers: when time itself is a fact.

Deadlines of live jobs, and the times at which a key has waited long enough.
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
    """Whether its deadline does not matter any more."""
    return job.state > JobState.RUNNING


class Deadlines(Heap["tuple[float, int, Job]"]):
    """Of live jobs: `alive` of them, and of some that have ended."""

    __slots__ = ("alive",)

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0

    def is_over(self, entry: tuple[float, int, Job]) -> bool:
        return is_over(entry[2])


class Timers:
    """What a device waits for.

    Entries that have come to nothing are dropped when they surface, or outnumber the others.
    """

    __slots__ = ("_serial", "deadlines", "keys")

    def __init__(self) -> None:
        self.deadlines = Deadlines()
        self.keys: list[tuple[float, int, RunnerState, Hashable, Key]] = []
        self._serial = 0

    def watch(self, job: Job, deadline: float) -> None:
        """Until it ends."""
        self.deadlines.alive += 1
        self.deadlines.add((deadline, job.id, job))

    def ended(self, job: Job) -> None:
        """A job that was watched, if it has a deadline, has ended."""
        if job.deadline is not None:
            deadlines = self.deadlines
            deadlines.alive -= 1
            deadlines.tidy(deadlines.alive)

    def due(self, now: float) -> Job | None:
        """The live job with the earliest deadline, if that is not after `now`."""
        first = self.deadlines.first_alive()
        return first[2] if first is not None and first[0] <= now else None

    def watch_key(self, runner: RunnerState, name: Hashable, key: Key) -> None:
        """Until it is ripe. Call again when its time has changed."""
        self._serial += 1
        heapq.heappush(self.keys, (key.ripe_at, self._serial, runner, name, key))

    def ripe(self, now: float) -> tuple[RunnerState, Hashable] | None:
        """A key whose time has come, once."""
        at = self._earliest_key()
        if at is None or at > now:
            return None
        _, _, runner, name, _ = heapq.heappop(self.keys)
        return runner, name

    def next(self) -> float | None:
        """The earliest time of all."""
        first, key = self.deadlines.first_alive(), self._earliest_key()
        if first is None or key is None:
            return key if first is None else first[0]
        return min(first[0], key)

    def _earliest_key(self) -> float | None:
        keys = self.keys
        while keys and (keys[0][4].ripe or not keys[0][4].jobs):
            heapq.heappop(keys)
        return keys[0][0] if keys else None
