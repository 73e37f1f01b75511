"""Leases: who holds which slot. A source gives out its slots; a held lease is a source of one slot."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from aoti_sched.queue.admission import Load
from aoti_sched.queue.batch import Batching, Company
from aoti_sched.queue.job import Job
from aoti_sched.queue.order import JobQueue, KeyedQueue
from aoti_sched.queue.placement import Placing


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


class Source:
    """What jobs draw slots from: a runner with all its slots, or a held lease with its one.

    `queue` holds what was admitted, `load` counts it against its bounds; `gate` holds what waits for room.
    `free` is a stack, so that the slot used last, whose memory is warm, is used next. `live` counts the
    jobs that are waiting, queued or running here, callers that left a running job included. A `closed`
    source gives out no slot. `followed` are lanes that run a short job of this source and may be given its next.
    """

    __slots__ = ("closed", "epoch", "followed", "free", "gate", "live", "load", "name", "queue")

    def __init__(self, name: str, slots: list[int], epoch: int, load: Load) -> None:
        self.name = name
        self.free = slots
        self.gate = JobQueue()
        self.queue = JobQueue()
        self.load = load
        self.live = 0
        self.epoch = epoch
        self.closed = False
        self.followed: list[int] = []

    @property
    def runner(self) -> RunnerState:
        raise AttributeError("a bare source has no runner")


class RunnerState(Source):
    """A runner's record: its slots, its queue, its held leases, its totals. Its load counts its leases' too.

    `published` is the highest epoch there has been. `awaiting` holds jobs whose epoch is yet to come. `company` is there
    if its jobs may run as one, and then its queue knows their keys.
    """

    __slots__ = (
        "awaiting",
        "company",
        "counters",
        "leases",
        "phase",
        "placing",
        "published",
        "reached",
        "slots",
    )

    def __init__(
        self,
        name: str,
        slots: int,
        load: Load,
        epoch: int,
        placing: Placing,
        *,
        batching: Batching | None = None,
    ) -> None:
        super().__init__(name, list(reversed(range(slots))), epoch, load)
        self.company: Company | None = None
        if batching is not None:
            self.queue = KeyedQueue()
            self.company = Company(batching, self.queue)
        self.slots = slots
        self.leases: dict[int, Lease] = {}
        self.phase = Phase.OPEN
        self.counters = Counters()
        self.placing = placing
        self.published = epoch
        self.reached = False
        self.awaiting: dict[int, Job] = {}

    @property
    def runner(self) -> RunnerState:
        return self

    @property
    def idle(self) -> bool:
        return not (self.live or self.leases or self.closed)

    @property
    def home(self) -> bool:
        """Whether every slot is."""
        return len(self.free) == self.slots


class Lease(Source):
    """An exclusive claim on one slot of a runner, for several runs in turn.

    Released, it takes no new jobs; its slot goes home when the last of its accepted jobs is through.
    """

    __slots__ = ("_runner", "holder", "id", "released", "slot")

    def __init__(self, lease_id: int, runner: RunnerState, slot: int, holder: Any) -> None:
        load = Load(f"lease {lease_id} of runner {runner.name!r}", runner.load.bounds)
        super().__init__(runner.name, [slot], runner.epoch, load)
        self._runner = runner
        self.id = lease_id
        self.slot = slot
        self.holder = holder
        self.released = False

    @property
    def runner(self) -> RunnerState:
        return self._runner
