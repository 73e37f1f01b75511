"""Growth: which queued jobs join a batch, so that the batch pays and breaks no promise.

A batch has a leader, the job that goes next by the queue's order. Other jobs of its key may join.
The batch takes as long as its rows times its longest row, since shorter rows are padded; how long
that is was learned from earlier runs (`selection/service_time.py`).

**Bounds.** A batch has at most `max_rows` rows, and at most `max_tokens` tokens: rows times the
longest row. It is expected to take at most `max_seconds`. By default these are `PROMISED` times
what one job takes alone, if jobs of a higher class have come within `RECENT` seconds: the leader,
or a job of the mean size of those queued with it, whichever takes longer. So a job of a higher
class waits for no longer than for two runs of one job, and a short leader makes no small batch
where the usual run is longer anyway. Where none have come, a batch may take `ALONE` times what the
leader takes alone. If a run costs a constant and a part for each row, a batch of k times one run
has at least (k - 1) / k of the highest rate of rows: at 2 a half, at 8 seven eighths. A batch of up
to a millisecond disturbs no caller, as the loop itself may lag as long (`INLINE_BUDGET`).

**While it pays.** A batch grows while rows per second rise, by the learned times. A job of another
length joins only if the batch takes no longer with it than the batch and the job would take one
after the other. So no batch is slower than its jobs one by one. Neither holds for batches of up to
a millisecond: there a launch of its own would cost more. A time that hinders a batch counts when it
is that of several runs, and not old.

**Deadlines.** A batch is expected to end within three quarters of the time up to each member's
deadline. The same holds for the latest start of each queued job of a higher class than the
leader's: for its deadline, less the time that its run hardly exceeds. The quarter is for runs that
take longer than expected.

**While nothing is known.** Until the first run has ended, jobs run alone, since a first batch of
`max_rows` could take a hundred times the first run. From then on a batch takes at most as many
seconds per byte as the largest run so far, so batches double in a few runs. With a `max_seconds`
that is infinite there is nothing to keep, and the first batch may be full.

**Order.** The leader is always the job that goes next, whatever its length. So a job that fits into
no batch is not passed for long: each launch before it is of a job that goes before it, and takes at
most `max_seconds`. Among the others, jobs of a higher class join first; within a class those whose
length is nearest to the leader's: equal ones, then shorter ones, then longer ones. Jobs of one
length join in the order in which they would go, and the first that does not fit ends that length.
Each member is charged for its rows, so fair shares hold (`selection/fairness.py`).
"""

from __future__ import annotations

import math
from typing import Final

from aoti_sched.queue.batching import Batching
from aoti_sched.queue.job import Job, row_size
from aoti_sched.queue.selection.service_time import GRAIN, NO_LIMIT, UNNOTICED, ServiceTimes

PROMISED: Final = 2
"""The most runs of one job that a batch takes by default while jobs of a higher class come."""

ALONE: Final = 8
"""The most runs of one job that a batch takes by default otherwise."""

USABLE: Final = 0.75
"""The part of the time up to a deadline within which a batch is expected to end."""


def _grains(seconds: float) -> int:
    return NO_LIMIT if seconds >= NO_LIMIT * GRAIN else int(seconds / GRAIN)


class Growth:
    """One batch that is being put together.

    Args:
        rule: How the jobs are batched.
        times: The learned run times.
        leader: The job that leads.
        usual: The mean bytes of the queued jobs of its key.
        now: The present time.
        latest: The latest start of a queued job of a higher class; infinite if there is none.
        promised: Whether jobs of a higher class have come of late.

    Attributes:
        size: The bytes of the run, padding included.
    """

    __slots__ = (
        "_largest",
        "_leader",
        "_limit",
        "_longest",
        "_now",
        "_rows",
        "_rule",
        "_times",
        "_tokens",
        "size",
    )

    def __init__(
        self,
        rule: Batching,
        times: ServiceTimes,
        leader: Job,
        usual: int,
        now: float,
        latest: float,
        *,
        promised: bool,
    ) -> None:
        self._rule = rule
        self._times = times
        self._leader = leader.rows * row_size(leader)
        self._now = now
        self._rows = leader.rows
        self._longest = row_size(leader)
        self._tokens = leader.tokens
        self.size = self._leader
        alone = times.estimate(self.size)
        seconds = rule.max_seconds
        if seconds is None:
            one = max(alone, times.estimate(usual)) if promised else alone
            limit = max(UNNOTICED, one * (PROMISED if promised else ALONE))
        else:
            limit = _grains(seconds)
        if leader.deadline is not None:
            latest = min(latest, leader.deadline)
        if latest < math.inf:
            limit = min(limit, _grains((latest - now) * USABLE))
        self._limit = limit
        if alone:
            self._largest = times.largest(self.size, limit, now)
        else:
            self._largest = NO_LIMIT if rule.max_seconds == math.inf else self.size

    @property
    def is_full(self) -> bool:
        """Return whether no job can join any more."""
        rows, rule = self._rows + 1, self._rule
        return (
            rows > rule.max_rows
            or rows * self._longest > self._largest
            or (rule.max_tokens is not None and rows * self._tokens > rule.max_tokens)
        )

    def fits(self, job: Job) -> bool:
        """Return whether the batch keeps its bounds and its deadlines if a job joins."""
        rule, rows = self._rule, self._rows + job.rows
        size, largest = rows * max(self._longest, row_size(job)), self._largest
        if rows > rule.max_rows or size > largest:
            return False
        if rule.max_tokens is not None and rows * max(self._tokens, job.tokens) > rule.max_tokens:
            return False
        return job.deadline is None or size <= self._largest_until(job.deadline)

    def pays(self, job: Job) -> bool:
        """Return whether the batch takes no longer with a job than the two one after the other.

        Among jobs of one length this is so, since the batch grows only while rows per second rise.
        """
        length = row_size(job)
        if length == self._longest:
            return True
        times, together = self._times, (self._rows + job.rows) * max(self._longest, length)
        apart = times.estimate(self.size) + times.estimate(job.rows * length)
        return times.estimate(together) <= max(UNNOTICED, apart)

    def size_with(self, job: Job) -> int:
        """Return the bytes of the run if a job joins."""
        return (self._rows + job.rows) * max(self._longest, row_size(job))

    def add(self, job: Job) -> None:
        """Let a job join."""
        if job.deadline is not None:
            self._largest = self._largest_until(job.deadline)
        self._rows += job.rows
        self._longest = max(self._longest, row_size(job))
        self._tokens = max(self._tokens, job.tokens)
        self.size = self._rows * self._longest

    def _largest_until(self, deadline: float) -> int:
        """Return to which size the batch may grow, so that it ends in time for a deadline."""
        limit = _grains((deadline - self._now) * USABLE)
        if limit >= self._limit or not self._times.estimate(self._leader):
            return self._largest
        return min(self._largest, self._times.largest(self._leader, limit, self._now))
