"""The plain rules of order: which job is launched next, in which batch, on which accounts."""

from __future__ import annotations

import math

from tests.unit.queue.plain_parts import LOOP, OWN, UNHURRIED, kind_of, size_of


class Order:
    """The half of the plain model that decides what is launched."""

    # --- accounts ---------------------------------------------------------------------------------

    def lift(self, job):
        """Raise accounts without queued jobs to the floor: idle time gives no credit."""
        runner = job.runner
        same = [
            other
            for other in self.jobs
            if other.state == "QUEUED" and other.runner is runner and other.priority == job.priority
        ]
        of_tenant = [other for other in same if other.lease is None and other.tenant == job.tenant]
        for queued, floors, account in zip(
            (same, of_tenant),
            (self.floors, runner.floors),
            job.accounts_now(self.fair),
            strict=False,
        ):
            if not queued:
                account.lift(floors.get(job.priority, 0.0))

    def take(self, job):
        """Charge a job's accounts what the job alone is expected to take.

        The floors first rise to the accounts' virtual times.
        """
        job.accounts, job.charged = job.accounts_now(self.fair), job.expected
        for floors, account in zip((self.floors, job.runner.floors), job.accounts, strict=False):
            floors[job.priority] = max(floors.get(job.priority, 0.0), account.virtual)
            account.charge(job.charged)

    def settle_accounts(self, job, seconds):
        """Charge the difference between the seconds that a job took and those charged before."""
        for account in job.accounts:
            account.charge(seconds - job.charged)

    # --- the order --------------------------------------------------------------------------------

    def due(self, job):
        if self.order == "arrival":
            return 0
        return job.submitted + UNHURRIED if job.deadline is None else job.deadline

    def rank(self, job):
        """Return a job's rank among the heads of all sources."""
        virtual = job.runner.account(OWN, job.priority).virtual if self.fair else 0
        return (job.priority, virtual, self.due(job), job.id)

    def tenant_rank(self, job):
        """Return a job's rank among the jobs of its runner."""
        virtual = job.runner.account(job.tenant, job.priority).virtual if self.fair else 0
        return (job.priority, virtual, self.due(job), job.id)

    def first_of(self, source):
        """Return the first job of a source that is queued and ripe."""
        queued = [job for job in self.jobs if job.state == "QUEUED" and job.source is source]
        rank = self.tenant_rank if source in self.runners else self.gate_rank
        return min((job for job in queued if self.is_ripe(job)), key=rank, default=None)

    def heads(self):
        """Yield the first job of each source that has a free slot."""
        for source in (*self.runners, *self.leases):
            head = self.first_of(source)
            if head is not None and self.can_start(source):
                yield head

    def best_for_a_lane(self):
        heads = [
            job
            for job in self.heads()
            if not job.is_lease_request and not job.runner.inline(job.bytes)
        ]
        return min(heads, key=self.rank, default=None)

    def is_either(self, job):
        """Whether a job may run on the loop or on a lane."""
        return job.runner.choice == "auto" and job.runner.inline(job.bytes)

    def best_of_either(self):
        heads = [job for job in self.heads() if not job.is_lease_request and self.is_either(job)]
        return min(heads, key=self.rank, default=None)

    def is_behind(self, job):
        """Whether the jobs queued behind a short one would keep the loop for too long."""
        if not self.is_either(job) or job.together is not None:
            return False
        queued = [other for other in self.jobs if other.state == "QUEUED"]
        others = [other for other in queued if other.source is job.source and other is not job]
        each = min(job.runner.limit, job.runner.bound(job.bytes))
        return len(others) * each > job.runner.backlog_limit

    def may_be_behind(self, job):
        """Whether a lane may be handed a job behind those that are there."""
        runs = self.open_runs(job.source)
        return any(len(self.behind(run)) < self.most_behind(job) for run in runs)

    # --- places -----------------------------------------------------------------------------------

    def can_start(self, source):
        if source in self.runners:
            return bool(self.free_slots(source)) and not source.closed
        return not any(run.source is source for run in self.runs)

    def free_slots(self, runner):
        taken = {lease.slot for lease in self.leases if lease.runner is runner and not lease.over}
        taken |= {run.slot for run in self.runs if run.runner is runner}
        return [slot for slot in range(runner.slots) if slot not in taken]

    def free_lanes(self):
        taken = {run.lane for run in self.runs}
        return [lane for lane in range(self.lanes) if lane not in taken]

    def free_cores(self):
        return self.cores - sum(
            run.runner.width for run in self.runs if run.lane != LOOP and not run.behind
        )

    def loop_is_free(self):
        return not any(run.lane == LOOP for run in self.runs) and self.budget_left > 0

    def has_place(self, job):
        if job.runner.inline(job.bytes):
            return self.loop_is_free()
        return bool(self.free_lanes()) and job.runner.width <= self.free_cores()

    def uncontended(self, job, now):
        """Return whether a new job may start at once: no other job wants its slot or place."""
        queued = any(other.state == "QUEUED" and other.source is job.source for other in self.jobs)
        if job.is_lease_request or queued or not self.can_start(job.source) or self.would_wait(job):
            return False
        if self.is_late(job, now):
            return False
        self.ripen(now)
        inline = job.runner.inline(job.bytes)
        rivals = [head for head in self.heads() if not head.is_lease_request]
        if any(head.runner.inline(head.bytes) == inline for head in rivals):
            return False
        if not inline and self.wants_a_lane():
            return False
        return self.has_place(job)

    def wants_a_lane(self):
        """Whether a short job wants a lane, since the loop is behind."""
        either = self.best_of_either()
        return either is not None and self.is_behind(either)

    # --- the next ---------------------------------------------------------------------------------

    def overdue(self, now):
        """Return the queued jobs that are overdue."""
        if self.max_wait is None:
            return []
        queued = [job for job in self.jobs if job.state == "QUEUED" and not job.is_lease_request]
        return [job for job in queued if now - job.submitted >= self.max_wait]

    def may_be_overdue(self):
        """Return whether the next launch may be of an overdue job.

        There are no two such launches in a row, and they take at most a quarter of the time.
        """
        return not self.regular_turn and self.credit >= 0

    def launched(self, job, *, overdue):
        self.regular_turn = overdue
        for member in job.run.members:
            member.overdue = overdue

    def took(self, job, seconds):
        self.credit = min(0.0, self.credit + seconds * (-0.75 if job.overdue else 0.25))

    def overdue_heads(self, now):
        """Yield the oldest overdue job of each source that has a free slot."""
        for source in (*self.runners, *self.leases):
            overdue = [job for job in self.overdue(now) if job.source is source]
            if overdue and self.can_start(source) and self.may_be_overdue():
                oldest = min(overdue, key=lambda job: (job.submitted, job.id))
                if (
                    oldest.together is None
                    or self.is_ripe(oldest)
                    or oldest.together not in oldest.runner.held
                ):
                    yield oldest

    def choose(self, now):
        """Return the job to launch next, whether it is overdue, and whether it leaves the loop.

        Only jobs with a free slot and a place to run are chosen.
        """
        on_loop = [job for job in self.overdue_heads(now) if job.runner.inline(job.bytes)]
        on_lane = [job for job in self.overdue_heads(now) if not job.runner.inline(job.bytes)]
        if not self.loop_is_free():
            on_loop = []
        if not self.free_lanes():
            on_lane = []
        best = (
            min(on_lane, key=lambda job: (job.submitted, job.id), default=None)
            or self.best_for_a_lane()
        )
        rivals = [*on_lane, best] if best is not None else []
        lane = bool(self.free_lanes())
        if best is not None and self.free_lanes() and best.runner.width > self.free_cores():
            self.met.add("waits for cores")
            lane = lane and not on_lane
            best, on_lane = None, []
        if on_loop + on_lane:
            return min(on_loop + on_lane, key=lambda job: (job.submitted, job.id)), True, False
        either = self.best_of_either()
        behind = either is not None and self.is_behind(either)
        leaves = behind and lane and either.runner.width <= self.free_cores()
        leaves = leaves and all(self.rank(either) < self.rank(job) for job in rivals)
        fresh = self.loop_is_free() and self.budget_left == self.budget

        def can_go(job):
            if job.is_lease_request:
                return True
            if self.is_either(job) and job is not either:
                return False
            if behind and job is either:
                return leaves or (fresh and not self.may_be_behind(job))
            if job.runner.inline(job.bytes):
                return self.loop_is_free()
            return job is best and bool(self.free_lanes())

        job = min(filter(can_go, self.heads()), key=self.rank, default=None)
        if job is not None and behind and job is either:
            self.met.add("leaves a loop that is behind" if leaves else "one of a turn")
        return job, False, leaves and job is either

    # --- late -------------------------------------------------------------------------------------

    def is_late(self, job, now):
        typical = job.runner.typical(job.bytes)
        if (
            not self.expire_late
            or job.is_lease_request
            or job.unchecked
            or job.deadline is None
            or typical is None
        ):
            return False
        others = any(other.state == "QUEUED" and other is not job for other in self.jobs)
        return now + (job.runner.bound(job.bytes) if others else typical) > job.deadline

    def tried(self, job, now):
        """Return whether to run a job that is predicted to be late, as a probe.

        A probe is run when no run of the size was seen for long.
        """
        seen, kind = job.runner.seen, kind_of(job.bytes)
        if now - seen[kind] < max(1.0, 8 * job.runner.bound(job.bytes)):
            return False
        seen[kind] = now
        job.unchecked = True
        self.met.add("probed")
        return True

    def too_late(self, job, now):
        """Return whether a job expires instead of being launched."""
        if job.deadline is not None and job.deadline <= now:
            return True
        if not self.is_late(job, now) or self.tried(job, now):
            return False
        self.met.add("late")
        return True

    # --- batches ----------------------------------------------------------------------------------

    def company_of(self, leader):
        """Return the bytes and the number of jobs of the batch that a leader could have.

        Where there are too many rows for one batch, all jobs count as average ones.
        """
        others = [
            job for job in self.own(leader.runner, "QUEUED") if job.together == leader.together
        ]
        together = [leader, *(job for job in others if job is not leader)]
        size, rows = sum(job.bytes for job in together), sum(job.rows for job in together)
        most = leader.runner.batching[0]
        if rows <= most:
            return size, len(together)
        return size * most // rows, max(1, len(together) * most // rows)

    def leaves_the_loop(self, job):
        """Return whether a job that was chosen for the loop goes to a lane.

        Its batch is larger than the loop can take, and no other job wants the lane.
        """
        if job.together is None or not self.free_lanes() or job.runner.width > self.free_cores():
            return False
        if any(
            not head.is_lease_request and not head.runner.inline(head.bytes)
            for head in self.heads()
        ):
            return False
        if self.wants_a_lane():
            return False
        leaves = not job.runner.grows(*self.company_of(job))
        if leaves:
            self.met.add("leaves the loop")
        return leaves

    def put_together(self, leader, now, *, inline):
        """Return the members of a batch, the leader first, and the commands for expired jobs."""
        members, commands = [leader], []
        leader.state = "RUNNING"
        self.take(leader)
        if leader.together is None:
            return members, commands
        others = self.of_key(leader.runner, leader.together)
        lengths = sorted({job.length for job in others})
        up_to = [length for length in reversed(lengths) if length <= leader.length]
        above = [length for length in lengths if length > leader.length]
        free = not inline or (len(lengths) == 1 and leader.runner.grows(*self.company_of(leader)))
        limits = self.limits(leader, others, now)
        for priority in (0, 1, 2):
            for side in (up_to, above):
                for length in side:
                    same = (priority, length)
                    found, on = self.join(same, members, limits, now, free=free)
                    commands += found
                    if not on:
                        break
        return members, commands

    def limits(self, leader, others, now):
        """Return the grains that a batch may take; None while nothing is known."""
        alone = leader.runner.takes(leader.length * leader.rows)
        seconds = leader.runner.batching[2]
        if not alone:
            return None if seconds == math.inf else 0
        if seconds is None:
            higher = [at for kind, at in self.last.items() if kind < leader.priority]
            promised = any(now - at < 10 for at in higher)
            self.met.add("a promise" if promised else "no promise")
            limit = max(1 << 20, (2 if promised else 8) * alone)
            if promised and others:
                usual = sum(job.bytes for job in others) // len(others)
                if limit < 2 * leader.runner.takes(usual):
                    limit = 2 * leader.runner.takes(usual)
                    self.met.add("a short leader")
        else:
            limit = self.in_grains(seconds)
        waiting = [job for job in self.jobs if job.state == "QUEUED"]
        latest = [job.latest for job in waiting if job.priority < leader.priority]
        latest += [] if leader.deadline is None else [leader.deadline]
        if latest:
            latest = min(latest)
            if self.in_grains((latest - now) * 0.75) < limit:
                self.met.add("a batch hurries")
            limit = min(limit, self.in_grains((latest - now) * 0.75))
        return limit

    def in_grains(self, seconds):
        return 1 << 62 if seconds == math.inf else math.trunc(seconds * 2.0**30)

    def room_of(self, members, limit, now):
        """Return the most bytes of a batch."""
        leader = members[0]
        size = leader.rows * leader.length
        if limit is None:
            return math.inf
        if not limit and not leader.runner.takes(size):
            return size
        late = [job.deadline for job in members[1:] if job.deadline is not None]
        others = [self.in_grains((deadline - now) * 0.75) for deadline in late]
        limits = [limit, *(other for other in others if other < limit)]
        return min(leader.runner.room(size, one, now) for one in limits)

    def join(self, same, members, limit, now, *, free):
        """Let queued jobs of a class and a length join.

        Returns:
            The commands for expired jobs, and whether jobs of other lengths may join, too.
        """
        leader, commands = members[0], []
        runner = leader.runner
        most, _, _, most_tokens = runner.batching
        while True:
            rows = sum(job.rows for job in members)
            size = rows * max(job.length for job in members)
            room, tokens = self.room_of(members, limit, now), max(job.tokens for job in members)
            most_tokens = most_tokens or math.inf
            if (
                rows + 1 > most
                or (rows + 1) * tokens > most_tokens
                or size // rows * (rows + 1) > room
            ):
                return commands, False
            others = [job for job in self.of_key(runner, leader.together) if job.length == same[1]]
            job = min(others, key=self.tenant_rank, default=None)
            if job is None or job.priority != same[0]:
                return commands, True
            if job.deadline is not None and job.deadline <= now:
                self.met.add("a rider expires")
                commands.append(self.expire(job))
                continue
            together = size_of([*members, job])
            rows += job.rows
            if rows > most or rows * max(tokens, job.tokens) > most_tokens or together > room:
                self.met.add("a rider does not fit")
                return commands, True
            if together > self.room_of([*members, job], limit, now):
                self.met.add("a rider is too hurried")
                return commands, True
            apart = max(1 << 20, runner.takes(size) + runner.takes(job.rows * job.length))
            if (
                job.length * sum(one.rows for one in members) != size
                and runner.takes(together) > apart
            ):
                self.met.add("a rider does not pay")
                return commands, False
            if not free and not runner.grows(together, len(members) + 1):
                self.met.add("grows no more")
                return commands, False
            if self.too_late(job, now):
                self.met.add("a rider is late")
                commands.append(self.expire(job))
                continue
            self.met |= {"longer rides"} if together // rows > size // (rows - job.rows) else set()
            self.met |= {"shorter rides"} if job.length < together // rows else set()
            members.append(job)
            job.state = "RUNNING"
            self.take(job)
