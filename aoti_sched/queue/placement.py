"""Placement: where a launch runs, on a lane or inline, on the loop's own thread.

A hop to a sleeping thread costs 60 to 70 µs, even in C. A run known to be shorter than that is over sooner when
the loop runs it itself; a longer one would keep the loop from everything else.
"""

from __future__ import annotations

import enum

from aoti_sched.queue.estimate import ServiceTimes

INLINE_BUDGET = 1e-3
"""Seconds of inline runs per turn of the loop: what they may add to its lag."""

FOLLOW_LIMIT = 1e-3
"""Seconds. A lane that runs a job hardly longer than this is given the next one before it is done: it would otherwise
idle for about 100 µs, until the loop has heard of the first and answered. For a longer run that is nothing, and its
successor had better keep its place in the order."""

LOOP = -1
"""The loop's own place among the lanes. It runs one job at a time, as lanes do."""


class Placement(enum.Enum):
    """A runner's choice: AUTO goes inline once its runs are known to be short."""

    AUTO = "auto"
    LANE = "lane"
    INLINE = "inline"


class Placing:
    """What a runner's launches go by: its choice, and what was learned of its runs.

    Under AUTO, a run that hardly takes longer than `limit` (seconds) goes inline. One that goes to a lane, and hardly takes
    longer than `follow_limit`, may be handed to it before the lane is done with the one before.
    """

    __slots__ = ("choice", "follow_limit", "limit", "times")

    def __init__(
        self, choice: Placement = Placement.LANE, limit: float = 0.0, *, follow_limit: float = 0.0
    ) -> None:
        self.choice = choice
        self.limit = limit
        self.follow_limit = follow_limit
        self.times = ServiceTimes()

    def inline(self, size: int) -> bool:
        """Whether a run on inputs of `size` bytes belongs on the loop's thread."""
        if self.choice is Placement.AUTO:
            return self.times.bound(size) < self.limit
        return self.choice is Placement.INLINE

    def follows(self, size: int) -> bool:
        """Whether a run on inputs of `size` bytes is short enough to be handed to a lane ahead of time."""
        return self.times.bound(size) < self.follow_limit

    def grows(self, size: int) -> bool:
        """Whether a batch on the loop's thread may grow to `size` bytes."""
        return self.choice is Placement.INLINE or self.times.grown(size) < self.limit

    def learn(self, size: int, seconds: float, now: float, *, too_long: bool) -> bool:
        """A run took so long. Says whether others of that size now belong in another place.

        One run on the loop's thread that was `too_long` for a whole turn's budget is enough to send what is
        like it back to the lanes, to be learned anew.
        """
        times = self.times
        before = self.inline(size)
        if too_long:
            times.forget(size)
        else:
            times.learn(size, seconds, now)
        return before is not self.inline(size)
