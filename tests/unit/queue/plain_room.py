"""The plain rules of room: which jobs fit, wait, are shed, or are predicted to be late."""

from __future__ import annotations

import math

VICTIMS = 32
"""The most jobs that are shed for one new job."""


class Room:
    """The half of the plain model that decides what is queued."""

    def of(self, runner, *states):
        """Return the jobs of a runner and its leases that are in one of the states.

        Jobs that wait for an epoch or for other jobs of their tenant are left out.
        """
        return [
            job
            for job in self.jobs
            if job.runner is runner and job.state in states and job.waits_for in ("", "room")
        ]

    def of_lease(self, lease, *states):
        return [job for job in self.jobs if job.lease is lease and job.state in states]

    def own(self, runner, *states):
        return [job for job in self.of(runner, *states) if job.lease is None]

    def waiting_for(self, what, runner):
        return [
            job
            for job in self.jobs
            if job.runner is runner and job.state == "WAITING" and job.waits_for == what
        ]

    def line(self, runner, tenant):
        """Return the jobs that wait for other jobs of the same tenant, in their order."""
        line = [job for job in self.waiting_for("tenant", runner) if job.tenant == tenant]
        return sorted(line, key=lambda job: job.id)

    # --- what fits --------------------------------------------------------------------------------

    def fits_tenant(self, job, without=()):
        if job.bypasses_limits:
            return True
        same = [
            other
            for other in self.own(job.runner, "WAITING", "QUEUED")
            if other.tenant == job.tenant and not other.bypasses_limits
        ]
        return len([other for other in same if other not in without]) < job.runner.tenant_jobs

    def fits(self, job, without=()):
        """Return whether a job fits in the bounds of its own source."""
        queued = self.of_lease(job.lease, "QUEUED") if job.lease else self.of(job.runner, "QUEUED")
        queued = [other for other in queued if other not in without and not other.bypasses_limits]
        size = sum(other.bytes for other in queued)
        return len(queued) < job.runner.jobs and size + job.bytes <= job.runner.bytes

    def fits_device(self, job, without=()):
        queued = [
            other
            for other in self.jobs
            if other.state == "QUEUED" and other not in without and not other.bypasses_limits
        ]
        size = sum(other.bytes for other in queued)
        return len(queued) < self.jobs_bound and size + job.bytes <= self.bytes_bound

    def never_fits(self, job):
        if job.bypasses_limits:
            return False
        jobs = [job.runner.jobs, self.jobs_bound] + [job.runner.tenant_jobs] * (job.lease is None)
        return job.bytes > min(job.runner.bytes, self.bytes_bound) or min(jobs) < 1

    # --- which jobs wait --------------------------------------------------------------------------

    def gate_rank(self, job):
        return (job.priority, self.due(job), job.id)

    def gate_heads(self):
        """Yield the first job at each runner's gate, if it fits in the runner's bounds.

        These jobs contend for the device's room.
        """
        for runner in self.runners:
            gate = self.own(runner, "WAITING")
            if gate and self.fits(head := min(gate, key=self.gate_rank)):
                yield head

    def others_wait(self, job):
        """Return whether other jobs wait that a new job may not overtake."""
        if job.lease is not None:
            return bool(self.of_lease(job.lease, "WAITING"))
        return bool(
            self.line(job.runner, job.tenant)
            or self.own(job.runner, "WAITING")
            or list(self.gate_heads())
        )

    def must_wait(self, job):
        if job.bypasses_limits:
            return False
        if self.others_wait(job) or not self.fits(job):
            return True
        return job.lease is None and not (self.fits_device(job) and self.fits_tenant(job))

    def crowded(self, job):
        """Return whether too many jobs wait for room already."""
        if job.lease is not None:
            waits = self.of_lease(job.lease, "WAITING")
        else:
            waits = self.own(job.runner, "WAITING") + self.waiting_for("tenant", job.runner)
        if len(waits) < job.runner.waiting:
            return False
        self.met.add("too many wait")
        return True

    def waits_where(self, job):
        if job.lease is None and (self.line(job.runner, job.tenant) or not self.fits_tenant(job)):
            self.met.add("waits for its tenant")
            return "tenant"
        return "room"

    def next_admitted(self):
        """Who has waited for room, and is queued next."""
        for runner in self.runners:
            for tenant in {job.tenant for job in self.waiting_for("tenant", runner)}:
                while (line := self.line(runner, tenant)) and self.fits_tenant(line[0]):
                    line[0].waits_for = "room"
        for lease in self.leases:
            gate = self.of_lease(lease, "WAITING")
            if gate and self.fits(head := min(gate, key=self.gate_rank)):
                return head
        head = min(self.gate_heads(), key=self.gate_rank, default=None)
        return head if head is not None and self.fits_device(head) else None

    def enter(self, job, now):
        """Queue a job."""
        self.lift(job)
        job.state, job.waits_for = "QUEUED", ""
        job.expected = job.runner.expected(job.bytes)
        job.latest = self.latest_start(job)
        return [] if job.together is None else self.joins(job, now)

    def latest_start(self, job):
        """Return when a queued job has to start, to end before its deadline, as it is known now."""
        if job.deadline is None:
            return math.inf
        bound = job.runner.bound(job.bytes)
        return job.deadline - (bound if bound < math.inf else 0.0)

    # --- which jobs are rejected or shed ----------------------------------------------------------

    def refusal(self, job, now, *, new):
        """Return the error of a job that is rejected whatever room there is; None otherwise."""
        runner = job.runner
        if job.lease is not None and runner.phase in ("TERMINATED", "DRAINED"):
            return "RunnerClosedError"
        if job.lease is not None and job.lease.released:
            return "LeaseError"
        if job.lease is None and runner.phase != "OPEN":
            return "RunnerClosedError"
        if self.never_fits(job):
            return "QueueFullError"
        if job.min_epoch > job.source.epoch:
            if job.lease or job.min_epoch <= runner.published:
                return "EpochError"
            full = new and len(self.waiting_for("epoch", runner)) >= runner.jobs
            return "QueueFullError" if full else None
        return "DeadlineUnreachableError" if new and self.unreachable(job, now) else None

    def to_shed(self, job):
        """Return the jobs to shed for a new job, in order; None when shedding does not help."""
        if not self.must_wait(job):
            return []
        if not job.runner.sheds or job.lease or self.others_wait(job):
            return None

        def badness(other):
            return (
                other.priority,
                math.inf if other.deadline is None else other.deadline,
                other.id,
            )

        own = [other for other in self.own(job.runner, "QUEUED") if not other.is_lease_request]
        tenants = [other for other in own if other.tenant == job.tenant]
        shedding = [runner for runner in self.runners if runner.sheds]
        all_there_are = [
            other
            for runner in shedding
            for other in self.own(runner, "QUEUED")
            if not other.is_lease_request
        ]
        chosen = []
        bounds = ((self.fits_tenant, tenants), (self.fits, own), (self.fits_device, all_there_are))
        for fits, candidates in bounds:
            while not fits(job, chosen):
                worse = [other for other in candidates if badness(other) > badness(job)]
                worse = [other for other in worse if other not in chosen]
                if not worse or len(chosen) == VICTIMS:
                    return None
                chosen.append(max(worse, key=badness))
        if len(chosen) > 1:
            self.met.add("several are shed")
        return chosen

    def unreachable(self, job, now):
        """Return whether a new job is predicted to miss its deadline, and is not a probe."""
        runner, typical = job.runner, job.runner.typical(job.bytes)
        if not runner.predicts or job.lease or job.is_lease_request or typical is None:
            return False
        if job.deadline is None or job.deadline <= now:
            return False
        if now + self.wait(job, now) + typical <= job.deadline or self.tried(job, now):
            return False
        self.met.add("refused by prediction")
        return True

    def wait(self, job, now):
        queued = [other for other in self.jobs if other.state == "QUEUED"]
        runner = job.runner
        if not queued and self.can_start(runner) and self.has_place(job):
            return 0.0
        runners = {other.runner for other in queued} | {runner}
        ahead = [other for other in queued if other.priority <= job.priority]
        ahead_all = sum(other.expected for other in ahead)
        ahead_own = sum(other.expected for other in ahead if other.runner is runner)

        def rest(run):
            return max(0.0, run.runner.expected(run.bytes) - (now - run.started) * run.runner.width)

        running = sum(map(rest, self.runs))
        running_own = sum(rest(run) for run in self.runs if run.runner is runner)
        if self.fair:
            of_tenant = [
                other for other in queued if other.runner is runner and other.tenant == job.tenant
            ]
            same = sum(other.expected for other in of_tenant if other.priority == job.priority)
            higher = sum(
                other.expected
                for other in queued
                if other.runner is runner and other.priority < job.priority
            )
            busy = {other.tenant for other in queued if other.runner is runner} | {job.tenant}
            ahead_own = min(ahead_own, higher + same * len(busy))
        capacity = min(self.cores, runner.slots * runner.width)
        fraction = runner.share / sum(other.share for other in self.runners if other in runners)
        self.met.add("waits by prediction")
        return max(
            min(
                (running + ahead_all) / self.cores,
                ahead_own / (capacity * fraction) + running / self.cores,
            ),
            (ahead_own + running_own) / capacity,
        )

    # --- which keys are ripe ----------------------------------------------------------------------

    def ripens_at(self, job):
        """Return when a job makes its key ripe without further jobs; -inf for at once."""
        runner, delay = job.runner, job.runner.batching[1]
        if not delay or self.max_wait == 0:
            return -math.inf
        at = job.submitted + (delay if self.max_wait is None else min(delay, self.max_wait))
        return at if job.deadline is None else min(at, job.deadline - 3 * runner.bound(job.bytes))

    def would_wait(self, job):
        """Return whether a new job is queued, even in an empty queue, since others may join it."""
        if job.together is None:
            return False
        delays = job.runner.batching[1] > 0 and self.max_wait != 0
        return delays or job.runner.gathering or job.runner.got > 0

    def came(self, job):
        """Note that a batchable job is queued, or launched at once."""
        if job.together is None:
            return []
        job.runner.got += 1
        job.runner.gathering |= job.runner.got > 1
        return self.ask_for_turn()

    def joins(self, job, now):
        """Note that a key has one more queued job."""
        runner, key = job.runner, job.together
        commands = self.came(job)
        if self.of_key(runner, key) == [job]:  # the first job of a key starts anew
            runner.ripe.discard(key)
            runner.held.discard(key)
            runner.ripe_at.pop(key, None)
        if key not in runner.ripe and runner.gathering:
            self.met.add("gathers")
            runner.held.add(key)
        runner.ripe_at[key] = min(runner.ripe_at.get(key, math.inf), self.ripens_at(job))
        self.see_ripeness(runner, key, now)
        return commands

    def of_key(self, runner, key):
        return [job for job in self.own(runner, "QUEUED") if job.together == key]

    def ripen(self, now):
        """Make all keys ripe that have waited long enough, or whose turn of the loop has ended."""
        for job in self.jobs:
            if job.state == "QUEUED" and not self.is_ripe(job):
                self.see_ripeness(job.runner, job.together, now)

    def see_ripeness(self, runner, key, now):
        """Make a key ripe if it is due. A ripe key stays ripe while it has queued jobs."""
        rows = sum(job.rows for job in self.of_key(runner, key))
        tokens = sum(job.rows * job.tokens for job in self.of_key(runner, key))
        full = rows >= runner.batching[0] or now >= runner.ripe_at[key]
        full |= tokens >= (runner.batching[3] or math.inf)
        if runner.phase != "OPEN" or (full and key not in runner.held):
            runner.ripe.add(key)
        elif key not in runner.ripe:
            self.met.add("ripens")

    def is_ripe(self, job):
        return job.together is None or job.together in job.runner.ripe

    def ripe_times(self, *, held=False):
        """Return the times at which waiting keys get ripe.

        With `held`, the keys that are held until the next turn are included.
        """
        return {
            job.runner.ripe_at[job.together]
            for job in self.jobs
            if job.state == "QUEUED" and not self.is_ripe(job)
            if held or job.together not in job.runner.held
        }
