"""Placement: where a launch runs, on a lane or inline, on the loop's own thread.

A hop to a sleeping thread costs 60 to 70 µs, even in C. A run known to be shorter than that is over
sooner when the loop runs it itself; a longer one would keep the loop from everything else.
"""

from __future__ import annotations

import enum

from aoti_sched.queue.selection.service_time import ServiceTimes

INLINE_BUDGET = 1e-3
"""Seconds of inline runs per turn of the loop: what they may add to its lag."""

FOLLOW_LIMIT = 1e-3
"""Seconds.

A lane that runs a job hardly longer than this is given the next one before it is done: it would
otherwise idle for about 100 µs, until the loop has heard of the first and answered. For a longer
run that is nothing, and its successor had better keep its place in the order.
"""

HOP_OF_ONE = 0.5e-6
"""Seconds that each request of a batch costs the loop on its way to a lane and back, beyond
what it costs inline: its inputs are kept for the lane, and its outputs are another thread's
memory. Measured with 64 and 512 requests of one row.
"""

LOOP = -1
"""The loop's own place among the lanes. It runs one job at a time, as lanes do."""


class Placement(enum.Enum):
    """A runner's choice: AUTO goes inline once its runs are known to be short."""

    AUTO = "auto"
    LANE = "lane"
    INLINE = "inline"


class Placing:
    """What a runner's launches go by: its choice, and what was learned of its runs.

    Under AUTO, a run that hardly takes longer than `limit` (seconds) goes inline; that of a batch
    may take `hop` longer for each further request. One that goes to a lane, and hardly takes longer
    than `follow_limit`, may be handed to it before the lane is done with the one before.
    """

    __slots__ = ("choice", "follow_limit", "hop", "limit", "times")

    def __init__(
        self,
        choice: Placement = Placement.LANE,
        limit: float = 0.0,
        *,
        follow_limit: float = 0.0,
        hop: float = 0.0,
    ) -> None:
        self.choice = choice
        self.limit = limit
        self.follow_limit = follow_limit
        self.hop = hop
        self.times = ServiceTimes()

    def inline(self, size: int) -> bool:
        """Whether a run on inputs of `size` bytes belongs on the loop's thread: it, or one on
        larger inputs, is known to be short.

        Where requests always come together, one alone is never seen, and what they take together
        tells of it.
        """
        if self.choice is Placement.AUTO:
            times = self.times
            return times.bound(size) < self.limit or times.one_larger_is_short(
                size, self.limit, self.hop
            )
        return self.choice is Placement.INLINE

    def follows(self, size: int) -> bool:
        """Whether a run on inputs of `size` bytes is short enough to be handed to a lane ahead
        of time.
        """
        return self.times.bound(size) < self.follow_limit

    def grows(self, size: int, jobs: int) -> bool:
        """Whether a batch on the loop's thread may grow to so many jobs, of `size` bytes
        together.
        """
        if self.choice is Placement.INLINE:
            return True
        limit, times = self.limit + (jobs - 1) * self.hop, self.times
        return times.grown(size) < limit or times.one_larger_is_short(size, limit, self.hop)

    def learn(self, size: int, seconds: float, now: float, *, too_long: bool) -> bool:
        """A run took so long. Says whether others may now belong in another place.

        One run on the loop's thread that was `too_long` for a whole turn's budget is enough to send
        what is like it, or larger, back to the lanes, to be learned anew.
        """
        times = self.times
        before = times.bound(size)
        if too_long:
            times.forget(size)
        else:
            times.learn(size, seconds, now)
        return self.choice is Placement.AUTO and (too_long or times.bound(size) != before)
