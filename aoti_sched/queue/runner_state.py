"""Runners and leases: the sources that jobs draw their slots from."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Final

from aoti_sched.queue.admission.load import Load
from aoti_sched.queue.admission.shedding import ShedHeap
from aoti_sched.queue.batching import Batching, BatchQueue
from aoti_sched.queue.histogram import Histograms
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import Job, JobState, Priority
from aoti_sched.queue.selection.accounts import Account, FairClass
from aoti_sched.queue.selection.backlog import Backlog
from aoti_sched.queue.selection.job_queue import JobQueue
from aoti_sched.queue.selection.placement import Placing
from aoti_sched.queue.selection.sorted_jobs import SortedJobs


class Phase(enum.IntEnum):
    """The phases of a runner, from open to drained."""

    OPEN = 0
    DRAINING = 1  # takes no new jobs, finishes all that it accepted
    TERMINATED = 2  # takes no new jobs, finishes only running jobs
    DRAINED = 3  # has no job and no held lease; may be removed


@dataclass
class Counters:
    """Running totals of one runner; seconds are on the caller's clock."""

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    rejected: int = 0
    expired: int = 0
    cancelled: int = 0
    revoked: int = 0
    shed: int = 0
    withdrawn: int = 0
    """Jobs that were taken out, to be submitted again at another replica."""
    queue_seconds: float = 0.0
    run_seconds: float = 0.0
    wasted_seconds: float = 0.0
    """Run time of jobs whose caller had left, and of batches that failed."""
    inline: int = 0
    """Jobs that ran on the loop's own thread."""
    batches: int = 0
    """Launches of several jobs as one."""
    batched: int = 0
    """Jobs that were launched in batches."""
    retried: int = 0
    """Jobs that were retried alone, since their batch had failed."""
    in_time: int = 0
    """The completed jobs that ended by their deadline, or had none."""

    def as_dict(self) -> dict[str, Any]:
        """Return the totals by name. `dataclasses.asdict` copies each of them, and takes longer."""
        return {name: getattr(self, name) for name in _COUNTERS}


_COUNTERS: Final = tuple(field.name for field in fields(Counters))

UNHEALTHY: Final = 5
"""The number of runs in a row that must fail before a runner is failing."""


class Source:
    """A record that jobs draw slots from: a runner with all its slots, or a held lease with one.

    Attributes:
        runner: The runner that owns the slots.
        queue: Admitted jobs, which `load` counts against the bounds.
        gate: Jobs that wait for room.
        free: Free slots, a stack: the slot used last, whose memory is warm, is used next.
        live: Jobs that are waiting, queued or running, those included whose caller has left.
        closed: Whether a barrier is closed, and no slot is given out.
        halted: Endings under way, during which no slot is given out either.
        open_for_next: Lanes that run a short job of this source, and may be handed its next ones.
        arrivals: The queued jobs by time of submission, where jobs may become overdue.
    """

    __deletable__ = ["runner"]  # noqa: RUF012 -- mypyc reads this list in the source
    __slots__ = (
        "arrivals",
        "closed",
        "epoch",
        "free",
        "gate",
        "halted",
        "live",
        "load",
        "name",
        "open_for_next",
        "queue",
        "runner",
    )

    def __init__(
        self, name: str, slots: list[int], epoch: int, load: Load, queue: JobQueue
    ) -> None:
        self.name = name
        self.free = slots
        self.gate = JobQueue()
        self.queue = queue
        self.arrivals = SortedJobs()
        self.load = load
        self.live = 0
        self.epoch = epoch
        self.closed = False
        self.halted = 0
        self.open_for_next: list[int] = []
        self.runner: RunnerState

    @property
    def waits(self) -> int:
        """Return how many jobs wait for room."""
        return len(self.gate)


class EpochJobs:
    """Jobs by the epoch that they ask for; those of one epoch in the order in which they came."""

    __slots__ = ("_by_epoch", "_size")

    def __init__(self) -> None:
        # OrderedDict, since its first key is found in O(1) after many deletions
        self._by_epoch: dict[int, OrderedDict[int, Job]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, job: Job) -> None:
        """Keep a job until it is removed; its id must not change until then."""
        jobs = self._by_epoch.get(job.min_epoch)
        if jobs is None:
            jobs = self._by_epoch[job.min_epoch] = OrderedDict()
        jobs[job.id] = job
        self._size += 1

    def remove(self, job: Job) -> bool:
        """Remove a job, and return whether it was kept here."""
        jobs = self._by_epoch.get(job.min_epoch)
        if jobs is None or jobs.pop(job.id, None) is None:
            return False
        if not jobs:
            del self._by_epoch[job.min_epoch]
        self._size -= 1
        return True

    def within(self, above: int, last: float) -> Iterator[Job]:
        """Find jobs that ask for an epoch after `above` and up to `last`, one by one."""
        for epoch, jobs in self._by_epoch.items():
            if above < epoch <= last:
                yield from jobs.values()

    def first(self, above: int, last: float) -> Job | None:
        """Return the first job of `within`; None when there is none."""
        for job in self.within(above, last):
            return job
        return None


