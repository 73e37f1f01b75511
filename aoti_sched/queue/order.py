"""Order: which job goes next. Priority classes, the earliest deadline within; across runners and keys the same rule."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from aoti_sched.queue.job import Job, Priority

_T = TypeVar("_T", bound=Hashable)


UNHURRIED = 10.0
"""Seconds. A job without a deadline is ordered as if it were due so long after its submission: behind those that are in a
hurry, but not for ever."""

Rank = tuple[int, float, int]


def rank(job: Job) -> Rank:
    """The least goes first: the higher class, then the earlier deadline, then who came first."""
    return (job.priority, job.due, job.id)


class Line:
    """Jobs of one class, the earliest due first. O(1) for those that come in that order, O(log n) for others."""

    __slots__ = ("_early", "_heap", "_in_order", "_last")

    def __init__(self) -> None:
        # OrderedDict is a linked list: unlike a dict's, its first key is found in O(1) after many deletions.
        self._in_order: OrderedDict[int, Job] = OrderedDict()
        self._last = -math.inf  # when the last of them is due
        self._early: dict[int, Job] = {}  # those that came after one that is due later
        self._heap: list[tuple[float, int, Job]] = []  # of these, and of some that have left

    def push(self, job: Job) -> None:
        if job.due > self._last or not self._in_order or (job.due == self._last and job.id > self._last_id()):
            self._in_order[job.id] = job
            self._last = job.due
        else:
            self._early[job.id] = job
            heapq.heappush(self._heap, (job.due, job.id, job))

    def remove(self, job: Job) -> None:
        if self._in_order.pop(job.id, None) is not None:
            return
        del self._early[job.id]
        if len(self._heap) > 2 * len(self._early) + 16:
            self._heap = [(early.due, early.id, early) for early in self._early.values()]
            heapq.heapify(self._heap)

    def head(self) -> Job | None:
        if not self._early:
            for first in self._in_order.values():
                return first
            return None
        heap = self._heap
        while heap[0][1] not in self._early:
            heapq.heappop(heap)
        for first in self._in_order.values():
            if (first.due, first.id) < heap[0][:2]:
                return first
            break
        return heap[0][2]

    def jobs(self) -> list[Job]:
        return sorted([*self._in_order.values(), *self._early.values()], key=rank)

    def _last_id(self) -> int:
        return next(reversed(self._in_order))


class JobQueue:
    """The waiting jobs of one source."""

    __slots__ = ("_classes", "_size")

    def __init__(self) -> None:
        self._classes: tuple[Line, ...] = tuple(Line() for _ in Priority)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, job: Job) -> None:
        self._classes[job.priority].push(job)
        self._size += 1

    def remove(self, job: Job) -> None:
        self._classes[job.priority].remove(job)
        self._size -= 1

    def head(self) -> Job | None:
        for line in self._classes:
            head = line.head()
            if head is not None:
                return head
        return None

    def jobs(self) -> list[Job]:
        """All jobs in the order in which they would go."""
        return [job for line in self._classes for job in line.jobs()]


class Contest(Generic[_T]):
    """Queues contending for something (a lane, room, the next place in a larger queue), best head job first.

    What has the queue, a source or a key, stands for it. A heap of (rank, source) entries that are not updated but checked when they surface: an entry
    counts if its job still heads its source's queue and the source is `eligible`. A source enters (or
    re-enters) when its head or its eligibility changes; so each fact costs O(log n), and a source that
    has no work costs nothing.
    """

    __slots__ = ("_eligible", "_entered", "_heap", "_queue_of")

    def __init__(self, queue_of: Callable[[_T], JobQueue], eligible: Callable[[_T, Job], bool]) -> None:
        self._heap: list[tuple[int, float, int, _T]] = []
        self._entered: dict[_T, int] = {}  # each source's latest entry; older ones are stale
        self._queue_of = queue_of
        self._eligible = eligible

    def enter(self, source: _T) -> None:
        """Call when a source's head or eligibility may have changed; entering twice does no harm."""
        head = self._queue_of(source).head()
        if head is not None and self._eligible(source, head):
            self.enter_with(source, head)

    def enter_with(self, source: _T, head: Job) -> None:
        """`enter`, by one who knows the head and that it is eligible."""
        if self._entered.get(source) == head.id:
            return
        heapq.heappush(self._heap, (head.priority, head.due, head.id, source))
        self._entered[source] = head.id
        if len(self._heap) > 2 * len(self._entered) + 16:
            self._drop_stale()

    def leave(self, source: _T) -> None:
        """Forget a source that is gone for good."""
        self._entered.pop(source, None)

    def best(self) -> Job | None:
        """The job that goes next, still queued; None when no source is eligible."""
        heap = self._heap
        while heap:
            _, _, job_id, source = heap[0]
            head = self._queue_of(source).head()
            if head is not None and head.id == job_id and self._eligible(source, head):
                return head
            heapq.heappop(heap)
            if self._entered.get(source) == job_id:
                del self._entered[source]
        return None

    def _drop_stale(self) -> None:
        self._heap = [entry for entry in self._heap if self._entered.get(entry[3]) == entry[2]]
        heapq.heapify(self._heap)


class KeyedQueue(JobQueue):
    """The waiting jobs of a runner that may run some of them as one: those with the same key stand together.

    A key can be hidden: its jobs wait, but do not contend. They are hidden and shown by whoever knows why.
    """

    __slots__ = ("_by_key", "_contest", "_hidden")

    def __init__(self) -> None:
        super().__init__()
        self._by_key: dict[Hashable, JobQueue] = {}
        self._hidden: set[Hashable] = set()
        self._contest: Contest[Hashable] = Contest(
            lambda key: self._by_key.get(key, _NONE), lambda key, _: key not in self._hidden
        )

    def push(self, job: Job) -> None:
        alike = self._by_key.get(job.key)
        if alike is None:
            alike = self._by_key[job.key] = JobQueue()
        alike.push(job)
        self._size += 1
        self._contest.enter(job.key)

    def remove(self, job: Job) -> None:
        alike = self._by_key[job.key]
        alike.remove(job)
        self._size -= 1
        if len(alike):
            self._contest.enter(job.key)
        else:
            del self._by_key[job.key]
            self._contest.leave(job.key)

    def head(self) -> Job | None:
        return self._contest.best()

    def head_of(self, key: Hashable) -> Job | None:
        """The first of those with this key, hidden or not."""
        return self._by_key.get(key, _NONE).head()

    def hide(self, key: Hashable) -> None:
        self._hidden.add(key)

    def show(self, key: Hashable) -> None:
        if key in self._hidden:
            self._hidden.remove(key)
            self._contest.enter(key)

    def jobs(self) -> list[Job]:
        found = [job for alike in self._by_key.values() for job in alike.jobs()]
        return sorted(found, key=rank)


_NONE = JobQueue()
