"""Urgency: which jobs of higher classes a long run could make late.

Kept are the latest time at which each queued job must start, to end before its deadline, and when a
job of each class came last.
"""

from __future__ import annotations

import math
from typing import Final

from aoti_sched.queue.heap import Heap
from aoti_sched.queue.job import Job, JobState, Priority

RECENT: Final = 10.0
"""Seconds after which a class whose jobs have stopped coming is not reckoned with."""


class _Starts(Heap["tuple[float, int, Job]"]):
    """The latest starts of queued jobs of one class, and of some that were queued."""

    __slots__ = ("alive",)

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0

    def is_over(self, entry: tuple[float, int, Job]) -> bool:
        return entry[2].state is not JobState.QUEUED


class Urgency:
    """The jobs of one device that may be in a hurry.

    Attributes:
        kept: Whether jobs are noted and added. The first runner that makes batches sets this; until
            then this costs nothing.
    """

    __slots__ = ("_came", "_classes", "kept")

    def __init__(self) -> None:
        self.kept = False
        self._came = [-math.inf] * len(Priority)
        self._classes = [_Starts() for _ in Priority]

    def add(self, job: Job, deadline: float) -> None:
        """Add a job that is queued, and has a deadline."""
        times = job.source.runner.placing.times
        takes = times.bound(job.bytes) if times.knows(job.bytes) else 0.0
        starts = self._classes[job.priority]
        starts.alive += 1
        starts.add((deadline - takes, job.id, job))

    def remove(self, job: Job) -> None:
        """Remove a job that has left the queue, and had a deadline."""
        starts = self._classes[job.priority]
        starts.alive -= 1
        starts.tidy(starts.alive)

    def note(self, job: Job, now: float) -> None:
        """Note that a job has come."""
        self._came[job.priority] = now

    def has_higher(self, priority: int, now: float) -> bool:
        """Return whether jobs of a higher class have come of late."""
        return any(now - came < RECENT for came in self._came[:priority])

    def latest_start(self, priority: int) -> float:
        """Return the earliest latest start of a job of a higher class; infinite without one."""
        latest = math.inf
        for starts in self._classes[:priority]:
            first = starts.first_alive()
            if first is not None and first[0] < latest:
                latest = first[0]
        return latest
