"""Timers: when time itself is a fact. Deadlines of live jobs, and the times at which a key has waited long enough."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import TYPE_CHECKING

from aoti_sched.queue.job import Job, JobState

if TYPE_CHECKING:
    from aoti_sched.queue.batch import Key
    from aoti_sched.queue.lease import RunnerState


def is_over(job: Job) -> bool:
    """Whether its deadline does not matter any more."""
    return job.state > JobState.RUNNING


class Timers:
    """What a device waits for. Entries that have come to nothing are dropped when they surface."""

    __slots__ = ("_serial", "dead", "deadlines", "keys")

    def __init__(self) -> None:
        self.deadlines: list[tuple[float, int, Job]] = []
        self.dead = 0  # entries of `deadlines` whose jobs have ended
        self.keys: list[tuple[float, int, RunnerState, Hashable, Key]] = []
        self._serial = 0

    def watch(self, job: Job, deadline: float) -> None:
        """Until it ends."""
        heapq.heappush(self.deadlines, (deadline, job.id, job))

    def ended(self, job: Job) -> None:
        """Its entry stays until it surfaces, or until those of ended jobs outnumber the others."""
        if job.deadline is None:
            return
        self.dead += 1
        if self.dead > len(self.deadlines) // 2 + 16:
            self.deadlines = [entry for entry in self.deadlines if not is_over(entry[2])]
            heapq.heapify(self.deadlines)
            self.dead = 0

    def due(self, now: float) -> Job | None:
        """The live job with the earliest deadline, if that is not after `now`."""
        at = self._earliest_deadline()
        return self.deadlines[0][2] if at is not None and at <= now else None

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
        deadline, key = self._earliest_deadline(), self._earliest_key()
        if deadline is None or key is None:
            return key if deadline is None else deadline
        return min(deadline, key)

    def _earliest_deadline(self) -> float | None:
        deadlines = self.deadlines
        while deadlines and is_over(deadlines[0][2]):
            heapq.heappop(deadlines)
            self.dead -= 1
        return deadlines[0][0] if deadlines else None

    def _earliest_key(self) -> float | None:
        keys = self.keys
        while keys and (keys[0][4].ripe or not keys[0][4].jobs):
            heapq.heappop(keys)
        return keys[0][0] if keys else None
