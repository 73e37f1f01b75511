"""Sorted jobs: jobs ordered by a number, where most jobs come in the order in which they go."""

from __future__ import annotations

from collections.abc import Iterator

from aoti_sched.queue.heap import Heap
from aoti_sched.queue.job import IllegalFactError, Job


class Node:
    """A job among sorted jobs.

    Attributes:
        number: The number that orders the job.
        job: The job.
        previous: The node before this one in the list of jobs that came in order; None for the
            first node, and outside the list.
        next: The node after this one.
        early: Whether the job came out of order, and is in the heap.
    """

    __slots__ = ("early", "job", "next", "number", "previous")

    def __init__(self, number: float, job: Job) -> None:
        self.number = number
        self.job = job
        self.previous: Node | None = None
        self.next: Node | None = None
        self.early = False


class SortedJobs(Heap["tuple[float, int, Node]"]):
    """Jobs ordered by a number, and by their ids where the numbers are equal.

    Most jobs come in the order in which they go. These are in a linked list, where any job can be
    added and removed in O(1). A job that must go before the last of these is in the heap.

    Attributes:
        first: The job with the least number; None when there is no job.
    """

    __slots__ = ("_early", "_head", "_tail", "first")

    def __init__(self) -> None:
        super().__init__()
        self.first: Job | None = None
        self._head: Node | None = None
        self._tail: Node | None = None
        self._early: dict[int, Node] = {}  # by the job's id: those in the heap

    def is_over(self, entry: tuple[float, int, Node]) -> bool:
        return entry[1] not in self._early

    def push(self, number: float, job: Job) -> Node:
        """Add a job, and return the node by which it is removed."""
        node, tail = Node(number, job), self._tail
        if tail is None:
            self._head = self._tail = node
        elif number > tail.number or (number == tail.number and job.id > tail.job.id):
            node.previous = tail
            tail.next = node
            self._tail = node
            return node  # another job goes first
        else:
            node.early = True
            self._early[job.id] = node
            self.add((number, job.id, node))
        self.first = self._least()
        return node

    def remove(self, node: Node) -> None:
        """Remove a job.

        Raises:
            IllegalFactError: The job is not here. Nothing was changed.
        """
        job = node.job
        if node.early:
            if self._early.pop(job.id, None) is None:
                raise _not_here(job)
            self.tidy(len(self._early))
        else:
            self._unlink(node)
        if job is self.first:
            self.first = self._least()

    def each(self) -> Iterator[Job]:
        """Yield all jobs, in no guaranteed order, and without building a list."""
        node = self._head
        while node is not None:
            yield node.job
            node = node.next
        for early in self._early.values():
            yield early.job

    def jobs(self) -> list[Job]:
        """Return all jobs, in no guaranteed order."""
        return list(self.each())

    def _unlink(self, node: Node) -> None:
        """Take a node out of the list."""
        previous, following = node.previous, node.next
        if previous is None:
            if self._head is not node:
                raise _not_here(node.job)
            self._head = following
        else:
            previous.next = following
        if following is None:
            self._tail = previous
        else:
            following.previous = previous
        node.previous = node.next = None

    def _least(self) -> Job | None:
        head, early = self._head, self.first_alive()
        if early is None:
            return None if head is None else head.job
        if head is None or (early[0], early[1]) < (head.number, head.job.id):
            return early[2].job
        return head.job


def _not_here(job: Job) -> IllegalFactError:
    return job.illegal(f"job {job.id} is not among these jobs")
