"""Shedding: which queued jobs are dropped for a better one when the queue is full.

The worst job is dropped first: of the lowest class, with the latest deadline, the newest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from aoti_sched.queue.heap import Heap
from aoti_sched.queue.job import Job, JobState

VICTIMS: Final = 32
"""The most jobs that are shed for one new job.

A new job that needs more is rejected, so that no fact takes long.
"""


def shed_rank(job: Job) -> tuple[float, float, int]:
    """Return a job's rank among those that may be shed; the worst job has the least rank."""
    return (-job.priority, -math.inf if job.deadline is None else -job.deadline, -job.id)


class ShedHeap(Heap["tuple[tuple[float, float, int], Job]"]):
    """Queued jobs that may be shed, the worst first.

    Attributes:
        alive: How many entries are of queued jobs; the others are of jobs that have left.
    """

    __slots__ = ("alive",)

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0

    def is_over(self, entry: tuple[tuple[float, float, int], Job]) -> bool:
        return entry[1].state is not JobState.QUEUED

    def push(self, job: Job) -> None:
        self.add((shed_rank(job), job))
        self.alive += 1

    def left(self) -> None:
        """Note that a job of the heap has left the queue."""
        self.alive -= 1
        self.tidy(self.alive)

    def pop(self) -> Job | None:
        entry = self.first_alive()
        if entry is None:
            return None
        self.drop()
        return entry[1]

    def put_back(self, job: Job) -> None:
        """Add a popped job again, which is still queued."""
        self.add((shed_rank(job), job))


class Scope:
    """The jobs that share a bound.

    Args:
        worst: Those that may be shed.
        lacks_room: Whether a new job lacks room even if these jobs had left.
    """

    __slots__ = ("lacks_room", "worst")

    def __init__(self, worst: ShedHeap, lacks_room: Callable[[Sequence[Job]], bool]) -> None:
        self.worst = worst
        self.lacks_room = lacks_room


def victims(newcomer: Job, scopes: Sequence[Scope]) -> list[Job]:
    """Choose the queued jobs to be shed so that a new job fits in all scopes, the worst first.

    Returns:
        The jobs; empty when the new job is worse than they are, or `VICTIMS` are not enough.
    """
    chosen: list[Job] = []
    taken: list[tuple[ShedHeap, Job]] = []
    enough = True
    for scope in scopes:
        while enough and scope.lacks_room(chosen):
            job = scope.worst.pop()
            if job is not None:
                taken.append((scope.worst, job))
            if job is None or len(chosen) == VICTIMS or shed_rank(newcomer) < shed_rank(job):
                enough = False
            elif job not in chosen:
                chosen.append(job)
    for worst, job in taken:  # they are still queued
        worst.put_back(job)
    return chosen if enough else []
