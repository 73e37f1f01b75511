"""The plain model's records: accounts, runners, leases, jobs and runs.

No record keeps a number that can be counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

LOOP = -1
LIVE = ("WAITING", "QUEUED", "RUNNING")
COUNTS = (
    *("submitted", "completed", "failed", "rejected", "expired", "cancelled", "revoked", "inline"),
    *("shed", "batches", "batched", "retried", "withdrawn", "in_time"),
)
SECONDS = ("queue_seconds", "run_seconds", "wasted_seconds")
UNHURRIED = 10.0  # a job without a deadline is due so late after its submission, in seconds
OWN = ("the runner itself",)  # the runner's own account, instead of a tenant's
SLICE = 16  # jobs that one fact ends, moves or admits at most, for each reason


def kind_of(size):
    """Return the class of a size: its bits. No bytes count as one."""
    return max(1, size).bit_length()


def grains(seconds):
    return round(seconds * 2.0**30)


class Illegal(Exception):
    """The fact can't happen now."""


@dataclass(eq=False)
class Account:
    """The device time that a runner or tenant has had, divided by its share.

    `balance` is what was charged too much, below zero.
    """

    share: float
    virtual: float = 0.0
    balance: float = 0.0

    def charge(self, seconds):
        self.balance += seconds
        if self.balance > 0:
            self.virtual += self.balance / self.share
            self.balance = 0.0

    def lift(self, floor):
        if self.virtual <= floor:
            self.virtual, self.balance = floor, 0.0


