"""Barrier: the point between two epochs, and what a request may ask of an epoch.

A closed barrier gives out no slot, so what is queued waits in its order; held leases keep theirs and finish
their runs on the epoch they began with. Once every slot is home, the constants may be exchanged, and the
barrier opens on another epoch, or, when nothing came of it, on the same.

Epochs are numbered in the order of their publication, and a number is never used twice: a rollback goes back to
the number before, and the next set published gets one that was never seen.
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
    """Nothing of this runner starts any more but the runs of leases that are held."""
    if runner.closed or runner.phase is Phase.DRAINED:
        state = "its barrier is closed already" if runner.closed else "it is drained"
        raise IllegalFactError(f"runner {runner.name!r}: {state}")
    runner.closed = True


def reach(runner: RunnerState) -> bool:
    """Whether a closed barrier has, by the last fact, seen every slot come home; true once."""
    if runner.closed and not runner.reached and not runner.halted and runner.home:
        runner.reached = True
        return True
    return False


def open_on(runner: RunnerState, epoch: int | None) -> None:
    """Let it start again, on this epoch; None is the one it had."""
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
    """Return why a job can't have a later epoch than its source's; None when it can."""
    source, runner = job.source, job.source.runner
    wanted = job.min_epoch
    if source is not runner:
        return EpochError(
            f"runner {runner.name!r}: a lease that was granted at epoch {source.epoch} stays there, and the request asks "
            f"for epoch {wanted}; release the lease and take a new one"
        )
    return rolled_back(job) if wanted <= runner.published else None


def rolled_back(job: Job) -> EpochError:
    """Return the error of a job that asks for an epoch that was rolled back."""
    runner = job.source.runner
    return EpochError(
        f"runner {runner.name!r}: epoch {job.min_epoch} was rolled back, epoch {runner.epoch} serves; "
        f"ask for min_epoch={runner.epoch}, or publish the weights anew"
    )
