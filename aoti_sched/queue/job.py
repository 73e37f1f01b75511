"""Job: one `run` call on its way, and the table of everything that can happen to it."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Final

from aoti_sched.queue.selection.accounts import Account

if TYPE_CHECKING:
    from aoti_sched.queue.runner_state import Source
    from aoti_sched.queue.selection.job_queue import Bucket
    from aoti_sched.queue.selection.sorted_jobs import Node


class Priority(enum.IntEnum):
    """Policy class of a request.

    A higher class always goes first; within a class, the earliest deadline.
    """

    HIGH = 0
    NORMAL = 1
    LOW = 2


class JobState(enum.IntEnum):
    """The states of a job. In the first four states a job is alive; the others are final."""

    NEW = 0  # not yet submitted
    WAITING = 1  # held until admission has room (overflow="wait"), or until its epoch is published
    QUEUED = 2
    RUNNING = 3
    DONE = 4
    FAILED = 5
    REJECTED = 6
    EXPIRED = 7
    CANCELLED = 8
    REVOKED = 9  # its runner was terminated, an update aborted it, or its epoch was rolled back
    SHED = 10  # dropped from a full queue to make room for a better job
    WITHDRAWN = 11  # taken out, to be submitted again at another replica


class Fact(enum.IntEnum):
    """The facts that can happen to one job."""

    REJECT = 0
    HOLD = 1
    ADMIT = 2
    LAUNCH = 3
    SUCCEED = 4
    FAIL = 5
    EXPIRE = 6
    CANCEL = 7
    REVOKE = 8
    SHED = 9
    WITHDRAW = 10


TRANSITIONS: Final[dict[JobState, dict[Fact, JobState]]] = {
    JobState.NEW: {
        Fact.REJECT: JobState.REJECTED,
        Fact.EXPIRE: JobState.EXPIRED,
        Fact.HOLD: JobState.WAITING,
        Fact.ADMIT: JobState.QUEUED,
    },
    JobState.WAITING: {
        Fact.ADMIT: JobState.QUEUED,
        Fact.EXPIRE: JobState.EXPIRED,
        Fact.CANCEL: JobState.CANCELLED,
        Fact.REVOKE: JobState.REVOKED,
        Fact.WITHDRAW: JobState.WITHDRAWN,
    },
    JobState.QUEUED: {
        Fact.LAUNCH: JobState.RUNNING,
        Fact.EXPIRE: JobState.EXPIRED,
        Fact.CANCEL: JobState.CANCELLED,
        Fact.REVOKE: JobState.REVOKED,
        Fact.SHED: JobState.SHED,
        Fact.WITHDRAW: JobState.WITHDRAWN,
    },
    # A running job that expires or is cancelled ends for its caller at once. Its lane and slot are
    # released by the completion, which finds the job ended and leaves its state as it is.
    JobState.RUNNING: {
        Fact.SUCCEED: JobState.DONE,
        Fact.FAIL: JobState.FAILED,
        Fact.EXPIRE: JobState.EXPIRED,
        Fact.CANCEL: JobState.CANCELLED,
    },
    JobState.DONE: {},
    JobState.FAILED: {},
    JobState.REJECTED: {},
    JobState.EXPIRED: {Fact.SUCCEED: JobState.EXPIRED, Fact.FAIL: JobState.EXPIRED},
    JobState.CANCELLED: {Fact.SUCCEED: JobState.CANCELLED, Fact.FAIL: JobState.CANCELLED},
    JobState.REVOKED: {},
    JobState.SHED: {},
    JobState.WITHDRAWN: {},
}
"""Every transition of a job. A fact that is not in its state's row is illegal."""


Moment = tuple[float, str]
"""A time and the name of the fact that happened to a job then."""


class IllegalFactError(Exception):
    """A fact that can't happen in the present state: a bug of the caller. Nothing was changed.

    Attributes:
        story: What had happened to the job, as (time, fact), in order; empty where no job is meant.
        record: The last facts of the device (a `facts.Record`), where they are recorded.
    """

    def __init__(self, message: str, story: tuple[Moment, ...] = ()) -> None:
        told = ", ".join(f"{fact} at {time:.15g}" for time, fact in story)
        super().__init__(f"{message}. Its story: {told}" if told else message)
        self.story = story
        self.record: Any = None


