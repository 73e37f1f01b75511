"""The rules once more, plain and slow: every decision is made by looking at everything there is.

No heaps, no entries that go stale, no counts kept beside the things they count. It shares nothing with
the package, so that the two can be held against each other. It takes the facts of `walks.py` and gives
their commands as tuples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LIVE = ("WAITING", "QUEUED", "RUNNING")
COUNTS = ("submitted", "completed", "failed", "rejected", "expired", "cancelled", "revoked")
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


@dataclass(eq=False)
class Lease:
    number: int
    runner: Runner
    slot: int
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
    state: str = "NEW"
    id: int = 0
    on_lane: bool = False
    lane: int = -1
    slot: int = -1
    submitted: float = 0
    started: float = 0

    @property
    def live(self):
        return self.state in LIVE or self.on_lane

    @property
    def rank(self):
        return (self.priority, self.id)


class PlainModel:
    def __init__(self, lanes, jobs, size):
        self.lanes = lanes
        self.jobs_bound = math.inf if jobs is None else jobs
        self.bytes_bound = math.inf if size is None else size
        self.runners = []
        self.leases = []
        self.jobs = []
        self.ids = 0
        self.moments = 0
        self.lanes_freed = {}

    # --- facts -----------------------------------------------------------------------------------------

    def add_runner(self, name, slots, jobs, size):
        if any(runner.name == name and not runner.removed for runner in self.runners):
            raise Illegal
        bounds = (math.inf if bound is None else bound for bound in (jobs, size))
        self.runners.append(Runner(name, slots, *bounds))
        return []

    def submit(self, now, number, source, priority, deadline, size, holds, wait):
        """`source` is ("runner", number) or ("lease", number); a job's number seen before is a resubmission."""
        kind, which = source
        lease = self.leases[which - 1] if kind == "lease" else None
        runner = lease.runner if lease else self.runners[which]
        if number < len(self.jobs) or (lease and holds):
            raise Illegal
        self.ids += 1
        job = Job(number, runner, lease, priority, deadline, size, holds, id=self.ids, submitted=now)
        self.jobs.append(job)
        runner.counters["submitted"] += 1
        refusal = self.refusal(job, wait)
        if refusal is not None:
            self.end(job, "REJECTED")
            return [("reject", number, refusal)]
        if deadline is not None and deadline <= now:
            self.end(job, "EXPIRED")
            return [("expire", number)]
        job.state = "WAITING" if self.must_wait(job) else "QUEUED"
        return self.settle(now)

    def complete(self, now, number, ok):
        job = self.jobs[number]
        if not job.on_lane:
            raise Illegal
        counters, seconds = job.runner.counters, now - job.started
        counters["queue_seconds"] += job.started - job.submitted
        counters["run_seconds"] += seconds
        job.on_lane = False
        if job.state != "RUNNING":
            counters["wasted_seconds"] += seconds
        elif ok:
            self.end(job, "DONE", "completed")
        else:
            self.end(job, "FAILED")
        self.moments += 1
        self.lanes_freed[job.lane] = self.moments
        if job.lease is None:
            job.runner.freed[job.slot] = self.moments
        self.retire()
        return self.settle(now)

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
        for job in sorted(due, key=lambda job: (job.deadline, job.id)):
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
        return self.settle(now)

    def terminate_runner(self, now, number):
        runner = self.known(number)
        if runner.phase in ("TERMINATED", "DRAINED"):
            return []
        runner.phase = "TERMINATED"
        commands = []
        for job in self.of(runner, "WAITING", "QUEUED"):
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

    # --- looking at everything -------------------------------------------------------------------------

    def known(self, number):
        if self.runners[number].removed:
            raise Illegal
        return self.runners[number]

    def of(self, runner, *states):
        return [job for job in self.jobs if job.runner is runner and job.state in states]

    def of_lease(self, lease, *states):
        return [job for job in self.jobs if job.lease is lease and job.state in states]

    def fits(self, job):
        """Whether the bounds that belong to the job's own source have room for it."""
        queued = self.of_lease(job.lease, "QUEUED") if job.lease else self.of(job.runner, "QUEUED")
        size = sum(other.bytes for other in queued)
        return len(queued) < job.runner.jobs and size + job.bytes <= job.runner.bytes

    def fits_device(self, job):
        queued = [other for other in self.jobs if other.state == "QUEUED"]
        size = sum(other.bytes for other in queued)
        return len(queued) < self.jobs_bound and size + job.bytes <= self.bytes_bound

    def gate_heads(self):
        """The first at each runner's gate that would fit its runner: they contend for the device's room."""
        for runner in self.runners:
            gate = [job for job in self.of(runner, "WAITING") if job.lease is None]
            if gate and self.fits(head := min(gate, key=lambda job: job.rank)):
                yield head

    def must_wait(self, job):
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
        never = job.bytes > min(runner.bytes, self.bytes_bound) or min(runner.jobs, self.jobs_bound) < 1
        return "QueueFullError" if never or (not wait and self.must_wait(job)) else None

    def free_slots(self, runner):
        taken = {lease.slot for lease in self.leases if lease.runner is runner and not lease.over}
        taken |= {job.slot for job in self.jobs if job.runner is runner and job.on_lane}
        return [slot for slot in range(runner.slots) if slot not in taken]

    def free_lanes(self):
        taken = {job.lane for job in self.jobs if job.on_lane}
        return [lane for lane in range(self.lanes) if lane not in taken]

    def best(self):
        """The best of the jobs that lead their source's queue and have a slot to go to."""
        heads = []
        for runner in self.runners:
            queued = [job for job in self.of(runner, "QUEUED") if job.lease is None]
            if queued and self.free_slots(runner):
                heads.append(min(queued, key=lambda job: job.rank))
        for lease in self.leases:
            queued = self.of_lease(lease, "QUEUED")
            if queued and not any(job.lease is lease and job.on_lane for job in self.jobs):
                heads.append(min(queued, key=lambda job: job.rank))
        return min(heads, key=lambda job: job.rank, default=None)

    # --- what follows ----------------------------------------------------------------------------------

    def settle(self, now):
        commands = []
        while True:
            self.admit()
            job = self.best()
            if job is None or not (job.holds or self.free_lanes()):
                break
            if job.deadline is not None and job.deadline <= now:
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
                lease = Lease(len(self.leases) + 1, job.runner, job.slot)
                self.leases.append(lease)
                commands.append(("grant", job.number, lease.number, lease.slot))
            else:
                job.lane = freed_last(self.free_lanes(), self.lanes_freed)
                job.state, job.on_lane = "RUNNING", True
                commands.append(("launch", job.number, job.lane, job.slot))
        return commands + self.drained()

    def admit(self):
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
            head.state = "QUEUED"

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

    def drained(self):
        commands = []
        for runner in self.runners:
            held = any(lease.runner is runner and not lease.over for lease in self.leases)
            live = any(job.runner is runner and job.live for job in self.jobs)
            if runner.phase in ("DRAINING", "TERMINATED") and not held and not live:
                runner.phase = "DRAINED"
                commands.append(("drained", self.runners.index(runner)))
        return commands


def freed_last(free, freed):
    """The one used last; of those never used, the lowest."""
    return max(free, key=lambda number: (freed.get(number, 0), -number))
