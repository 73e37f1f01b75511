"""Rejection: the errors of jobs that are rejected at submit, or shed from the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoti_sched.errors import (
    AotiSchedError,
    LeaseError,
    QueueFullError,
    RunnerClosedError,
    ShedError,
)
from aoti_sched.queue.barrier import epoch_refusal
from aoti_sched.queue.runner_state import Lease, Phase

if TYPE_CHECKING:
    from aoti_sched.queue.admission.load import Load
    from aoti_sched.queue.job import Job


def for_good(job: Job, device: Load, *, moved: bool) -> AotiSchedError | None:
    """Return the error of a job that can't be accepted whatever room there is; None if it can.

    Args:
        job: The new job.
        device: The load of the job's device.
        moved: Whether the job was accepted at another replica before.
    """
    source, runner = job.source, job.source.runner
    if source is not runner or runner.phase is not Phase.OPEN:
        error = _by_its_source(job)
        if error is not None:
            return error
    never = source.load.never_fits(job.bytes) or device.never_fits(job.bytes)
    if (
        never is None
        and runner.counts_tenants
        and source is runner
        and runner.load.bounds.tenant_jobs == 0
    ):
        never = f"runner {runner.name!r} queues no jobs of a tenant"
    if never is not None and not job.bypasses_limits:
        return QueueFullError(
            f"runner {runner.name!r}: the request can never be queued: {never}. Raise the bound"
        )
    return None if job.min_epoch <= source.epoch else _by_its_epoch(job, moved)


def for_now(job: Job, full: str) -> QueueFullError:
    """Return the error of a job that has no room now.

    Args:
        job: The new job.
        full: Why there is no room.
    """
    # A full source names itself; a tenant and a device do not name the runner.
    known = full.startswith(f"{job.source.load.name} ")
    return QueueFullError(
        f"{'' if known else f'runner {job.source.name!r}: '}{full}. Send less, raise the bound, or "
        f"load with overflow='wait'"
    )


def to_wait(job: Job, crowded: str | None) -> QueueFullError | None:
    """Return the error of a job that may not wait for room; None if it may.

    Args:
        job: The new job.
        crowded: Why too many jobs wait already, if they do.
    """
    if crowded is None:
        return None
    return QueueFullError(
        f"runner {job.source.name!r}: {crowded}. Send less, or raise Limits(waiting=)"
    )


def shed(job: Job) -> ShedError:
    """Return the error of a queued job that is dropped to make room for a better one."""
    return ShedError(
        f"runner {job.source.name!r}: the queue is full, and the request was dropped for a better "
        f"one (overflow='shed'). Send less, or give it a higher priority or an earlier deadline"
    )


def _by_its_source(job: Job) -> AotiSchedError | None:
    """Return the error of a job whose lease or runner takes no new jobs; None if it does.

    The job's source is a lease, or a runner that is not open.
    """
    source, runner = job.source, job.source.runner
    if not isinstance(source, Lease):
        return RunnerClosedError(
            f"runner {runner.name!r} is {runner.phase.name.lower()}; it takes no new requests"
        )
    if runner.phase >= Phase.TERMINATED:
        return RunnerClosedError(
            f"runner {runner.name!r} is {runner.phase.name.lower()}; its leases are gone"
        )
    if source.released:
        return LeaseError(
            f"lease {source.id} of runner {runner.name!r} (slot {source.slot}) was released; take "
            f"a new one with runner.lease()"
        )
    return None


def _by_its_epoch(job: Job, moved: bool) -> AotiSchedError | None:
    runner = job.source.runner
    error = epoch_refusal(job)
    most = runner.load.bounds.jobs
    if error is None and most is not None and not moved and len(runner.awaiting) >= most:
        return QueueFullError(
            f"runner {runner.name!r}: {len(runner.awaiting)} requests wait for an epoch, the "
            f"bound is {most}. Send less, or raise the bound"
        )
    return error
