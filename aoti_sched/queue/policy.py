"""Policy: the device's choices among the rules."""

from __future__ import annotations

from typing import Literal

import msgspec

UNHURRIED = 10.0
"""Seconds.

A job without a deadline is ordered as if it were due so long after its submission: behind those
that are in a hurry, but not for ever.
"""


class Policy(msgspec.Struct, frozen=True):
    """How a device chooses.

    Args:
        order: Within a priority class and tenant, what goes first: the earliest "deadline", or the
            earliest "arrival".
        fair: Runners share the device's time by their shares, and tenants a runner's time equally.
        expire_late: Drop a job when its deadline can't be met any more, by what is known of its
            runs, before it takes a lane.
        max_wait: Seconds after which a queued job is overdue: then every second launch is of the
            one that came first. None: never.
    """

    order: Literal["deadline", "arrival"] = "deadline"
    fair: bool = True
    expire_late: bool = True
    max_wait: float | None = None

    def due(self, submitted: float, deadline: float | None) -> float:
        """What orders a job within its class and tenant, the earliest first; ties go by arrival."""
        if self.order == "arrival":
            return 0.0
        return submitted + UNHURRIED if deadline is None else deadline
