"""Selector: which of the queued jobs goes next, among those that have a slot and a place to run.

Sources contend with their first jobs: for a lane, for the loop's own thread, for a lease. The class decides, then what
the runner had for its share (`fair`), then when the job is due. Where jobs may become overdue, every second launch is of the
one that came first, as long as these don't take more than a quarter of the time: where more comes than can be done, everything is
overdue sooner or later, and there would be no classes and shares any more.
"""

from __future__ import annotations

from aoti_sched.queue.job import Job
from aoti_sched.queue.lanes import Lanes
from aoti_sched.queue.runner_state import RunnerState, Source
from aoti_sched.queue.selection.job_queue import LazyHeap, Rank


def can_start(source: Source) -> bool:
    """Whether it has a slot to give."""
    return bool(source.free) and not source.closed and not source.halted


def _rank(head: Job) -> Rank:
    """Of its source among the others."""
    priority, accounts = head.priority, head.source.runner.accounts
    return (priority, accounts[priority].virtual if accounts else 0.0, head.due, head.id)


def _for_a_lane(source: Source) -> Rank | None:
    head = source.queue.head()
    if (
        head is None
        or head.is_lease_request
        or not can_start(source)
        or source.runner.placing.inline(head.bytes)
    ):
        return None
    return _rank(head)


def _for_the_loop(source: Source) -> Rank | None:
    head = source.queue.head()
    if (
        head is None
        or head.is_lease_request
        or not can_start(source)
        or not source.runner.placing.inline(head.bytes)
    ):
        return None
    return _rank(head)


def _for_a_lease(source: Source) -> Rank | None:
    head = source.queue.head()
    return _rank(head) if head is not None and head.is_lease_request and can_start(source) else None


def _age(source: Source, *, inline: bool) -> Rank | None:
    """Of the job that came first, if it may run there and does not wait for the turn of the loop to end."""
    oldest = source.arrivals.first
    if (
        oldest is None
        or not can_start(source)
        or source.runner.placing.inline(oldest.bytes) != inline
    ):
        return None
    company = source.runner.batch_queue
    if (
        oldest.key is not None
        and company is not None
        and source is source.runner
        and company.holds_back(oldest)
    ):
        return None
    return (oldest.submitted, oldest.id)


def _age_on_a_lane(source: Source) -> Rank | None:
    return _age(source, inline=False)


def _age_on_the_loop(source: Source) -> Rank | None:
    return _age(source, inline=True)


def better(one: Job | None, other: Job | None) -> Job | None:
    """Return the one of two sources' first jobs that goes before the other."""
    if one is None or other is None:
        return one or other
    return one if _rank(one) < _rank(other) else other


def _first(contest: LazyHeap[Source]) -> Job | None:
    """Of the source that leads."""
    source = contest.best()
    return None if source is None else source.queue.head()


OVERDUE_PART = 0.25
"""Of the core time, what launches of overdue jobs get at most."""


class Selector:
    """Chooses for one device's `lanes`. A job is overdue after `max_wait` seconds in the queue; None: never."""

    __slots__ = (
        "_credit",
        "_lanes",
        "_lease",
        "_loop",
        "_max_wait",
        "_oldest",
        "_oldest_inline",
        "_regular",
        "_runs",
        "_was_overdue",
    )

    def __init__(self, lanes: Lanes, max_wait: float | None) -> None:
        self._lanes = lanes
        self._max_wait = max_wait
        self._regular = False  # the next launch is not of an overdue job, since the last one was
        self._was_overdue = False  # the one that was chosen last
        self._credit = (
            0.0  # core seconds, below zero while overdue jobs have had more than their part
        )
        self._runs: LazyHeap[Source] = LazyHeap(_for_a_lane)
        self._loop: LazyHeap[Source] = LazyHeap(_for_the_loop)
        self._lease: LazyHeap[Source] = LazyHeap(_for_a_lease)
        self._oldest: LazyHeap[Source] = LazyHeap(_age_on_a_lane)
        self._oldest_inline: LazyHeap[Source] = LazyHeap(_age_on_the_loop)

    def enter(self, source: Source) -> None:
        """Its first job or its slots changed: it contends again."""
        if self._max_wait is not None:
            self._oldest.enter(source)
            self._oldest_inline.enter(source)
        head = source.queue.head()
        if head is None or not can_start(source):
            return
        if head.is_lease_request:
            self._lease.enter_as(source, _rank(head))
        elif source.runner.placing.inline(head.bytes):
            self._loop.enter_as(source, _rank(head))
        else:
            self._runs.enter_as(source, _rank(head))

    def forget(self, source: Source) -> None:
        """It is gone for good."""
        for contest in (self._runs, self._loop, self._lease, self._oldest, self._oldest_inline):
            contest.leave(source)

    def next(self, now: float) -> Job | None:
        """Who goes now, still queued.

        Who is first in line for a lane and does not find cores enough is not passed by others: it would wait for ever.
        """
        lanes, overdue = self._lanes, None
        if self._max_wait is not None:
            found = self._next_overdue(now)
            self._was_overdue = found is not None
            if found is not None:
                return found
            overdue = self._overdue(self._oldest, now)
        first = _first(self._lease)
        if lanes.free and (overdue is None or overdue.source.runner.width <= lanes.free_cores):
            best = _first(self._runs)
            if best is not None and best.source.runner.width <= lanes.free_cores:
                first = better(first, best)
        if lanes.loop_is_free():
            first = better(first, _first(self._loop))
        return first

    def launches(self, job: Job, *, chosen: bool) -> None:
        """The one that was chosen last runs; or one that was not chosen here."""
        if self._max_wait is None:
            return
        self._regular = job.overdue = chosen and self._was_overdue

    def took(self, job: Job, seconds: float) -> None:
        """Its run is over, and took so many core seconds."""
        if self._max_wait is not None:
            part = -(1 - OVERDUE_PART) if job.overdue else OVERDUE_PART
            self._credit = min(0.0, self._credit + seconds * part)

    def rests(self) -> None:
        """Nobody waits: what overdue jobs have had is nobody's loss any more."""
        self._credit = 0.0

    def is_wanted(self, *, inline: bool) -> bool:
        """Whether somebody queued could start on the loop, or on a lane, were it free."""
        return (self._loop if inline else self._runs).best() is not None

    def has_place(self, runner: RunnerState, *, inline: bool) -> bool:
        """Whether a run may start there now."""
        lanes = self._lanes
        return (
            lanes.loop_is_free()
            if inline
            else bool(lanes.free) and runner.width <= lanes.free_cores
        )

    def may_follow(self, job: Job, now: float) -> bool:
        """Whether a lane may be given this job ahead, and not come free: nobody better waits for one, or waits too long."""
        first = _first(self._runs)
        if first is not None and _rank(first) < _rank(job):
            return False
        if self._max_wait is None or self._regular or self._credit < 0.0:
            return True
        oldest = job.source.arrivals.first
        waits = oldest is not None and now - oldest.submitted >= self._max_wait
        return not waits and self._overdue(self._oldest, now) is None

    def _next_overdue(self, now: float) -> Job | None:
        """Who has waited too long and has a place to run."""
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
        """Who of them came first, if it is overdue and it is the turn of those."""
        if self._max_wait is None or self._regular or self._credit < 0.0:
            return None
        source = contest.best()
        oldest = None if source is None else source.arrivals.first
        return oldest if oldest is not None and now - oldest.submitted >= self._max_wait else None
