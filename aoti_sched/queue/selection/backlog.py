"""Backlog: the device time that queued jobs will take, as far as run times are known."""

from __future__ import annotations

from aoti_sched.queue.job import Job, Priority


class Backlog:
    """The expected core seconds of queued jobs, by priority class; 0 for unknown run times."""

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
        """Return the core seconds of a class and the higher classes."""
        return sum(self._seconds[: priority + 1])

    def within(self, priority: int) -> float:
        """Return the core seconds of a class."""
        return self._seconds[priority]
