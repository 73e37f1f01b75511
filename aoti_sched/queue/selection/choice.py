"""Selector: which queued job is launched next, among those with a free slot and a place to run.

Sources contend with their first jobs: for a lane, for the loop's own thread, for either of the two,
or for a lease. The priority class decides, then the runner's virtual time (`fairness.py`), then the
job's due time.

A short job of a runner with `Placement.AUTO` goes to the loop, unless the loop is behind with its
source (`placement.py`). Then it goes to a free lane, or is handed ahead to one. Where neither is
possible, it is the one job of the loop's turn.

Where jobs may become overdue, every second launch is of the overdue job that came first. These
launches take at most a quarter of the time (`OVERDUE_PART`). Under overload, each job becomes
overdue sooner or later, and without this limit priority classes and shares would have no effect.
"""

from __future__ import annotations

from typing import Final

from aoti_sched.queue.job import Job
from aoti_sched.queue.lanes import Lanes
from aoti_sched.queue.runner_state import RunnerState, Source, may_share_run
from aoti_sched.queue.selection.job_queue import LazyHeap, Rank
from aoti_sched.queue.selection.placement import Placement


def can_start(source: Source) -> bool:
    """Return whether a source has a free slot that it may give out."""
    return bool(source.free) and not source.closed and not source.halted


def _rank(head: Job) -> Rank:
    """Return the rank of a source whose first job is `head`."""
    priority, accounts = head.priority, head.source.runner.accounts
    return (priority, accounts[priority].virtual if accounts else 0.0, head.due, head.id)


def _next_run(source: Source) -> Job | None:
    """Return a source's first job, if it is a run, and the source has a slot for it."""
    head = source.queue.head()
    if head is None or head.is_lease_request or not can_start(source):
        return None
    return head


def _for_a_lane(source: Source) -> Rank | None:
    head = _next_run(source)
    if head is None or source.runner.placing.inline(head.bytes):
        return None
    return _rank(head)


def _rank_on_the_loop(source: Source, *, auto: bool) -> Rank | None:
    """Return the rank of a source whose first job belongs on the loop; None if the job does not.

    Args:
        source: The source.
        auto: Whether the job may go to a lane instead (`Placement.AUTO`).
    """
    head, placing = _next_run(source), source.runner.placing
    if head is None or (placing.choice is Placement.AUTO) != auto or not placing.inline(head.bytes):
        return None
    return _rank(head)


def _for_the_loop(source: Source) -> Rank | None:
    return _rank_on_the_loop(source, auto=False)


def _for_either(source: Source) -> Rank | None:
    return _rank_on_the_loop(source, auto=True)


def _for_a_lease(source: Source) -> Rank | None:
    head = source.queue.head()
    return _rank(head) if head is not None and head.is_lease_request and can_start(source) else None


def _age(source: Source, *, inline: bool) -> Rank | None:
    """Return the age of a source's oldest job as a rank; None when the source does not contend.

    A source contends if it has a free slot, and its oldest job belongs in this place. That job must
    not wait for the turn of the loop to end.

    Args:
        source: The source.
        inline: Whether the place is the loop's own thread, or else a lane.
    """
    oldest = source.arrivals.first
    if (
        oldest is None
        or not can_start(source)
        or source.runner.placing.inline(oldest.bytes) != inline
    ):
        return None
    batches = source.runner.batch_queue
    if (
        oldest.key is not None
        and batches is not None
        and source is source.runner
        and batches.holds_back(oldest)
    ):
        return None
    return (oldest.submitted, oldest.id)


def _age_on_a_lane(source: Source) -> Rank | None:
    return _age(source, inline=False)


def _age_on_the_loop(source: Source) -> Rank | None:
    return _age(source, inline=True)


