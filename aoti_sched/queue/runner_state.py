"""Leases: who holds which slot. A source gives out its slots; a held lease is a source of one slot."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aoti_sched.queue.admission.load import Load
from aoti_sched.queue.admission.shedding import Worst
from aoti_sched.queue.batching import Batching, Company
from aoti_sched.queue.job import Job, Priority
from aoti_sched.queue.selection.fairness import Account, Turns
from aoti_sched.queue.selection.forecast import Backlog
from aoti_sched.queue.selection.job_queue import NOBODY, InOrder, JobQueue
from aoti_sched.queue.selection.placement import Placing

if TYPE_CHECKING:
    from aoti_sched.queue.memory import Holding


class Phase(enum.IntEnum):
    """How far a runner is on its way out."""

    OPEN = 0
    DRAINING = 1  # takes no new work, finishes what it accepted
    TERMINATED = 2  # takes no new work, finishes only what runs
    DRAINED = 3  # nothing queued, running or held; may be removed


class Counters(msgspec.Struct):
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
    """Jobs that were taken out, to be submitted anew at another replica."""
    queue_seconds: float = 0.0
    run_seconds: float = 0.0
    wasted_seconds: float = 0.0
    """Run time of jobs whose caller had left, by cancellation or timeout, and of batches that failed."""
    inline: int = 0
    """Jobs that ran on the loop's own thread."""
    batches: int = 0
    """Launches of several jobs as one."""
    batched: int = 0
    """Jobs that were in them."""
    retried: int = 0
    """Jobs that were run again by themselves, since their batch had failed."""


UNHEALTHY = 5
"""Failed runs in a row that make a runner a failing one."""


class Source:
    """What jobs draw slots from: a runner with all its slots, or a held lease with its one.

    `queue` holds what was admitted, `load` counts it against its bounds; `gate` holds what waits for room.
    `free` is a stack, so that the slot used last, whose memory is warm, is used next. `live` counts the
    jobs that are waiting, queued or running here, callers that left a running job included. A `closed`
    source gives out no slot, nor does one that is `halted`: of some of its jobs it is settled that they end otherwise, and not all have yet.
    `runner` is the one whose slots they are. `followed` are lanes that run a short job of this source and may be given its next.
    `arrivals` is its queue by the time of submission, kept where jobs may become overdue.
    """

    __deletable__ = ["runner"]  # noqa: RUF012 -- mypyc reads this list in the source
    __slots__ = (
        "arrivals",
        "closed",
        "epoch",
        "followed",
        "free",
        "gate",
        "halted",
        "live",
        "load",
        "name",
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
        self.arrivals = InOrder()
        self.load = load
        self.live = 0
        self.epoch = epoch
        self.closed = False
        self.halted = 0
        self.followed: list[int] = []
        self.runner: RunnerState


def _accounts_in(tenants: Sequence[Turns]) -> Callable[[int, Hashable], Account]:
    """Return a function that gives a tenant's account in a priority class.

    The function does not refer to the runner: the runner's queue keeps it.
    """

    def account_of(priority: int, tenant: Hashable) -> Account:
        return tenants[priority].of(tenant)

    return account_of


def _no_account(_: int, __: Hashable) -> Account:
    return NOBODY


class RunnerState(Source):
    """A runner's record: its slots, its queue, its held leases, its totals. Its load counts its leases' too.

    `published` is the highest epoch there has been. `awaiting` holds jobs whose epoch is yet to come. `company` is there
    if its jobs may run as one, and then its queue knows their keys.

    A run takes `width` cores on a lane. By class, `accounts` are of its part of the device's time, and `tenants` of theirs of its
    own. Of each tenant, `tenant_jobs` counts what is queued or at the gate, where that is bounded, and `tenant_lines` hold who waits
    for that. `worst` are queued jobs that may be shed, if any may; `worst_of` the same, by tenant. `failures` were in a row.
    `memory` is what it has of the device's, and `used` when it last ran or gave out a slot, where that matters.
    """

    __slots__ = (
        "accounts",
        "awaiting",
        "backlog",
        "backlog_of",
        "company",
        "counters",
        "counts_tenants",
        "failures",
        "leases",
        "memory",
        "phase",
        "placing",
        "predicts",
        "published",
        "reached",
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
    ) -> None:
        self.tenants = tuple(Turns() for _ in Priority)
        queue = JobQueue(_accounts_in(self.tenants) if accounts else _no_account)
        super().__init__(name, list(reversed(range(slots))), epoch, load, queue)
        self.company = None if batching is None else Company(batching, self.queue)
        self.runner = self
        self.slots = slots
        self.accounts = accounts
        self.width = width
        self.share = share
        self.counts_tenants = load.bounds.tenant_jobs is not None
        self.tenant_jobs: dict[Hashable, int] = {}
        self.tenant_lines: dict[Hashable, OrderedDict[int, Job]] = {}
        self.backlog = Backlog()
        self.backlog_of: dict[Hashable, Backlog] = {}  # by tenant
        self.predicts = predicts
        self.sheds = sheds
        self.worst = Worst()
        self.worst_of: dict[Hashable, Worst] = {}
        self.failures = 0
        self.leases: dict[int, Lease] = {}
        self.phase = Phase.OPEN
        self.counters = Counters()
        self.placing = placing
        self.published = epoch
        self.reached = False
        self.awaiting: dict[int, Job] = {}
        self.memory = memory
        self.used = -math.inf

    def let_go(self) -> None:
        """Drop the runner's reference to itself, so that a removed runner is in no reference cycle.

        No job may be submitted to the runner afterwards.
        """
        del self.runner

    def waiting(self) -> list[Job]:
        """For room: at the gate, and in lines before it."""
        lines = [job for line in self.tenant_lines.values() for job in line.values()]
        return [*self.gate.jobs(), *lines]

    @property
    def waits(self) -> int:
        """How many jobs wait for room."""
        return len(self.gate) + sum(map(len, self.tenant_lines.values()))

    @property
    def busy(self) -> bool:
        """Whether anything of it waits for room, is queued, runs or is held. Who awaits an epoch wants nothing yet."""
        return self.live > len(self.awaiting) or bool(self.leases)

    @property
    def idle(self) -> bool:
        """Whether nobody has or wants anything of it. One that is parked does not wait for anything."""
        return not (self.live or self.leases or (self.closed and self.memory.is_here))

    @property
    def home(self) -> bool:
        """Whether every slot is."""
        return len(self.free) == self.slots


class Lease(Source):
    """An exclusive claim on one slot of a runner, for several runs in turn.

    Released, it takes no new jobs; its slot goes home when the last of its accepted jobs is through.
    """

    __slots__ = ("holder", "id", "released", "slot")

    def __init__(self, lease_id: int, runner: RunnerState, slot: int, holder: Any) -> None:
        load = Load(f"lease {lease_id} of runner {runner.name!r}", runner.load.bounds)
        super().__init__(runner.name, [slot], runner.epoch, load, JobQueue())
        self.runner = runner
        self.id = lease_id
        self.slot = slot
        self.holder = holder
        self.released = False