class RunnerState(Source):
    """A runner's record. Its load counts the jobs of its leases, too.

    Attributes:
        published: The highest epoch so far.
        aside: Whether the barrier is closed for the other record of the model (`weight_turns.py`).
        awaiting: Jobs whose epoch is yet to come, or that have not moved to the gate since.
        epoch_bound: Jobs at the gate or in the queue that asked for an epoch after the first.
        batch_queue: The batchable jobs; None where jobs always run alone.
        width: Cores that a run takes on a lane.
        accounts: The runner's share of the device's time, by priority class.
        tenants: The tenants' shares of the runner's time, by priority class.
        tenant_jobs: Jobs of each tenant that are queued or at the gate, where these are bounded.
        tenant_lines: Jobs that wait before the gate since their tenant's bound is reached.
        lined: How many they are.
        worst: Queued jobs that may be shed, the worst first; `worst_of` has them by tenant.
        failures: Failed runs in a row.
        last_lanes: By slot, the lane that it ran on last, where slots keep their lanes. A second
            record has the same slots, and shares this.
        memory: The record of the memory that the runner's model has on the device.
        used: When it last ran or gave out a slot, where runners may be evicted.
        histograms: How long jobs waited and ran, by how they ended and their priority.
        rejections: Rejected jobs by the name of the error.
        number: The number of the runner on its device, where facts are recorded; -1 otherwise.
    """

    __slots__ = (
        "accounts",
        "aside",
        "awaiting",
        "backlog",
        "backlog_of",
        "batch_queue",
        "counters",
        "counts_tenants",
        "epoch_bound",
        "failures",
        "histograms",
        "last_lanes",
        "leases",
        "lined",
        "memory",
        "number",
        "phase",
        "placing",
        "predicts",
        "published",
        "reached",
        "rejections",
        "share",
        "sheds",
        "slots",
        "tenant_jobs",
        "tenant_lines",
        "tenants",
        "used",
        "width",
        "worst",
        "worst_of",
    )

    def __init__(
        self,
        name: str,
        slots: int,
        load: Load,
        epoch: int,
        placing: Placing,
        accounts: tuple[Account, ...],
        memory: Holding,
        *,
        batching: Batching | None = None,
        width: int = 1,
        share: float = 1.0,
        sheds: bool = False,
        predicts: bool = False,
        tenants: tuple[FairClass, ...] | None = None,
    ) -> None:
        self.tenants = tenants or tuple(FairClass() for _ in Priority)
        queue = JobQueue(self.tenants if accounts else ())
        super().__init__(name, list(reversed(range(slots))), epoch, load, queue)
        self.batch_queue = None if batching is None else BatchQueue(batching, self.queue)
        self.runner = self
        self.slots = slots
        self.accounts = accounts
        self.width = width
        self.share = share
        self.counts_tenants = load.bounds.tenant_jobs is not None
        self.tenant_jobs: dict[Hashable, int] = {}
        self.tenant_lines: dict[Hashable, OrderedDict[int, Job]] = {}
        self.lined = 0
        self.backlog = Backlog()
        self.backlog_of: dict[Hashable, Backlog] = {}  # by tenant
        self.predicts = predicts
        self.sheds = sheds
        self.worst = ShedHeap()
        self.worst_of: dict[Hashable, ShedHeap] = {}
        self.failures = 0
        self.leases: dict[int, Lease] = {}
        self.last_lanes: dict[int, int] = {}
        self.phase = Phase.OPEN
        self.counters = Counters()
        self.histograms = Histograms(len(JobState), len(Priority))
        self.rejections: dict[str, int] = {}
        self.placing = placing
        self.published = epoch
        self.reached = False
        self.aside = False
        self.awaiting = EpochJobs()
        self.epoch_bound = EpochJobs()
        self.memory = memory
        self.used = -math.inf
        self.number = -1

    def let_go(self) -> None:
        """Drop the runner's reference to itself, so that a removed runner is in no cycle.

        No job may be submitted to it afterwards.
        """
        del self.runner

    def waiting(self) -> list[Job]:
        """Return the jobs that wait for room, at the gate and in lines before it."""
        lines = [job for line in self.tenant_lines.values() for job in line.values()]
        return [*self.gate.jobs(), *lines]

    @property
    def waits(self) -> int:
        """Return how many jobs wait for room, at the gate and in lines before it."""
        return len(self.gate) + self.lined

    @property
    def withdrawable(self) -> int:
        """Return how many jobs `withdraw` takes out: all that wait or are queued here.

        Jobs of held leases and jobs that bypass limits stay.
        """
        return len(self.awaiting) + self.waits + len(self.queue) - self.load.exempt

    @property
    def busy(self) -> bool:
        """Return whether a job waits for room, is queued or runs, or a lease is held.

        Jobs that await an epoch do not count.
        """
        return self.live > len(self.awaiting) or bool(self.leases)

    @property
    def idle(self) -> bool:
        """Return whether no job or lease of the runner is left, and no update is under way."""
        updating = self.closed and self.memory.is_here and not self.aside
        return not (self.live or self.leases or updating)

    @property
    def home(self) -> bool:
        """Return whether every slot is free."""
        return len(self.free) == self.slots


class Lease(Source):
    """An exclusive claim on one slot of a runner, for several runs in turn.

    A released lease takes no new jobs. Its slot is free when the last accepted job has ended.
    """

    __slots__ = ("granted", "holder", "id", "released", "slot")

    def __init__(
        self, lease_id: int, runner: RunnerState, slot: int, holder: Any, granted: float
    ) -> None:
        load = Load(f"lease {lease_id} of runner {runner.name!r}", runner.load.bounds)
        super().__init__(runner.name, [slot], runner.epoch, load, JobQueue())
        self.runner = runner
        self.id = lease_id
        self.slot = slot
        self.holder = holder
        self.granted = granted
        self.released = False


def may_share_run(job: Job) -> bool:
    """Return whether others may run with a job that has a key.

    Such a job draws its slot from a runner that makes batches, and not from a lease.
    """
    return job.source is job.source.runner and job.source.runner.batch_queue is not None