class Job:
    """One request. The queue owns every field except `payload`, which belongs to the caller.

    Times are seconds on the caller's clock.

    Args:
        source: What the job draws its slot from: its runner, or a held lease.
        priority: The priority class.
        deadline: When the job expires, on the same clock; None for never.
        bytes: Size of the inputs.
        is_lease_request: Whether the job asks for a lease, and not for a run.
        payload: The caller's own; no rule reads it.
        min_epoch: The job runs on the weights of this epoch or a later one.
        rows: Rows of the inputs, which count against a batch's `max_rows`.
        tokens: The longest size of a row that is padded in a batch; counts against `max_tokens`.
        key: Jobs of one runner with an equal key may run as one batch; None for alone.
        bypasses_limits: Whether no bound holds the job back. Such a job is the library's own.
        tenant: A runner's tenants share its device time equally.
        pinned: Whether the job runs on the weights of `min_epoch`, and no later ones.

    Attributes:
        lane: Where the job runs; `LOOP` for the loop's own thread, and then `inline` is set.
        members: Of a batch's leader: all jobs of the batch, the leader first.
        size: Bytes of all inputs of the run that the job leads, padding included.
        to_retry: Members of a failed batch that are still to be retried on the same lane.
        retrying: Whether the job is being retried, alone, since its batch failed.
        batch: How many jobs ran as one with this job.
        expected: Core seconds that the run was expected to take when the job was queued.
        account: The tenant's account, which `expected` is charged to at the launch.
        bucket: The bucket of a job that is queued or waits at a gate.
        node: The job's node in the bucket.
        age_node: The job's node among the source's queued jobs by age, where jobs may become
            overdue.
        recorded: Facts whose time no field keeps, with the state before each; see `story`.
    """

    __slots__ = (
        "account",
        "age_node",
        "batch",
        "bucket",
        "bypasses_limits",
        "bytes",
        "deadline",
        "due",
        "epoch",
        "expected",
        "finished",
        "id",
        "inline",
        "is_lease_request",
        "key",
        "lane",
        "launched",
        "members",
        "min_epoch",
        "node",
        "overdue",
        "payload",
        "pinned",
        "priority",
        "probing",
        "recorded",
        "retrying",
        "rows",
        "size",
        "slot",
        "source",
        "started",
        "state",
        "submitted",
        "tenant",
        "timeout",
        "to_retry",
        "tokens",
    )

    def __init__(
        self,
        source: Source,
        priority: int = Priority.NORMAL,
        deadline: float | None = None,
        bytes: int = 0,
        is_lease_request: bool = False,
        payload: Any = None,
        min_epoch: int = 0,
        rows: int = 1,
        key: Hashable = None,
        bypasses_limits: bool = False,
        tenant: Hashable = None,
        tokens: int = 1,
        pinned: bool = False,
    ) -> None:
        self.source = source
        self.priority = priority
        self.deadline = deadline
        self.bytes = bytes
        self.is_lease_request = is_lease_request
        self.payload = payload
        self.min_epoch = min_epoch
        self.rows = rows
        self.key = key
        self.bypasses_limits = bypasses_limits
        self.tenant = tenant
        self.tokens = tokens
        self.pinned = pinned
        self.timeout: float | None = None  # as the caller gave it, for messages

        self.id = -1
        self.state = JobState.NEW
        self.lane = -1
        self.inline = False
        self.slot = -1
        self.epoch = 0
        self.submitted = 0.0
        self.launched = 0.0  # first, in a batch or alone
        self.started = 0.0
        self.finished = 0.0
        self.due = 0.0  # what orders jobs of one class and tenant: see `Policy.due`
        self.size = 0
        self.members: tuple[Job, ...] = ()
        self.to_retry: tuple[Job, ...] = ()
        self.retrying = False
        self.batch = 1
        self.expected = 0.0
        self.account: Account | None = None
        self.bucket: Bucket | None = None
        self.node: Node | None = None
        self.age_node: Node | None = None
        self.recorded: tuple[tuple[float, Fact, JobState], ...] = ()  # see `story`
        self.overdue = False  # launched out of order, since it had waited too long
        self.probing = False  # predicted to be late, and run anyway to correct the prediction

    def resubmitted(self) -> Job:
        """Return a new job of the same request, for another replica.

        The new job has what the caller asked for, and nothing of what has happened to this job.
        """
        job = Job(
            source=self.source,
            priority=self.priority,
            deadline=self.deadline,
            bytes=self.bytes,
            is_lease_request=self.is_lease_request,
            payload=self.payload,
            min_epoch=self.min_epoch,
            rows=self.rows,
            key=self.key,
            bypasses_limits=self.bypasses_limits,
            tenant=self.tenant,
            tokens=self.tokens,
            pinned=self.pinned,
        )
        job.timeout = self.timeout
        return job

    @property
    def names_epoch(self) -> bool:
        """Return whether a change of the epoch may concern the job, while the job is queued."""
        return self.min_epoch > 1 or self.pinned

    def happens(self, fact: Fact) -> None:
        """Move to the next state by the table.

        Raises:
            IllegalFactError: The fact can't happen in the present state. Nothing was changed.
        """
        following = TRANSITIONS[self.state].get(fact)
        if following is None:
            raise self.illegal(
                f"job {self.id} is {self.state.name}: {fact.name} can't happen to it"
            )
        self.state = following

    def happens_at(self, fact: Fact, now: float) -> None:
        """Do as `happens`, and record a fact whose time no field keeps."""
        before = self.state
        self.happens(fact)
        self.recorded += ((now, fact, before),)

    def illegal(self, message: str) -> IllegalFactError:
        """Return the error of a fact that can't happen to this job, with the job's story."""
        return IllegalFactError(message, self.story())

    def story(self) -> tuple[Moment, ...]:
        """Return what has happened to the job so far, as (time, fact), in order.

        The facts that each request has are not recorded: their times are the job's own fields.
        The rarer facts are recorded. No job has more than a few, since the table has no way back.
        """
        if self.id < 0:
            return ()
        moments: list[Moment] = [(self.submitted, "SUBMIT")]
        recorded = self.recorded
        first = recorded[0][2] if recorded else self.state
        if first not in (JobState.NEW, JobState.WAITING):
            moments.append((self.submitted, Fact.ADMIT.name))
        listed = self.slot < 0  # nothing was launched
        for time, fact, before in recorded:
            if not listed and before is JobState.RUNNING:
                moments.append((self.started, Fact.LAUNCH.name))
                listed = True
            moments.append((time, fact.name))
        if not listed:
            moments.append((self.started, Fact.LAUNCH.name))
        if self.state in (JobState.DONE, JobState.FAILED):
            end = Fact.SUCCEED if self.state is JobState.DONE else Fact.FAIL
            moments.append((self.finished, end.name))
        return tuple(moments)


def row_size(job: Job) -> int:
    """Return the bytes of one row of a job that has rows, at least 1: its length, for padding."""
    return max(1, -(-job.bytes // job.rows))