@dataclass(eq=False)
class Runner:
    name: str
    slots: int
    jobs: float  # the bounds; infinite where there is none
    bytes: float
    tenant_jobs: float
    choice: str = "lane"
    limit: float = 0
    follow_limit: float = 0
    ahead_limit: float = 0
    hop: float = 0
    backlog_limit: float = math.inf
    width: int = 1
    share: float = 1.0
    sheds: bool = False
    predicts: bool = False
    routable: bool = False
    batching: tuple | None = None  # (most rows, longest delay, most seconds, most tokens)
    waiting: float = math.inf  # the most jobs that wait for room; of each lease once more
    phase: str = "OPEN"
    removed: bool = False
    counters: dict = field(default_factory=lambda: dict.fromkeys((*COUNTS, *SECONDS), 0))
    # What the histograms are made of: lists of values by how jobs ended, and by name.
    values: dict = field(default_factory=dict)
    rejections: dict = field(default_factory=dict)
    freed: dict = field(default_factory=dict)  # slot: when it was last freed, as a running number
    last_lanes: dict = field(default_factory=dict)  # slot: the lane that it ran on last
    # The sizes of runs and how long they took, by their kind (`kind_of`).
    times: dict = field(default_factory=dict)
    # When a run was last learned of or probed, by the kind of the size.
    seen: dict = field(default_factory=dict)
    accounts: dict = field(default_factory=dict)  # by (tenant or OWN, class)
    floors: dict = field(default_factory=dict)  # by class: where a tenant's account begins
    has_tenants: bool = False  # accounts of tenants begin with the first tenant that has a name
    gathering: bool = False
    got: int = 0  # batchable jobs that came since the last turn
    held: set = field(default_factory=set)  # keys that wait for the next turn
    ripe: set = field(default_factory=set)  # keys that wait no more
    ripe_at: dict = field(default_factory=dict)  # when a key's delay has elapsed, by key
    failures: int = 0  # in a row
    failing: bool = False
    epoch: int = 1
    published: int = 1
    closed: bool = False
    reached: bool = False

    def known(self, size):
        """Return the last run times of a size, shortest first; none while there are too few."""
        recent = sorted(seconds for _, seconds in self.times.get(kind_of(size), [])[-32:])
        return recent if len(recent) >= 8 else []

    def points(self):
        """Return the mean size, the median time in grains, and the kind of each kind, rising."""
        found = []
        for kind, runs in sorted(self.times.items()):
            sizes, seconds = zip(*runs[-32:], strict=True)
            median = sorted(map(grains, seconds))[(len(seconds) - 1) // 2]
            found.append((sum(sizes) // len(sizes), max(1, median), kind))
        return found

    def takes(self, size):
        """Return the grains that a run is expected to take; 0 while nothing is known."""
        size, points = max(1, size), self.points()
        smaller = [point for point in points if point[0] < size]
        larger = [point for point in points if point[0] >= size]
        if not points:
            return 0
        if not larger:
            return max(1, smaller[-1][1] * size // smaller[-1][0])
        if smaller:
            (low, fast, _), (high, slow, _) = smaller[-1], larger[0]
            return fast + (slow - fast) * (size - low) // (high - low)
        (low, fast, _), *others = larger
        least = max(1, fast * size // low)
        if not others:
            return least
        high, slow, _ = others[0]
        return max(least, min(fast, fast - (slow - fast) * (low - size) // (high - low)))

    def room(self, size, limit, now):
        """Return to which size a run may grow that takes at most `limit` grains."""
        at = max(1, size), self.takes(size)
        if at[1] >= limit:
            return at[0]
        passed = [at]
        for high, slow, kind in self.points():
            if high <= at[0]:
                continue
            rates = [Fraction(*reversed(point)) for point in passed]
            falls = slow > 1 << 20 and Fraction(slow, high) > min(rates) * Fraction(9, 8)
            if not falls and slow <= limit:
                at = high, slow
                passed.append(at)
            elif now - self.seen[kind] < max(10.0, 100 * slow * 2.0**-30) and (
                len(self.times[kind]) >= 4
            ):
                if falls and kind_of(at[0]) == kind:
                    return at[0]
                room = at[0] + (limit - at[1]) * (high - at[0]) // (slow - at[1])
                return min(room, (1 << kind_of(at[0])) - 1) if falls else room
        return at[0] * limit // at[1]

    def bound(self, size):
        recent = self.known(size)
        return recent[math.ceil(0.9 * len(recent)) - 1] if recent else math.inf

    def typical(self, size):
        recent = self.known(size)
        return recent[len(recent) // 2] if recent else None

    def expected(self, size):
        """Return the core seconds that a run is expected to take."""
        recent = self.known(size)
        total = sum(map(grains, recent))
        return self.width * (total // len(recent) * 2.0**-30) if recent else 0.0

    def inline(self, size):
        if self.choice != "auto":
            return self.choice == "inline"
        return self.bound(size) < self.limit or self.short_when_larger(size, self.limit)

    def short_when_larger(self, size, limit):
        bits = kind_of(size)
        larger = [kind for kind in self.times if kind > bits and self.known((1 << kind) >> 1)]
        return any(
            self.bound((1 << kind) >> 1) < limit + (2.0 ** (kind - bits) - 1) * self.hop
            for kind in larger
        )

    def grows(self, size, jobs):
        """Return whether an inline batch may have this number of jobs and bytes."""
        if self.choice == "inline":
            return True
        bits, limit = kind_of(size), self.limit + (jobs - 1) * self.hop
        smaller = [kind for kind in range(1, bits + 1) if self.known((1 << kind) >> 1)]
        if smaller and self.bound((1 << smaller[-1]) >> 1) * 2.0 ** (bits - smaller[-1]) < limit:
            return True
        return self.short_when_larger(size, limit)

    def short(self, size):
        return self.bound(size) < self.follow_limit

    def account(self, tenant, kind):
        share = self.share if tenant is OWN else 1.0
        return self.accounts.setdefault((tenant, kind), Account(share))


@dataclass(eq=False)
class Lease:
    number: int
    runner: Runner
    slot: int
    epoch: int
    released: bool = False
    over: bool = False


@dataclass(eq=False)
class Job:
    number: int
    runner: Runner
    lease: Lease | None
    priority: int
    deadline: float | None
    bytes: int
    is_lease_request: bool
    min_epoch: int = 0
    tenant: str | None = None
    rows: int = 1
    tokens: int = 1
    key: str | None = None
    bypasses_limits: bool = False  # from bounds
    state: str = "NEW"
    # Of a WAITING job: "epoch", "tenant" (until another of its tenant leaves) or "room".
    waits_for: str = ""
    id: int = 0
    submitted: float = 0
    overdue: bool = False  # launched because it had waited too long
    unchecked: bool = False  # a probe, which is not checked for being late any more
    latest: float = math.inf  # when to start, to end in time; as known when the job was queued
    expected: float = 0.0  # core seconds, as known when the job was queued
    charged: float = 0.0  # core seconds charged at the launch to `accounts`
    accounts: list = field(default_factory=list)
    run: Run | None = None
    began: float | None = None  # when its last run that is over began

    @property
    def live(self):
        return self.state in LIVE or self.run is not None

    @property
    def source(self):
        return self.lease or self.runner

    @property
    def together(self):
        """Return the key under which the job may be batched; None for alone."""
        alone = self.runner.batching is None or self.lease is not None or self.is_lease_request
        return None if alone else self.key

    @property
    def length(self):
        """Return the bytes of a row."""
        return max(1, math.ceil(self.bytes / self.rows))

    def accounts_now(self, fair):
        """Return the runner's account and, unless a lease is the source, the tenant's."""
        names = [OWN] if self.lease or not fair else [OWN, self.tenant]
        return [self.runner.account(name, self.priority) for name in names]


@dataclass(eq=False)
class Run:
    """A launch: one job, or a batch with the leader first."""

    members: list
    lane: int
    slot: int
    started: float
    expected: float  # device time
    behind: bool = False  # handed ahead to its lane, behind the run that is there
    again: bool = False  # the retry of a member of a failed batch
    to_come: list = field(default_factory=list)  # other members of that batch, to be retried later
    opened: float | None = None  # when its lane could be handed a next job, as a running number

    @property
    def source(self):
        return self.members[0].source

    @property
    def runner(self):
        return self.members[0].runner

    @property
    def bytes(self):
        return size_of(self.members)

    def part(self, job, seconds):
        """Return the part of the run's seconds that one of its jobs is charged."""
        if len(self.members) == 1:
            return seconds
        rows = sum(member.rows for member in self.members)
        return seconds * job.rows / rows if rows else seconds / len(self.members)


def size_of(members):
    """Return the bytes of a run, padding included."""
    if len(members) == 1:
        return members[0].bytes
    return sum(job.rows for job in members) * max(job.length for job in members)


def freed_last(free, freed):
    """Return the number that was freed last; of those never used, the lowest."""
    return max(free, key=lambda number: (freed.get(number, 0), -number))