def is_behind(job: Job) -> bool:
    """Return whether the loop is behind with the source of a job that belongs there.

    Jobs that may share a run don't add up: they run as one batch.
    """
    source = job.source
    if job.key is not None and may_share_run(job):
        return False
    return source.runner.placing.is_behind(job.bytes, len(source.queue))


def most_ahead(job: Job) -> int:
    """Return how many jobs like this one a lane may be handed ahead; 0 where they are too long.

    Jobs that may share a run are handed ahead one by one: those that wait make larger batches.
    """
    most = job.source.runner.placing.most_ahead(job.bytes)
    return min(most, 1) if job.key is not None and may_share_run(job) else most


def better(one: Job | None, other: Job | None) -> Job | None:
    """Return the one of two sources' first jobs that goes before the other."""
    if one is None or other is None:
        return one or other
    return one if _rank(one) < _rank(other) else other


def _first(contest: LazyHeap[Source]) -> Job | None:
    """Return the first job of the source with the least rank; None when no source contends."""
    source = contest.best()
    return None if source is None else source.queue.head()


OVERDUE_PART: Final = 0.25
"""The most that launches of overdue jobs get of the core time."""


class Selector:
    """Chooses the next job for one device.

    Args:
        lanes: The device's lanes.
        max_wait: Seconds in the queue after which a job is overdue; None for never.

    Attributes:
        leaves_the_loop: Whether the job that was chosen last belongs on the loop, but goes to a
            lane, since the loop is behind.
    """

    __slots__ = (
        "_credit",
        "_either",
        "_lanes",
        "_lease",
        "_loop",
        "_max_wait",
        "_oldest",
        "_oldest_inline",
        "_regular",
        "_runs",
        "_was_overdue",
        "leaves_the_loop",
    )

    def __init__(self, lanes: Lanes, max_wait: float | None) -> None:
        self._lanes = lanes
        self._max_wait = max_wait
        self._regular = False  # the last launch was of an overdue job, so the next one is not
        self._was_overdue = False  # whether the job that was chosen last is overdue
        self.leaves_the_loop = False
        # Core seconds, below zero while overdue jobs have had more than their part.
        self._credit = 0.0
        self._runs: LazyHeap[Source] = LazyHeap(_for_a_lane)
        self._loop: LazyHeap[Source] = LazyHeap(_for_the_loop)
        self._either: LazyHeap[Source] = LazyHeap(_for_either)
        self._lease: LazyHeap[Source] = LazyHeap(_for_a_lease)
        self._oldest: LazyHeap[Source] = LazyHeap(_age_on_a_lane)
        self._oldest_inline: LazyHeap[Source] = LazyHeap(_age_on_the_loop)

    def enter(self, source: Source) -> None:
        """Let a source contend anew, since its first job or its slots have changed."""
        if self._max_wait is not None:
            self._oldest.enter(source)
            self._oldest_inline.enter(source)
        head = source.queue.head()
        if head is None or not can_start(source):
            return
        if head.is_lease_request:
            self._lease.enter_as(source, _rank(head))
        elif not source.runner.placing.inline(head.bytes):
            self._runs.enter_as(source, _rank(head))
        elif source.runner.placing.choice is Placement.AUTO:
            self._either.enter_as(source, _rank(head))
        else:
            self._loop.enter_as(source, _rank(head))

    def forget(self, source: Source) -> None:
        """Remove a source that no job will come to any more."""
        for contest in (
            *(self._runs, self._loop, self._either, self._lease),
            *(self._oldest, self._oldest_inline),
        ):
            contest.leave(source)

    def next(self, now: float) -> Job | None:
        """Return the job to be launched now, which is still queued; None when there is none.

        If the first job in line for a lane needs more cores than are free, no other job overtakes
        it on a lane; otherwise it could starve.
        """
        lanes, overdue = self._lanes, None
        self.leaves_the_loop = False
        if self._max_wait is not None:
            found = self._next_overdue(now)
            self._was_overdue = found is not None
            if found is not None:
                return found
            overdue = self._overdue(self._oldest, now)
        first, either, best = _first(self._lease), _first(self._either), None
        lane = bool(lanes.free) and (
            overdue is None or overdue.source.runner.width <= lanes.free_cores
        )
        if lane:
            best = _first(self._runs)
            if best is not None and best.source.runner.width <= lanes.free_cores:
                first = better(first, best)
        if lanes.loop_is_free():
            first = better(first, _first(self._loop))
        if either is None:
            return first
        if not is_behind(either):
            return better(first, either) if lanes.loop_is_free() else first
        fits = either.source.runner.width <= lanes.free_cores
        if lane and fits and better(best, either) is either:
            first = better(first, either)
            self.leaves_the_loop = first is either
        elif lanes.loop_is_fresh() and not lanes.takes_ahead(either.source, most_ahead(either)):
            first = better(first, either)
        return first

    def launches(self, job: Job, *, chosen: bool) -> None:
        """Note that a job is launched.

        Args:
            job: The job.
            chosen: Whether the job is the one that `next` chose last.
        """
        if self._max_wait is None:
            return
        self._regular = job.overdue = chosen and self._was_overdue

    def took(self, job: Job, seconds: float) -> None:
        """Note that a job's run is over, and took `seconds` of core time."""
        if self._max_wait is not None:
            part = -(1 - OVERDUE_PART) if job.overdue else OVERDUE_PART
            self._credit = min(0.0, self._credit + seconds * part)

    def rests(self) -> None:
        """Forget what overdue jobs have had, since no job is queued that could have lost by it."""
        self._credit = 0.0

    def is_wanted(self, *, inline: bool) -> bool:
        """Return whether a queued job with a free slot contends for the loop, or for a lane."""
        either = _first(self._either)
        if inline:
            return either is not None or self._loop.best() is not None
        return self._runs.best() is not None or (either is not None and is_behind(either))

    def has_place(self, runner: RunnerState, *, inline: bool) -> bool:
        """Return whether a run of a runner may start on the loop, or on a lane, now."""
        lanes = self._lanes
        return (
            lanes.loop_is_free()
            if inline
            else bool(lanes.free) and runner.width <= lanes.free_cores
        )

    def may_follow(self, job: Job, now: float) -> bool:
        """Return whether a job may be handed ahead to a lane, instead of freeing the lane.

        The job may not while a better job contends for a lane, nor while it is the turn of overdue
        jobs and there is one.
        """
        first, either = _first(self._runs), _first(self._either)
        if either is not None and is_behind(either):
            first = better(first, either)
        if first is not None and _rank(first) < _rank(job):
            return False
        if self._max_wait is None or self._regular or self._credit < 0.0:
            return True
        oldest = job.source.arrivals.first
        waits = oldest is not None and now - oldest.submitted >= self._max_wait
        return not waits and self._overdue(self._oldest, now) is None

    def _next_overdue(self, now: float) -> Job | None:
        """Return the oldest overdue job that has a place to run; None when there is none."""
        lanes = self._lanes
        on_lane = self._overdue(self._oldest, now) if lanes.free else None
        if on_lane is not None and on_lane.source.runner.width > lanes.free_cores:
            on_lane = None
        on_loop = self._overdue(self._oldest_inline, now) if lanes.loop_is_free() else None
        if on_lane is None or on_loop is None:
            return on_lane or on_loop
        return (
            on_lane
            if (on_lane.submitted, on_lane.id) < (on_loop.submitted, on_loop.id)
            else on_loop
        )

    def _overdue(self, contest: LazyHeap[Source], now: float) -> Job | None:
        """Return the oldest contending job if it is overdue, and an overdue job is to go next."""
        if self._max_wait is None or self._regular or self._credit < 0.0:
            return None
        source = contest.best()
        oldest = None if source is None else source.arrivals.first
        return oldest if oldest is not None and now - oldest.submitted >= self._max_wait else None
