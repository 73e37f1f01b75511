"""Commands: what follows from a fact, for the front to perform. They name jobs, leases and runners, and do nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.job import Job
from aoti_sched.queue.runner_state import Lease, RunnerState


class Launch(msgspec.Struct, frozen=True):
    """Run this job now, with all its `members` when it has any: on its lane, or, when `job.inline` is set, right here."""

    job: Job


class Grant(msgspec.Struct, frozen=True):
    """This job asked for a lease; here it is."""

    job: Job
    lease: Lease


class Reject(msgspec.Struct, frozen=True):
    """Admission refused this job. Only `submit` answers so."""

    job: Job
    error: AotiSchedError


class Expire(msgspec.Struct, frozen=True):
    """This job's deadline has passed; or, when the run `takes` longer (in seconds) than is left, it can't be met any more."""

    job: Job
    takes: float | None = None


class Shed(msgspec.Struct, frozen=True):
    """This queued job makes room for a better one; the error says so."""

    job: Job
    error: AotiSchedError


class Revoke(msgspec.Struct, frozen=True):
    """This accepted job will not run; the error says why."""

    job: Job
    error: AotiSchedError


class Withdraw(msgspec.Struct, frozen=True):
    """This accepted job was taken out; its caller waits on, for what becomes of another in its place."""

    job: Job


class Drained(msgspec.Struct, frozen=True):
    """Nothing of this runner is queued, running or held any more; it may be removed."""

    runner: RunnerState


class BarrierReached(msgspec.Struct, frozen=True):
    """This runner's barrier is closed, every slot is home and nothing launches: its constants may be swapped."""

    runner: RunnerState


class Failing(msgspec.Struct, frozen=True):
    """The last `UNHEALTHY` runs of this runner have all failed."""

    runner: RunnerState


class Claimed(msgspec.Struct, frozen=True):
    """The memory that this `Claim` asked for is there."""

    claim: Any


class Park(msgspec.Struct, frozen=True):
    """Every slot of this runner is home and nothing launches: free its constants, and say that it is `parked`."""

    runner: RunnerState


class Return(msgspec.Struct, frozen=True):
    """There is room for this runner's constants: bring them back, and say that it has `returned`."""

    runner: RunnerState


class NextTurn(msgspec.Struct, frozen=True):
    """Call `turn` in the loop's next turn."""


class GoOn(msgspec.Struct, frozen=True):
    """Call `go_on` in the loop's next turn: there was more to do than one fact does."""


class WakeAt(msgspec.Struct, frozen=True):
    """Call `tick` at this time; it replaces the time asked for before."""

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
    | Failing
    | Claimed
    | Park
    | Return
    | NextTurn
    | GoOn
    | WakeAt
)
