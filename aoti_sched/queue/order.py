"""Order: which job goes next. Priority classes, first in first out within; across runners and keys the same rule."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from aoti_sched.queue.job import Job, Priority

_T = TypeVar("_T", bound=Hashable)


class JobQueue:
    """The waiting jobs of one source. Push, remove and pop are O(1)."""

    __slots__ = ("_classes", "_size")

    def __init__(self) -> None:
        # OrderedDict is a linked list: unlike a dict's, its first key is found in O(1) after many deletions.
        self._classes: tuple[OrderedDict[int, Job], ...] = tuple(OrderedDict() for _ in Priority)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, job: Job) -> None:
        self._classes[job.priority][job.id] = job
        self._size += 1

    def remove(self, job: Job) -> None:
        del self._classes[job.priority][job.id]
        self._size -= 1

    def head(self) -> Job | None:
        for jobs in self._classes:
            if jobs:
                return next(iter(jobs.values()))
        return None

    def jobs(self) -> list[Job]:
        """All jobs in the order in which they would go."""
        return [job for jobs in self._classes for job in jobs.values()]


class Contest(Generic[_T]):
    """Queues contending for something (a lane, room, the next place in a larger queue), best head job first.

    What has the queue, a source or a key, stands for it. A heap of (priority, id, source) entries that are not updated but checked when they surface: an entry
    counts if its job still heads its source's queue and the source is `eligible`. A source enters (or
    re-enters) when its head or its eligibility changes; so each fact costs O(log n), and a source that
    has no work costs nothing.
    """

    __slots__ = ("_eligible", "_entered", "_heap", "_queue_of")

    def __init__(self, queue_of: Callable[[_T], JobQueue], eligible: Callable[[_T, Job], bool]) -> None:
        self._heap: list[tuple[int, int, _T]] = []
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
        heapq.heappush(self._heap, (head.priority, head.id, source))
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
            _, job_id, source = heap[0]
            head = self._queue_of(source).head()
            if head is not None and head.id == job_id and self._eligible(source, head):
                return head
            heapq.heappop(heap)
            if self._entered.get(source) == job_id:
                del self._entered[source]
        return None

    def _drop_stale(self) -> None:
        self._heap = [entry for entry in self._heap if self._entered.get(entry[2]) == entry[1]]
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
        return sorted(found, key=lambda job: (job.priority, job.id))


_NONE = JobQueue()
