"""The rules once more, plain and slow: every decision is made by looking at everything there is.

No heaps, no entries that go stale, no counts kept beside the things they count. It shares nothing with
the package, so that the two can be held against each other. It takes the facts of `walks.py` and gives
their commands as tuples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LOOP = -1
LIVE = ("WAITING", "QUEUED", "RUNNING")
COUNTS = (
    *("submitted", "completed", "failed", "rejected", "expired", "cancelled", "revoked", "inline"),
    *("batches", "batched", "retried"),
)
SECONDS = ("queue_seconds", "run_seconds", "wasted_seconds")


class Illegal(Exception):
    """The fact can't happen now."""


@dataclass(eq=False)
class Runner:
    name: str
    slots: int
    jobs: float  # the bounds; infinite where there is none
    bytes: float
    phase: str = "OPEN"
    removed: bool = False
    counters: dict = field(default_factory=lambda: dict.fromkeys((*COUNTS, *SECONDS), 0))
    freed: dict = field(default_factory=dict)  # slot: when it was last freed, as a running number
    choice: str = "lane"
    limit: float = 0
    follow_limit: float = 0
    times: dict = field(
        default_factory=dict
    )  # how long runs took, by the number of bits of their inputs' size
    epoch: int = 1
    published: int = 1
    closed: bool = False
    reached: bool = False
    max_rows: int | None = None  # of a batch; None: it makes none
    max_delay: float = 0
    doubts: dict = field(
        default_factory=dict
    )  # jobs given up as late, by the number of bits of their inputs' size
    keys: dict = field(default_factory=dict)  # those that have jobs queued
    arrived: int = 0  # jobs with keys, in this turn of the loop
    gathering: bool = False
    hurries: bool = False

    def grows(self, size):
        """Whether a batch on the loop's thread may grow to this size."""
        known = [bits for bits in self.times if bits < size.bit_length() and len(self.times[bits]) >= 8]
        bound = self.bound(size)
        if bound == math.inf and known:
            bits = max(known)
            bound = self.bound(2**bits - 1) * 2 ** (size.bit_length() - bits)
        return self.choice == "inline" or bound < self.limit

    def bound(self, size):
        recent = sorted(self.times.get(size.bit_length(), [])[-32:])
        return recent[math.ceil(0.9 * len(recent)) - 1] if len(recent) >= 8 else math.inf

    def inline(self, size):
        return self.choice == "inline" or (self.choice == "auto" and self.bound(size) < self.limit)

    def typical(self, size):
        recent = sorted(self.times.get(size.bit_length(), [])[-32:])
        return recent[len(recent) // 2] if len(recent) >= 8 else 0

    def short(self, size):
        return self.bound(size) < self.follow_limit


@dataclass(eq=False)
class Key:
    held: bool = False
    ripe: bool = False
    ripe_at: float = math.inf


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
    holds: bool
    min_epoch: int = 0
    rows: int = 1
    key: str | None = None
    exempt: bool = False  # from bounds
    state: str = "NEW"
    awaiting: bool = False  # WAITING for its epoch, and not for room
    behind: bool = False  # on its lane, but not yet the one that runs
    opened: float | None = None  # when its lane could be given a next one, as a running number
    id: int = 0
    on_lane: bool = False
    lane: int = -1
    slot: int = -1
    submitted: float = 0
    started: float = 0
    members: list = field(default_factory=list)  # of a batch, on its leader, itself first
    total: int = 0  # bytes of the launch
    rest: list = field(default_factory=list)  # to be run again, one by one
    aboard: bool = False  # runs, or is to be run again, with another that stands for it
    again: bool = False

    @property
    def live(self):
        return self.state in LIVE or self.on_lane or self.aboard

    @property
    def keyed(self):
        return self.key is not None and self.lease is None and self.runner.max_rows is not None

    @property
    def inline(self):
        return self.on_lane and self.lane == LOOP

    @property
    def source(self):
        return self.lease or self.runner

    @property
    def due(self):
        return self.submitted + 10 if self.deadline is None else self.deadline

    @property
    def rank(self):
        return (self.priority, self.due, self.id)


class PlainModel:
    def __init__(self, lanes, jobs, size, budget):
        self.lanes = lanes
        self.budget = self.budget_left = budget
        self.turn_asked = False
        self.jobs_bound = math.inf if jobs is None else jobs
        self.bytes_bound = math.inf if size is None else size
        self.runners = []
        self.leases = []
        self.jobs = []
        self.ids = 0
        self.moments = 0
        self.lanes_freed = {}
        self.gatherers = []  # runners to which jobs with keys have come in this turn, in that order

    # --- facts -----------------------------------------------------------------------------------------

    def add_runner(self, name, slots, jobs, size, choice="lane", limit=0, follow_limit=0, batching=None):
        if any(runner.name == name and not runner.removed for runner in self.runners):
            raise Illegal
        bounds = (math.inf if bound is None else bound for bound in (jobs, size))
        runner = Runner(name, slots, *bounds, choice=choice, limit=limit, follow_limit=follow_limit)
        runner.max_rows, runner.max_delay = batching or (None, 0)
        self.runners.append(runner)
        return []

    def submit(
        self,
        now,
        number,
        source,
        priority,
        deadline,
        size,
        holds,
        wait,
        min_epoch=0,
        rows=1,
        key=None,
        exempt=False,
    ):
        """`source` is ("runner", number) or ("lease", number); a job's number seen before is a resubmission."""
        kind, which = source
        lease = self.leases[which - 1] if kind == "lease" else None
        runner = lease.runner if lease else self.runners[which]
        unlawful = (lease and holds) or (key is not None and (holds or rows < 1))
        if number < len(self.jobs) or unlawful or (exempt and (not holds or size)):
            raise Illegal
        self.ids += 1
        job = Job(
            *(number, runner, lease, priority, deadline, size, holds, min_epoch, rows, key, exempt),
            id=self.ids,
            submitted=now,
        )
        self.jobs.append(job)
        runner.counters["submitted"] += 1
        refusal = self.refusal(job, wait)
        if refusal is not None:
            self.end(job, "REJECTED")
            return [("reject", number, refusal)]
        if deadline is not None and deadline <= now:
            self.end(job, "EXPIRED")
            return [("expire", number)]
        if min_epoch > job.source.epoch:
            job.state, job.awaiting = "WAITING", True
            return []
        admitted = not self.must_wait(job)
        job.state = "WAITING"
        commands = self.queue(job, now) if admitted else []
        commands += self.settle(now)
        return commands + self.follow(job.source, now) if admitted else commands

    def complete(self, now, number, ok):
        job = self.jobs[number]
        if not job.on_lane:
            raise Illegal
        runner, inline, seconds = job.runner, job.inline, now - job.started
        members, job.members = job.members or [job], []
        rows = sum(member.rows for member in members)
        job.on_lane = False
        for member in members:
            part = seconds if len(members) == 1 else seconds * member.rows / rows
            runner.counters["run_seconds"] += part
            member.aboard = False
            if len(members) > 1 and not ok and member.state == "RUNNING":
                runner.counters["wasted_seconds"] += part
                member.aboard = True
                job.rest.append(member)
                continue
            runner.counters["queue_seconds"] += member.started - member.submitted
            runner.counters["inline"] += inline
            if member.state != "RUNNING":
                runner.counters["wasted_seconds"] += part
            elif ok:
                self.end(member, "DONE", "completed")
            else:
                self.end(member, "FAILED")
        if inline:
            self.budget_left -= seconds
        commands = self.leave_lane(job, now)
        self.retire()
        self.learn(job, seconds, ok=ok, inline=inline)
        commands += self.settle(now, drained=False)
        return commands + self.follow(job.source, now) + self.over()

    def leave_lane(self, job, now):
        self.moments += 1
        others = [other for other in self.jobs if other.on_lane and other.lane == job.lane]
        rerun = self.next_of(job)
        if job.behind:
            (first,) = others
            job.behind = False
            if rerun is None and not first.again:
                first.opened = self.moments
        elif others:
            (next_one,) = others
            next_one.behind = False
            if rerun is None and not next_one.again:
                next_one.opened = self.moments
        elif rerun is None:
            self.lanes_freed[job.lane] = self.moments
            if job.lease is None:
                job.runner.freed[job.slot] = self.moments
        if rerun is None:
            return []
        rerun.on_lane, rerun.again, rerun.behind = True, True, bool(others)
        rerun.started, rerun.total = now, rerun.bytes
        rerun.opened = None
        rerun.runner.counters["retried"] += 1
        return [("launch", rerun.number, rerun.lane, rerun.slot, ())]

    def next_of(self, job):
        """Who of a failed batch is run again next."""
        rest, job.rest = job.rest, []
        while rest:
            member = rest.pop(0)
            member.aboard = False
            if member.state == "RUNNING":
                member.rest = rest
                return member
        return None

    def learn(self, job, seconds, *, ok, inline):
        runner = job.runner
        if runner.choice != "auto" and not runner.follow_limit:
            return
        if inline and seconds > self.budget:
            runner.times.pop(job.total.bit_length(), None)
            runner.doubts.pop(job.total.bit_length(), None)
        elif ok:
            runner.times.setdefault(job.total.bit_length(), []).append(seconds)
            runner.doubts.pop(job.total.bit_length(), None)

    def turn(self, now):
        self.budget_left, self.turn_asked = self.budget, any(job.inline for job in self.jobs)
        commands = [("next turn",)] * self.turn_asked
        gatherers, self.gatherers = self.gatherers, []
        for runner in gatherers:
            runner.gathering = runner.gathering and runner.arrived > 1
            runner.arrived = 0
            for key in runner.keys.values():
                key.held = False
        commands += self.settle(now)
        for runner in gatherers:
            commands += self.follow(runner, now)
        return commands

    def cancel(self, now, number):
        job = self.jobs[number]
        if job.state not in LIVE:
            raise Illegal
        self.end(job, "CANCELLED")
        self.retire()
        return self.settle(now)

    def tick(self, now):
        commands = []
        due = [
            job for job in self.jobs if job.state in LIVE and job.deadline is not None and job.deadline <= now
        ]
        for job in sorted(due, key=lambda job: (job.deadline, job.number)):
            self.end(job, "EXPIRED")
            self.retire()
            commands.append(("expire", job.number))
        return commands + self.settle(now)

    def release(self, now, number):
        self.leases[number - 1].released = True
        self.retire()
        return self.settle(now)

    def drain_runner(self, now, number):
        runner = self.known(number)
        if runner.phase == "OPEN":
            runner.phase = "DRAINING"
        runner.hurries = True
        commands = []
        for job in self.awaiting(runner):
            self.end(job, "REVOKED")
            commands.append(("revoke", job.number))
        return commands + self.settle(now)

    def terminate_runner(self, now, number):
        runner = self.known(number)
        if runner.phase in ("TERMINATED", "DRAINED"):
            return []
        runner.phase = "TERMINATED"
        commands = []
        for job in self.awaiting(runner) + self.of(runner, "WAITING", "QUEUED"):
            self.end(job, "REVOKED")
            commands.append(("revoke", job.number))
        for lease in self.leases:
            if lease.runner is runner:
                lease.released = True
        self.retire()
        return commands + self.settle(now)

    def remove_runner(self, number):
        runner = self.known(number)
        if runner.phase != "DRAINED":
            raise Illegal
        runner.removed = True
        return []

    def close_barrier(self, now, number, abort):
        runner = self.known(number)
        if runner.closed or runner.phase == "DRAINED":
            raise Illegal
        runner.closed = True
        commands = []
        if abort:
            for job in self.of(runner, "WAITING", "QUEUED"):
                if job.lease is None:
                    self.end(job, "REVOKED")
                    commands.append(("revoke", job.number))
        return commands + self.settle(now)

    def open_barrier(self, now, number, epoch):
        runner = self.known(number)
        if not runner.closed or (epoch is not None and not runner.reached):
            raise Illegal
        if epoch is not None and not 1 <= epoch <= runner.published + 1:
            raise Illegal
        runner.closed = runner.reached = False
        commands = []
        if epoch is not None:
            runner.epoch, runner.published = epoch, max(runner.published, epoch)
            for job in self.of(runner, "WAITING", "QUEUED"):
                if job.lease is None and job.min_epoch > epoch:
                    self.end(job, "REVOKED")
                    commands.append(("revoke", job.number))
            for job in self.awaiting(runner):
                if job.min_epoch <= epoch:
                    self.ids += 1
                    job.id, job.awaiting = self.ids, False
        return commands + self.settle(now)

    # --- looking at everything -------------------------------------------------------------------------

    def known(self, number):
        if self.runners[number].removed:
            raise Illegal
        return self.runners[number]

    def of(self, runner, *states):
        return [job for job in self.jobs if job.runner is runner and job.state in states and not job.awaiting]

    def awaiting(self, runner):
        return [job for job in self.jobs if job.runner is runner and job.state == "WAITING" and job.awaiting]

    def of_lease(self, lease, *states):
        return [job for job in self.jobs if job.lease is lease and job.state in states]

    def fits(self, job):
        """Whether the bounds that belong to the job's own source have room for it."""
        queued = self.of_lease(job.lease, "QUEUED") if job.lease else self.of(job.runner, "QUEUED")
        queued = [other for other in queued if not other.exempt]
        size = sum(other.bytes for other in queued)
        return len(queued) < job.runner.jobs and size + job.bytes <= job.runner.bytes

    def fits_device(self, job):
        queued = [other for other in self.jobs if other.state == "QUEUED" and not other.exempt]
        size = sum(other.bytes for other in queued)
        return len(queued) < self.jobs_bound and size + job.bytes <= self.bytes_bound

    def gate_heads(self):
        """The first at each runner's gate that would fit its runner: they contend for the device's room."""
        for runner in self.runners:
            gate = [job for job in self.of(runner, "WAITING") if job.lease is None]
            if gate and self.fits(head := min(gate, key=lambda job: job.rank)):
                yield head

    def must_wait(self, job):
        if job.exempt:
            return False
        if job.lease is not None:
            return bool(self.of_lease(job.lease, "WAITING")) or not self.fits(job)
        own_gate = [other for other in self.of(job.runner, "WAITING") if other.lease is None]
        return bool(own_gate or list(self.gate_heads())) or not (self.fits(job) and self.fits_device(job))

    def refusal(self, job, wait):
        runner = job.runner
        if job.lease is not None and runner.phase in ("TERMINATED", "DRAINED"):
            return "RunnerClosedError"
        if job.lease is not None and job.lease.released:
            return "LeaseError"
        if job.lease is None and runner.phase != "OPEN":
            return "RunnerClosedError"
        if job.min_epoch > job.source.epoch:
            never = job.bytes > min(runner.bytes, self.bytes_bound) or min(runner.jobs, self.jobs_bound) < 1
            never = never and not job.exempt
            if not never and (job.lease or job.min_epoch <= runner.published):
                return "EpochError"
            return "QueueFullError" if never or len(self.awaiting(runner)) >= runner.jobs else None
        never = job.bytes > min(runner.bytes, self.bytes_bound) or min(runner.jobs, self.jobs_bound) < 1
        never = never and not job.exempt
        return "QueueFullError" if never or (not wait and self.must_wait(job)) else None

    def free_slots(self, runner):
        taken = {lease.slot for lease in self.leases if lease.runner is runner and not lease.over}
        taken |= {job.slot for job in self.jobs if job.runner is runner and job.on_lane}
        return [slot for slot in range(runner.slots) if slot not in taken]

    def free_lanes(self):
        taken = {job.lane for job in self.jobs if job.on_lane}
        return [lane for lane in range(self.lanes) if lane not in taken]

    def heads(self):
        """The first of each source's queue, if there is a slot for it."""
        for runner in self.runners:
            queued = [job for job in self.of(runner, "QUEUED") if job.lease is None and self.contends(job)]
            if queued and self.free_slots(runner) and not runner.closed:
                yield min(queued, key=lambda job: job.rank)
        for lease in self.leases:
            queued = self.of_lease(lease, "QUEUED")
            if queued and not any(job.lease is lease and job.on_lane for job in self.jobs):
                yield min(queued, key=lambda job: job.rank)

    def contends(self, job):
        return not job.keyed or job.runner.keys[job.key].ripe

    def best_for_a_lane(self):
        heads = [job for job in self.heads() if not job.holds and not job.runner.inline(job.bytes)]
        return min(heads, key=lambda job: job.rank, default=None)

    def best(self):
        """The best of those that have a slot and a place to run: a lane, the loop, or none for a lease."""
        loop_is_free = not any(job.inline for job in self.jobs) and self.budget_left > 0

        def has_a_place(job):
            return job.holds or (loop_is_free if job.runner.inline(job.bytes) else bool(self.free_lanes()))

        return min(filter(has_a_place, self.heads()), key=lambda job: job.rank, default=None)

    # --- what follows ----------------------------------------------------------------------------------

    def queue(self, job, now):
        """A job is queued; one with a key may have to wait for company."""
        self.forget_keys()
        job.state, runner = "QUEUED", job.runner
        if not job.keyed:
            return []
        if not runner.arrived:
            self.gatherers.append(runner)
        runner.arrived += 1
        runner.gathering = runner.gathering or runner.arrived > 1
        key = runner.keys.setdefault(job.key, Key())
        if not key.ripe:
            key.held = key.held or runner.gathering
            if runner.max_delay:
                latest = math.inf if job.deadline is None else job.deadline - runner.bound(job.bytes)
                key.ripe_at = min(key.ripe_at, job.submitted + runner.max_delay, latest)
        self.ripen(now)
        return self.ask_for_turn()

    def ask_for_turn(self):
        asked, self.turn_asked = self.turn_asked, True
        return [] if asked else [("next turn",)]

    def alike(self, runner, name):
        jobs = self.of(runner, "QUEUED")
        return [job for job in jobs if job.keyed and job.key == name]

    def forget_keys(self):
        """Those without jobs."""
        for runner in self.runners:
            runner.keys = {name: key for name, key in runner.keys.items() if self.alike(runner, name)}

    def ripen(self, now):
        """Keys that wait no longer."""
        self.forget_keys()
        for runner in self.runners:
            for name, key in runner.keys.items():
                rows = sum(job.rows for job in self.alike(runner, name))
                alone = runner.max_delay and rows < runner.max_rows and now < key.ripe_at
                if runner.hurries or not (key.held or alone):
                    key.ripe = True

    def is_late(self, job, now):
        """Its deadline has passed, or can't be met; of the latter every eighth in a row is run all the same."""
        if job.deadline is None or job.deadline <= now:
            return job.deadline is not None
        if job.holds or now + job.runner.typical(job.bytes) <= job.deadline:
            return False
        doubts, bits = job.runner.doubts, job.bytes.bit_length()
        doubts[bits] = (doubts.get(bits, 0) + 1) % 8
        return doubts[bits] != 0

    def take_along(self, job, now, *, inline):
        """The job's company, in its order, while the next one has room."""
        members, rows, job.total, commands = [job], job.rows, job.bytes, []
        while job.keyed and (others := self.alike(job.runner, job.key)):
            other = min(others, key=lambda job: job.rank)
            if rows + other.rows > job.runner.max_rows:
                break
            if inline and not job.runner.grows(job.total + other.bytes):
                break
            if self.is_late(other, now):
                self.end(other, "EXPIRED")
                commands.append(("expire", other.number))
                continue
            other.state, other.aboard = "RUNNING", True
            members.append(other)
            rows += other.rows
            job.total += other.bytes
        if len(members) > 1:
            job.members = members
            job.runner.counters["batches"] += 1
            job.runner.counters["batched"] += len(members)
        for member in members:
            member.lane, member.slot, member.started = job.lane, job.slot, job.started
        return commands, tuple(member.number for member in job.members)

    def settle(self, now, *, drained=True):
        commands = []
        self.ripen(now)
        while True:
            commands += self.admit(now)
            self.ripen(now)
            job = self.best()
            if job is None:
                break
            if self.is_late(job, now):
                self.end(job, "EXPIRED")
                self.retire()
                commands.append(("expire", job.number))
                continue
            job.started = now
            if job.lease is None:
                job.slot = freed_last(self.free_slots(job.runner), job.runner.freed)
            else:
                job.slot = job.lease.slot
            if job.holds:
                job.runner.counters["queue_seconds"] += now - job.submitted
                self.end(job, "DONE", "completed")
                lease = Lease(len(self.leases) + 1, job.runner, job.slot, job.runner.epoch)
                self.leases.append(lease)
                commands.append(("grant", job.number, lease.number, lease.slot))
                continue
            inline = job.runner.inline(job.bytes)
            job.lane = LOOP if inline else freed_last(self.free_lanes(), self.lanes_freed)
            job.state, job.on_lane = "RUNNING", True
            expired, members = self.take_along(job, now, inline=inline)
            commands += expired
            if not inline and job.runner.short(job.total):
                self.moments += 1
                job.opened = self.moments
            commands.append(("launch", job.number, job.lane, job.slot, members))
            if inline:
                commands += self.ask_for_turn()
        return commands + self.over() if drained else commands

    def follow(self, source, now):
        """Give the source's next jobs to lanes that run short ones of it and have none behind."""
        commands = []
        while True:
            on_lanes = [job for job in self.jobs if job.on_lane and job.source is source]
            taken = {job.lane for job in on_lanes if job.behind}
            firsts = [
                job for job in on_lanes if job.opened is not None and not job.behind and job.lane not in taken
            ]
            self.ripen(now)
            queued = [
                job
                for job in self.jobs
                if job.state == "QUEUED" and job.source is source and self.contends(job)
            ]
            if not firsts or not queued or getattr(source, "closed", False):
                return commands
            head = min(queued, key=lambda job: job.rank)
            runner, rival = head.runner, self.best_for_a_lane()
            if head.holds or runner.inline(head.bytes) or not runner.short(head.bytes):
                return commands
            ends = now + runner.typical(head.bytes)
            too_late = head.deadline is not None and (head.deadline <= now or ends > head.deadline)
            if too_late or (rival and rival.rank < head.rank):
                return commands
            first = max(firsts, key=lambda job: job.opened)
            head.state, head.on_lane, head.behind = "RUNNING", True, True
            head.lane, head.slot, head.started = first.lane, first.slot, now
            expired, members = self.take_along(head, now, inline=False)
            commands += [*expired, ("launch", head.number, head.lane, head.slot, members)]
            commands += self.settle(now, drained=False)

    def admit(self, now):
        commands = []
        for lease in self.leases:
            while gate := self.of_lease(lease, "WAITING"):
                head = min(gate, key=lambda job: job.rank)
                if not self.fits(head):
                    break
                head.state = "QUEUED"
        while heads := list(self.gate_heads()):
            head = min(heads, key=lambda job: job.rank)
            if not self.fits_device(head):
                break
            commands += self.queue(head, now)
        return commands

    def end(self, job, state, count=None):
        job.state = state
        job.runner.counters[count or state.lower()] += 1

    def retire(self):
        for lease in self.leases:
            over = lease.released and not any(job.lease is lease and job.live for job in self.jobs)
            if over and not lease.over:
                lease.over = True
                self.moments += 1
                lease.runner.freed[lease.slot] = self.moments

    def over(self):
        """Barriers that are reached now, runners that are drained now."""
        commands = []
        for runner in self.runners:
            if runner.closed and not runner.reached and len(self.free_slots(runner)) == runner.slots:
                runner.reached = True
                commands.append(("reached", self.runners.index(runner)))
            held = any(lease.runner is runner and not lease.over for lease in self.leases)
            live = any(job.runner is runner and job.live for job in self.jobs)
            if runner.phase in ("DRAINING", "TERMINATED") and not (held or live or runner.closed):
                runner.phase = "DRAINED"
                commands.append(("drained", self.runners.index(runner)))
        return commands


def freed_last(free, freed):
    """The one used last; of those never used, the lowest."""
    return max(free, key=lambda number: (freed.get(number, 0), -number))
