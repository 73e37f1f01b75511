"""Admission: whether there is room for one more job, and the sentence that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from aoti_sched.queue.job import Job


class Bounds(msgspec.Struct, frozen=True):
    """How much may be queued (not running) at once. None is no bound; `bytes` counts the inputs.

    `tenant_jobs` bounds what one tenant of a runner has queued or waiting for room. A held lease
    has its runner's bounds of jobs and bytes once more, for itself: see `Room.full`.
    """

    jobs: int | None = 1024
    bytes: int | None = None
    tenant_jobs: int | None = None


class Load:
    """What is queued, counted against the bounds. `exempt` counts jobs that take no room."""

    __slots__ = ("bounds", "bytes", "exempt", "jobs", "name")

    def __init__(self, name: str, bounds: Bounds) -> None:
        self.name = name
        self.bounds = bounds
        self.jobs = 0
        self.bytes = 0
        self.exempt = 0

    def add(self, job: Job) -> None:
        self.jobs += 1
        self.bytes += job.bytes
        self.exempt += job.bypasses_limits

    def remove(self, job: Job) -> None:
        self.jobs -= 1
        self.bytes -= job.bytes
        self.exempt -= job.bypasses_limits

    def lacks_room(self, size: int, without: Sequence[Job]) -> bool:
        """Whether a job of `size` bytes would not fit even without these, of whom none is
        exempt.
        """
        bounds = self.bounds
        if bounds.jobs is not None and self.jobs - self.exempt - len(without) >= bounds.jobs:
            return True
        return bounds.bytes is not None and (
            self.bytes + size - sum(job.bytes for job in without) > bounds.bytes
        )

    def refusal(self, size: int) -> str | None:
        """Why a job with inputs of `size` bytes does not fit now; None when it does."""
        bounds = self.bounds
        if bounds.jobs is not None and self.jobs - self.exempt >= bounds.jobs:
            return (
                f"{self.name} has {self.jobs - self.exempt} jobs queued, its bound is {bounds.jobs}"
            )
        if bounds.bytes is not None and self.bytes + size > bounds.bytes:
            return (
                f"{self.name} has {self.bytes} bytes of inputs queued; "
                f"{size} more exceed its bound of {bounds.bytes}"
            )
        return None

    def never_fits(self, size: int) -> str | None:
        """Why a job of `size` bytes could not even enter an empty queue; None when it could."""
        bounds = self.bounds
        if bounds.bytes is not None and size > bounds.bytes:
            return f"its inputs are {size} bytes, {self.name} takes {bounds.bytes} in all"
        if bounds.jobs is not None and bounds.jobs < 1:
            return f"{self.name} queues no jobs"
        return None

    def within_bounds(self, *leased: Load) -> bool:
        """Whether the bounds are kept.

        What leases queue is bounded by themselves, and counted here too.
        """
        bounds = self.bounds
        jobs = self.jobs - self.exempt - sum(load.jobs for load in leased)
        size = self.bytes - sum(load.bytes for load in leased)
        return (bounds.jobs is None or jobs <= bounds.jobs) and (
            bounds.bytes is None or size <= bounds.bytes
        )
