"""Sorted jobs: jobs ordered by a number, where most jobs come in the order in which they go."""

from __future__ import annotations

from collections.abc import Iterator

from aoti_sched.queue.heap import Heap
from aoti_sched.queue.job import Job


class Place:
    """A job's place among sorted jobs.

    Attributes:
        number: What orders the job.
        job: The job.
        before: The place before this one in the list of jobs that came in order; None for the
            first, and outside the list.
        after: The place after this one.
        early: Whether the job came out of order, and is in the heap.
    """

    __slots__ = ("after", "before", "early", "job", "number")

    def __init__(self, number: float, job: Job) -> None:
        self.number = number
        self.job = job
        self.before: Place | None = None
        self.after: Place | None = None
        self.early = False


class SortedJobs(Heap["tuple[float, int, Place]"]):
    """Jobs ordered by a number, and by their ids where the numbers are equal.

    Most jobs come in the order in which they go. These are in a linked list, so that a job comes
    and leaves in O(1) wherever it stands. A job that must go before the last of these is in the
    heap.

    Attributes:
        first: The job with the least number; None when there is no job.
    """

    __slots__ = ("_early", "_head", "_tail", "first")

    def __init__(self) -> None:
        super().__init__()
        self.first: Job | None = None
        self._head: Place | None = None
        self._tail: Place | None = None
        self._early: dict[int, Place] = {}  # by the job's id: those in the heap that have not left

    def is_over(self, entry: tuple[float, int, Place]) -> bool:
        return entry[1] not in self._early

    def push(self, number: float, job: Job) -> Place:
        """Add a job, and return its place, which takes it out again."""
        place, tail = Place(number, job), self._tail
        if tail is None:
            self._head = self._tail = place
        elif number > tail.number or (number == tail.number and job.id > tail.job.id):
            place.before = tail
            tail.after = place
            self._tail = place
            return place  # it does not go first
        else:
            place.early = True
            self._early[job.id] = place
            self.add((number, job.id, place))
        self.first = self._least()
        return place

    def remove(self, place: Place) -> None:
        """Take a job out."""
        if place.early:
            del self._early[place.job.id]
            self.tidy(len(self._early))
        else:
            before, after = place.before, place.after
            if before is None:
                self._head = after
            else:
                before.after = after
            if after is None:
                self._tail = before
            else:
                after.before = before
            place.before = place.after = None
        if place.job is self.first:
            self.first = self._least()

    def each(self) -> Iterator[Job]:
        """Yield all jobs, in no guaranteed order, and without building a list."""
        place = self._head
        while place is not None:
            yield place.job
            place = place.after
        for early in self._early.values():
            yield early.job

    def jobs(self) -> list[Job]:
        """Return all jobs, in no guaranteed order."""
        return list(self.each())

    def _least(self) -> Job | None:
        head, early = self._head, self.first_alive()
        if early is None:
            return None if head is None else head.job
        if head is None or (early[0], early[1]) < (head.number, head.job.id):
            return early[2].job
        return head.job
