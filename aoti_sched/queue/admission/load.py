"""Load: whether there is room for one more job, and the sentence that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aoti_sched.queue.job import Job


@dataclass(frozen=True)
class Bounds:
    """Bounds of the jobs that are queued, and not running, at once. None is no bound.

    A held lease has its runner's bounds of jobs and bytes once more, for itself: see `Room.full`.

    Args:
        jobs: The most queued jobs.
        bytes: The most bytes of their inputs.
        tenant_jobs: The most jobs that one tenant of a runner has queued or at the gate.
        waiting: The most jobs that wait for room at a source.
    """

    jobs: int | None = 1024
    bytes: int | None = None
    tenant_jobs: int | None = None
    waiting: int | None = None


class Load:
    """The queued jobs, counted against the bounds.

    Args:
        name: The name of the bounds' owner, for messages.
        bounds: The bounds.

    Attributes:
        jobs: How many jobs are queued.
        bytes: The bytes of their inputs.
        exempt: How many of the jobs take no room, since they bypass limits.
    """

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
        """Return whether a job of `size` bytes would not fit even if others had left.

        Args:
            size: The bytes of the job's inputs.
            without: The queued jobs that would have left. None of them is exempt.
        """
        bounds = self.bounds
        if bounds.jobs is not None and self.jobs - self.exempt - len(without) >= bounds.jobs:
            return True
        return bounds.bytes is not None and (
            self.bytes + size - sum(job.bytes for job in without) > bounds.bytes
        )

    def refusal(self, size: int) -> str | None:
        """Return why a job with inputs of `size` bytes does not fit now; None when it does."""
        bounds = self.bounds
        if bounds.jobs is not None and self.jobs - self.exempt >= bounds.jobs:
            return (
                f"{self.name} has {self.jobs - self.exempt} jobs queued, its bound is {bounds.jobs}"
            )
        if bounds.bytes is not None and self.bytes + size > bounds.bytes:
            return (
                f"{self.name} has {self.bytes} bytes of inputs queued; {size} more exceed its "
                f"bound of {bounds.bytes}"
            )
        return None

    def never_fits(self, size: int) -> str | None:
        """Return why a job of `size` bytes does not even fit in an empty queue; None if it does."""
        bounds = self.bounds
        if bounds.bytes is not None and size > bounds.bytes:
            return f"its inputs are {size} bytes, and {self.name} queues at most {bounds.bytes}"
        if bounds.jobs is not None and bounds.jobs < 1:
            return f"{self.name} queues no jobs"
        return None

    def within_bounds(self, *leased: Load) -> bool:
        """Return whether the bounds are kept.

        Args:
            leased: The loads of held leases, which are counted here, and have their own bounds.
        """
        bounds = self.bounds
        jobs = self.jobs - self.exempt - sum(load.jobs for load in leased)
        size = self.bytes - sum(load.bytes for load in leased)
        return (bounds.jobs is None or jobs <= bounds.jobs) and (
            bounds.bytes is None or size <= bounds.bytes
        )
