"""Policy: the device's choices among the rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

UNHURRIED: Final = 10.0
"""Seconds.

A job without a deadline is ordered as if it were due this long after its submission. So jobs with
earlier deadlines go first, but can't delay the job for ever.
"""


@dataclass(frozen=True)
class Policy:
    """The rules by which a device chooses among jobs.

    Args:
        order: The order of jobs of one priority class and tenant: "deadline" or "arrival".
        fair: Whether runners share the device's time by their shares, and tenants a runner's time
            equally.
        expire_late: Whether a job that is predicted to miss its deadline expires instead of
            starting.
        max_wait: Seconds after which a queued job is overdue; every second launch is of the overdue
            job that came first. None for never.
        keeps_lanes: Whether a run goes to the lane that its slot ran on last, if that lane is free.
        most_lanes: Lanes are added with runners, one for each slot, up to this number. None for a
            fixed number of lanes.
    """

    order: Literal["deadline", "arrival"] = "deadline"
    fair: bool = True
    expire_late: bool = True
    max_wait: float | None = None
    keeps_lanes: bool = False
    most_lanes: int | None = None

    def due(self, submitted: float, deadline: float | None) -> float:
        """Return the time that orders jobs of one class and tenant; ties go by arrival."""
        if self.order == "arrival":
            return 0.0
        return submitted + UNHURRIED if deadline is None else deadline
