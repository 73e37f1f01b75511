"""Backlog: the device time that is queued, as far as run times are known."""

from __future__ import annotations

from aoti_sched.queue.job import Job, Priority


class Backlog:
    """Device time that is queued, in core seconds, as far as it is known; by priority class."""

    __slots__ = ("_seconds", "jobs")

    def __init__(self) -> None:
        self.jobs = 0
        self._seconds = [0.0] * len(Priority)

    def add(self, job: Job) -> None:
        self.jobs += 1
        self._seconds[job.priority] += job.expected

    def remove(self, job: Job) -> None:
        self.jobs -= 1
        self._seconds[job.priority] -= job.expected

    def ahead_of(self, priority: int) -> float:
        """Of this class and the higher ones."""
        return sum(self._seconds[: priority + 1])

    def within(self, priority: int) -> float:
        """Of this class."""
        return self._seconds[priority]
