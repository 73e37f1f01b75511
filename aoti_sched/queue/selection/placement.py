"""Placement: where a launch runs, on a lane or inline, on the loop's own thread.

A hop to a sleeping thread costs 60 to 70 µs, even in C. A run that is known to be shorter than that
ends sooner when the loop runs it inline. A longer run would block the loop.

That holds for one run. Where so many short runs are queued that the loop would take longer than a
hop to come to the last of them, the loop is behind, and they go to lanes first.
"""

from __future__ import annotations

import enum
import math
from typing import Final

from aoti_sched.queue.selection.service_time import ServiceTimes

INLINE_BUDGET: Final = 1e-3
"""Seconds of inline runs per turn of the loop: what inline runs may add to the loop's lag."""

HOP: Final = 70e-6
"""Seconds that a run on a lane whose thread sleeps takes longer than an inline run."""

FOLLOW_LIMIT: Final = 1e-3
"""Seconds: a lane that runs a shorter job may be handed jobs ahead of time that take no longer.

Otherwise the lane would idle until the loop has learned of the end and answered: for about 100 µs,
and longer where the loop is busy. For a longer run, that does not matter, and it is better to
choose the next job at the end.
"""

AHEAD_LIMIT: Final = 200e-6
"""Seconds: more than one job is handed ahead to a lane only if they take no longer together.

A loop that is busy with 64 clients takes about that long to answer a lane. What was handed ahead is
not overtaken any more, so it should not be more than that.
"""

MOST_AHEAD: Final = 7
"""The most jobs that a lane is handed ahead; `kDepth` of `native/lane.hpp` is one more.

With one each, lanes idled while the loop served 64 clients. With up to seven, they did 1.4 times as
many runs of 25 µs, and 1.8 times as many of 8 µs.
"""

HOP_OF_ONE: Final = 0.5e-6
"""Seconds that each request of a batch costs the loop on a lane, beyond the cost inline.

The inputs are kept for the lane, and the outputs are another thread's memory. Measured with 64 and
512 requests of one row.
"""

LOOP: Final = -1
"""The lane number of the loop's own thread, which runs one job at a time, as lanes do."""


class Placement(enum.Enum):
    """A runner's choice: AUTO goes inline once its runs are known to be short."""

    AUTO = "auto"
    LANE = "lane"
    INLINE = "inline"


class Placing:
    """Decides where a runner's launches run, by its choice and the learned run times.

    Args:
        choice: The runner's choice.
        limit: Under AUTO, a run that hardly takes longer than these seconds goes inline.
        follow_limit: A job that hardly takes longer than these seconds may be handed ahead to a
            lane that runs such a job.
        ahead_limit: More than one such job may be handed ahead if they hardly take longer than
            these seconds together.
        hop: Seconds that the limit of a batch is higher for each further request.
        backlog_limit: Under AUTO, the loop is behind if the queued runs of one source without the
            first would take it longer than these seconds.

    Attributes:
        times: The learned run times.
    """

    __slots__ = ("ahead_limit", "backlog_limit", "choice", "follow_limit", "hop", "limit", "times")

    def __init__(
        self,
        choice: Placement = Placement.LANE,
        limit: float = 0.0,
        *,
        follow_limit: float = 0.0,
        ahead_limit: float = 0.0,
        hop: float = 0.0,
        backlog_limit: float = math.inf,
    ) -> None:
        self.choice = choice
        self.limit = limit
        self.follow_limit = follow_limit
        self.ahead_limit = ahead_limit
        self.hop = hop
        self.backlog_limit = backlog_limit
        self.times = ServiceTimes()

    def inline(self, size: int) -> bool:
        """Return whether a run on inputs of `size` bytes belongs on the loop's own thread.

        Under AUTO, such a run, or a run on larger inputs, must be known to be short. Where requests
        always come in batches, only runs on larger inputs are known.
        """
        if self.choice is Placement.AUTO:
            times = self.times
            return times.bound(size) < self.limit or times.one_larger_is_short(
                size, self.limit, self.hop
            )
        return self.choice is Placement.INLINE

    def is_behind(self, size: int, queued: int) -> bool:
        """Return whether the loop is behind, so that a run that belongs there may go to a lane.

        The run's runner has AUTO.

        Args:
            size: The bytes of the run's inputs.
            queued: The number of queued runs of its source, with this one.
        """
        return (queued - 1) * min(self.limit, self.times.bound(size)) > self.backlog_limit

    def follows(self, size: int) -> bool:
        """Return whether a run on inputs of `size` bytes is short enough to be handed ahead."""
        return self.times.bound(size) < self.follow_limit

    def most_ahead(self, size: int) -> int:
        """Return how many runs on inputs of `size` bytes a lane is handed ahead; 0 if long."""
        bound = self.times.bound(size)
        if bound >= self.follow_limit:
            return 0
        if bound * MOST_AHEAD <= self.ahead_limit:
            return MOST_AHEAD
        return max(1, int(self.ahead_limit / bound))

    def grows(self, size: int, jobs: int) -> bool:
        """Return whether a batch on the loop's thread may grow to `jobs` jobs of `size` bytes."""
        if self.choice is Placement.INLINE:
            return True
        limit, times = self.limit + (jobs - 1) * self.hop, self.times
        return times.grown(size) < limit or times.one_larger_is_short(size, limit, self.hop)

    def learn(self, size: int, seconds: float, now: float, *, too_long: bool) -> bool:
        """Learn from a run.

        After an inline run that is too long, runs of its size and larger ones go back to the lanes,
        where their times are learned anew.

        Args:
            size: The bytes of the run's inputs.
            seconds: How long the run took.
            now: The present time.
            too_long: Whether the run was inline and exceeded a whole turn's budget.

        Returns:
            Whether other jobs of the runner may now belong in another place.
        """
        times = self.times
        before = times.bound(size)
        if too_long:
            times.forget(size)
        else:
            times.learn(size, seconds, now)
        return self.choice is Placement.AUTO and (too_long or times.bound(size) != before)
