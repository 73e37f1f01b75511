"""Commands: what follows from a fact, for the front to perform. They name jobs, leases and runners, and do nothing."""

from __future__ import annotations

import msgspec

from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.job import Job
from aoti_sched.queue.lease import Lease, RunnerState


class Launch(msgspec.Struct, frozen=True):
    """Run this job now, on its lane."""

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
    """This job's deadline has passed."""

    job: Job


class Revoke(msgspec.Struct, frozen=True):
    """This accepted job will not run: its runner was terminated."""

    job: Job
    error: AotiSchedError


class Drained(msgspec.Struct, frozen=True):
    """Nothing of this runner is queued, running or held any more; it may be removed."""

    runner: RunnerState


class WakeAt(msgspec.Struct, frozen=True):
    """Call `tick` at this time; it replaces the time asked for before."""

    at: float


Command = Launch | Grant | Reject | Expire | Revoke | Drained | WakeAt
