"""Commands: plain values that follow from a fact, for the dispatcher to perform."""

from __future__ import annotations

from typing import Any

import msgspec

from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Lease, RunnerState


class Launch(msgspec.Struct, frozen=True):
    """Run this job, with its `members` if any: on its lane, or inline when `job.inline` is set."""

    job: Job


class Grant(msgspec.Struct, frozen=True):
    """Give this lease to the job that asked for one."""

    job: Job
    lease: Lease


class Reject(msgspec.Struct, frozen=True):
    """Admission refused this job. Only `submit` returns this command."""

    job: Job
    error: AotiSchedError


class Expire(msgspec.Struct, frozen=True):
    """This job's deadline has passed, or can't be met.

    Args:
        job: The job.
        takes: The predicted seconds of the run, which are more than are left; None when the
            deadline has passed.
    """

    job: Job
    takes: float | None = None


class Shed(msgspec.Struct, frozen=True):
    """This queued job was dropped to make room for a better one; the error says so."""

    job: Job
    error: AotiSchedError


class Revoke(msgspec.Struct, frozen=True):
    """This accepted job will not run; the error says why."""

    job: Job
    error: AotiSchedError


class Withdraw(msgspec.Struct, frozen=True):
    """This accepted job was taken out, to be submitted at another replica; its caller waits on."""

    job: Job


class Drained(msgspec.Struct, frozen=True):
    """This runner has no job and no held lease any more; it may be removed."""

    runner: RunnerState


class BarrierReached(msgspec.Struct, frozen=True):
    """This runner's barrier is closed and every slot is free: its weights may be exchanged."""

    runner: RunnerState


class Turn(msgspec.Struct, frozen=True):
    """Exchange the weights of this runner's container, then report `turned`.

    Every slot of the runner's two records is free.
    """

    runner: RunnerState


class Failing(msgspec.Struct, frozen=True):
    """The last `UNHEALTHY` runs of this runner have all failed."""

    runner: RunnerState


class Claimed(msgspec.Struct, frozen=True):
    """The memory that this `Claim` reserves is there."""

    claim: Any


class Park(msgspec.Struct, frozen=True):
    """Evict this runner, whose slots are all free: free its weights, then report `parked`."""

    runner: RunnerState


class Return(msgspec.Struct, frozen=True):
    """Restore this runner's weights, for which there is room, then report `returned`."""

    runner: RunnerState


class NextTurn(msgspec.Struct, frozen=True):
    """Call `turn` in the loop's next turn."""


class GoOn(msgspec.Struct, frozen=True):
    """Call `go_on` in the loop's next turn, to continue what an earlier fact left."""


class WakeAt(msgspec.Struct, frozen=True):
    """Call `tick` at this time, which replaces the time of an earlier `WakeAt`."""

    at: float


Command = (
    Launch
    | Grant
    | Reject
    | Expire
    | Shed
    | Revoke
    | Withdraw
    | Drained
    | BarrierReached
    | Turn
    | Failing
    | Claimed
    | Park
    | Return
    | NextTurn
    | GoOn
    | WakeAt
)
