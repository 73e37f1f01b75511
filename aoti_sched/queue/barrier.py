"""Barrier: the point between two epochs, and the epochs that a request may ask for.

While a runner's barrier is closed, the runner gives out no slot, and queued jobs wait in their
order. Held leases keep their slots, and finish their runs on the epoch that they began with. When
every slot is free, the constants may be exchanged. Then the barrier opens on another epoch, or on
the same after a failed exchange.

Epochs are numbered in the order of their publication, and a number is never used twice. A rollback
returns to the number before, and the next set that is published gets a new number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoti_sched.errors import EpochError
from aoti_sched.queue.job import IllegalFactError
from aoti_sched.queue.runner_state import Phase

if TYPE_CHECKING:
    from aoti_sched.queue.job import Job
    from aoti_sched.queue.runner_state import RunnerState


def close(runner: RunnerState) -> None:
    """Close a runner's barrier: from now on, only runs of held leases start."""
    if runner.closed or runner.phase is Phase.DRAINED:
        state = "its barrier is closed already" if runner.closed else "it is drained"
        raise IllegalFactError(f"runner {runner.name!r}: {state}")
    runner.closed = True


def reach(runner: RunnerState) -> bool:
    """Return True once when a closed barrier is reached: every slot is free since this fact."""
    if runner.closed and not runner.reached and not runner.halted and runner.home:
        runner.reached = True
        return True
    return False


def open_on(runner: RunnerState, epoch: int | None) -> None:
    """Open a runner's barrier on an epoch; None keeps the present epoch."""
    if not runner.closed:
        raise IllegalFactError(f"runner {runner.name!r}: its barrier is open")
    if epoch is not None:
        if not runner.reached:
            raise IllegalFactError(f"runner {runner.name!r}: slots are out, its epoch can't change")
        if not 1 <= epoch <= runner.published + 1:
            raise IllegalFactError(
                f"runner {runner.name!r}: epoch {epoch} does not follow on {runner.published}"
            )
        runner.epoch = epoch
        runner.published = max(runner.published, epoch)
    runner.closed = runner.reached = False


def epoch_refusal(job: Job) -> EpochError | None:
    """Return the error of a job that asks for an impossible epoch; None if it can have it.

    A job can have an epoch that is yet to be published.
    """
    source, runner = job.source, job.source.runner
    if source is not runner:
        return EpochError(
            f"runner {runner.name!r}: a lease that was granted at epoch {source.epoch} stays "
            f"there, and the request asks for epoch {job.min_epoch}. Release the lease and take "
            "a new one"
        )
    return rolled_back(job) if job.min_epoch <= runner.published else None


def rolled_back(job: Job) -> EpochError:
    """Return the error of a job that asks for an epoch that was rolled back."""
    runner = job.source.runner
    return EpochError(
        f"runner {runner.name!r}: epoch {job.min_epoch} was rolled back, epoch {runner.epoch} "
        f"serves. Ask for min_epoch={runner.epoch}, or publish the weights again"
    )
