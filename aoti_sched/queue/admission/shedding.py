"""Overload: which queued jobs are dropped to protect the rest.

The worst first: lowest class, latest deadline, newest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from aoti_sched.queue.heap import Heap
from aoti_sched.queue.job import Job, JobState

VICTIMS = 32
"""Jobs that make room for one newcomer at most: a newcomer that needs more is refused, so that
no fact takes long.
"""


def shed_rank(job: Job) -> tuple[float, float, int]:
    """The worst has the least."""
    return (-job.priority, -math.inf if job.deadline is None else -job.deadline, -job.id)


class ShedHeap(Heap["tuple[tuple[float, float, int], Job]"]):
    """Queued jobs, the worst first: `alive` of them, and some that have left."""

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
        """One of its jobs is queued no more."""
        self.alive -= 1
        self.tidy(self.alive)

    def pop(self) -> Job | None:
        entry = self.first_alive()
        if entry is None:
            return None
        self.drop()
        return entry[1]

    def put_back(self, job: Job) -> None:
        self.add((shed_rank(job), job))


class Scope:
    """What shares a bound: who of it may be shed, and whether a newcomer lacks room there when
    some are gone.
    """

    __slots__ = ("lacks_room", "worst")

    def __init__(self, worst: ShedHeap, lacks_room: Callable[[Sequence[Job]], bool]) -> None:
        self.worst = worst
        self.lacks_room = lacks_room


def victims(newcomer: Job, scopes: Sequence[Scope]) -> list[Job]:
    """Who must go so that the newcomer fits, the worst first; nobody, when it is the worst
    itself or `VICTIMS` are not enough.
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
