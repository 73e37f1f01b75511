"""The plain model: the queue's rules once more, simple and slow.

The model makes each decision by looking at all jobs and runs. There are no heaps, no stale entries
and no counts kept beside the counted things. The model shares no code with the package, so that the
two can be compared. The facts of `walks.py` are its methods, which return the commands as tuples.
`plain_room` decides which jobs are queued, `plain_order` which are launched.
"""

from __future__ import annotations

import math

from tests.unit.queue.plain_order import Order
from tests.unit.queue.plain_parts import (
    LIVE,
    LOOP,
    SLICE,
    Illegal,
    Job,
    Lease,
    Run,
    Runner,
    freed_last,
    kind_of,
)
from tests.unit.queue.plain_room import Room


class PlainModel(Room, Order):
    def __init__(
        self,
        lanes,
        jobs,
        size,
        budget,
        *,
        cores=None,
        order="deadline",
        fair=True,
        expire_late=True,
        max_wait=None,
        keeps_lanes=False,
        most_lanes=None,
    ):
        self.lanes = lanes
        self.cores = lanes if cores is None else cores
        self.order, self.fair, self.expire_late, self.max_wait = order, fair, expire_late, max_wait
        self.keeps_lanes, self.most_lanes = keeps_lanes, most_lanes
        self.budget = self.budget_left = budget
        self.turn_asked = False
        self.goes_on = False  # a fact has left something to `go_on`
        self.regular_turn, self.credit = False, 0.0
        self.jobs_bound = math.inf if jobs is None else jobs
        self.bytes_bound = math.inf if size is None else size
        self.last = {}  # when a job of each class came last, once a runner makes batches
        self.floors = {}  # by class: the virtual time at which a runner's account begins
        self.now = 0.0  # of the fact that is being answered
        self.runners = []
        self.leases = []
        self.jobs = []
        self.runs = []
        self.ids = 0
        self.moments = 0
        self.lanes_freed = {}
        self.met = set()  # the rarer rules that were used

    # --- facts ------------------------------------------------------------------------------------

    def add_runner(self, name, slots, bounds, placing, rest):
        """Add a runner.

        Args:
            name: Its name.
            slots: How many slots it gives out.
            bounds: The most jobs, bytes, and jobs of one tenant.
            placing: The choice, the limit, the limits for one and more jobs handed ahead, the hop,
                and the limit of the backlog.
            rest: Other fields of `Runner`.
        """
        if any(runner.name == name and not runner.removed for runner in self.runners):
            raise Illegal
        if not 1 <= rest.get("width", 1) <= self.cores:
            raise Illegal
        bounds = (math.inf if bound is None else bound for bound in bounds)
        if rest.get("batching") and not any(runner.batching for runner in self.runners):
            for job in self.jobs:
                if job.state == "QUEUED":
                    job.latest = self.latest_start(job)
        self.runners.append(Runner(name, slots, *bounds, *placing, **rest))
        slots = sum(runner.slots for runner in self.runners if not runner.removed)
        more = min(slots, self.most_lanes or 0) - self.lanes
        if more > 0:
            self.met.add("more lanes")
            self.lanes += more
            self.cores += more
        return []

    def submit(self, now, number, source, wait, wish, since=None):
        """Submit a job.

        Args:
            now: The present time.
            number: The job's number; one that was used before is illegal.
            source: ("runner", number) or ("lease", number).
            wait: Whether the job waits when there is no room.
            wish: The job's other fields.
            since: When the job was accepted at another replica; None for a new job.
        """
        kind, which = source
        lease = self.leases[which - 1] if kind == "lease" else None
        runner = lease.runner if lease else self.runners[which]
        exempt = wish.get("bypasses_limits", False)
        if number < len(self.jobs) or (lease and wish["is_lease_request"]):
            raise Illegal
        if exempt and (not wish["is_lease_request"] or wish["bytes"] or wish["min_epoch"]):
            raise Illegal
        self.ids += 1
        job = Job(
            number, runner, lease, **wish, id=self.ids, submitted=now if since is None else since
        )
        self.jobs.append(job)
        if any(other.batching for other in self.runners):
            self.last[job.priority] = now
        runner.counters["submitted"] += 1
        refusal = self.refusal(job, now, new=since is None)
        awaits = job.min_epoch > job.source.epoch
        shed = [] if awaits or wait or refusal else self.to_shed(job)
        if not (awaits or refusal) and wait and since is None and self.must_wait(job):
            shed = None if self.crowded(job) else []
        if refusal or shed is None:
            self.end(job, "REJECTED")
            why = refusal or "QueueFullError"
            runner.rejections[why] = runner.rejections.get(why, 0) + 1
            return [("reject", number, why)]
        if job.deadline is not None and job.deadline <= now:
            return [self.expire(job)]
        if awaits:
            job.state, job.waits_for = "WAITING", "epoch"
            return []
        for other in shed:
            self.end(other, "SHED")
        commands = [("shed", other.number) for other in shed]
        if self.must_wait(job):
            job.state, job.waits_for = "WAITING", self.waits_where(job)
            return commands + self.settle(now)
        if not self.uncontended(job, now):
            commands += self.enter(job, now) + self.settle(now)
            return commands + self.follow([job.source], now) + self.over()
        job.expected = job.runner.expected(job.bytes)
        self.lift(job)
        commands += self.came(job) + self.launch(job, now)
        self.launched(job, overdue=False)
        if not any(other.state == "QUEUED" for other in self.jobs):
            self.credit = 0.0
        return commands + self.settle(now)

    def complete(self, now, number, ok):
        run = self.jobs[number].run
        if run is None or run.members[0].number != number:
            raise Illegal
        runner, counters, seconds = run.runner, run.runner.counters, now - run.started
        failed_together = not ok and len(run.members) > 1
        run.to_come += [job for job in run.members if failed_together]
        if run.lane == LOOP:
            self.budget_left -= seconds
            counters["inline"] += len(run.members)
        for job in run.members:
            part = run.part(job, seconds)
            counters["queue_seconds"] += 0 if run.again else run.started - job.submitted
            counters["run_seconds"] += part
            if job.state != "RUNNING" or failed_together:
                counters["wasted_seconds"] += part
            if job.state == "RUNNING" and not failed_together:
                self.end(job, "DONE" if ok else "FAILED", "completed" if ok else "failed")
                late = job.deadline is not None and job.deadline < now
                counters["in_time"] += ok and not late
            job.began = run.started
            if job.state != "RUNNING":
                values = self.values_of(job)
                values["run"].append(seconds)
                values["batch_size"].append(len(run.members))
            self.settle_accounts(job, part * runner.width)
            self.took(job, part * runner.width)
            job.run = None
        commands = [] if failed_together else self.see_health(runner, ok=ok)
        self.learn(run, seconds, now, ok=ok)
        commands += self.leave_lane(run, now)
        self.retire()
        commands += self.settle(now, over=False)
        return commands + self.follow([run.source], now) + self.over()

    def turn(self, now):
        self.budget_left, self.turn_asked = self.budget, any(run.lane == LOOP for run in self.runs)
        gathering = [runner for runner in self.runners if runner.got]
        for runner in gathering:
            if runner.got <= 1:
                runner.gathering = False
            runner.got, runner.held = 0, set()
        commands = [("next turn",)] * self.turn_asked + self.settle(now)
        return commands + self.follow(gathering, now)

    def cancel(self, now, number):
        job = self.jobs[number]
        if job.state not in LIVE:
            raise Illegal
        self.end(job, "CANCELLED")
        self.retire()
        return self.settle(now)

    def tick(self, now):
        return self.expire_due(now) + self.settle(now)

    def go_on(self, now):
        self.goes_on = False
        self.move_some()
        return self.expire_due(now) + self.settle(now)

    def release(self, now, number):
        self.leases[number - 1].released = True
        self.retire()
        return self.settle(now)

    def drain_runner(self, now, number):
        runner = self.known(number)
        if runner.phase == "OPEN":
            runner.phase = "DRAINING"
        return self.revoke(self.waiting_for("epoch", runner)) + self.settle(now)

    def terminate_runner(self, now, number):
        runner = self.known(number)
        if runner.phase in ("TERMINATED", "DRAINED"):
            return []
        runner.phase = "TERMINATED"
        commands = self.revoke(
            [
                job
                for job in self.jobs
                if job.runner is runner and job.state in ("WAITING", "QUEUED")
            ]
        )
        for lease in self.leases:
            if lease.runner is runner:
                lease.released = True
        self.retire()
        return commands + self.settle(now)

    def withdraw(self, now, number):
        runner = self.known(number)
        jobs = [
            job for job in self.jobs if job.runner is runner and job.state in ("WAITING", "QUEUED")
        ]
        jobs = [job for job in jobs if job.lease is None and not job.bypasses_limits]
        self.met |= {f"withdrawn {job.waits_for}" for job in jobs}
        jobs.sort(key=lambda job: job.id)
        return self.end_all(jobs, "WITHDRAWN", "withdraw") + self.settle(now)

    def when_finished(self, now, number, wish):
        job = Job(-1, self.known(number), None, **wish, is_lease_request=False, deadline=None)
        return [("in", round(self.wait(job, now) + (job.runner.typical(job.bytes) or 0.0), 9))]

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
        return self.revoke(self.in_line_for(runner) if abort else []) + self.settle(now)

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
            commands = self.revoke(
                [job for job in self.in_line_for(runner) if job.min_epoch > epoch]
            )
            self.move_some()
        return commands + self.settle(now)

    # --- lookups ----------------------------------------------------------------------------------

    def known(self, number):
        if self.runners[number].removed:
            raise Illegal
        return self.runners[number]

    def in_line_for(self, runner):
        """Return a runner's own jobs in the queue, at the gate and in the tenants' lines."""
        return self.own(runner, "WAITING", "QUEUED") + self.waiting_for("tenant", runner)

    # --- what follows -----------------------------------------------------------------------------

    def settle(self, now, *, over=True):
        """Everything goes that can. After a slice of jobs, the rest is left to `go_on`."""
        commands, admitted, late = [], 0, 0
        while True:
            self.ripen(now)
            while admitted < SLICE and (job := self.next_admitted()) is not None:
                commands += self.enter(job, now)
                admitted += 1
            self.ripen(now)
            if SLICE in (admitted, late):
                self.goes_on = True
                break
            job, overdue, leaves = self.choose(now)
            if job is None:
                break
            if self.too_late(job, now):
                commands.append(self.expire(job))
                late += 1
            elif job.is_lease_request:
                commands.append(self.grant(job, now))
            else:
                if overdue:
                    self.met.add("overdue")
                commands += self.launch(job, now, leaves=leaves)
                self.launched(job, overdue=overdue)
        return commands + self.over() if over else commands

    def slot_for(self, job):
        if job.lease is not None:
            return job.lease.slot
        return freed_last(self.free_slots(job.runner), job.runner.freed)

    def lane_for(self, runner, slot):
        """Return the free lane that a run on a slot goes to."""
        free = self.free_lanes()
        if self.keeps_lanes:
            if (last := runner.last_lanes.get(slot)) in free:
                self.met.add("a lane that the slot keeps")
                return last
            here = [other for other in self.runners if not other.removed]
            kept = {lane for other in here for lane in other.last_lanes.values()}
            if not kept.issuperset(free):
                free = [lane for lane in free if lane not in kept]
            else:
                self.met.add("a lane that another slot keeps")
        return freed_last(free, self.lanes_freed)

    def grant(self, job, now):
        slot = self.slot_for(job)
        job.runner.counters["queue_seconds"] += now - job.submitted
        job.runner.counters["in_time"] += 1
        self.end(job, "DONE", "completed")
        lease = Lease(len(self.leases) + 1, job.runner, slot, job.runner.epoch)
        self.leases.append(lease)
        return ("grant", job.number, lease.number, lease.slot)

    def launch(self, job, now, behind=None, *, leaves=False):
        """Run a job, with the members of its batch, on a lane or the loop.

        With `behind`, the job is handed ahead to that run's lane and slot. With `leaves`, a job
        that belongs on the loop goes to a lane.
        """
        inline = job.runner.inline(job.bytes) and not leaves and not self.leaves_the_loop(job)
        slot = behind.slot if behind else self.slot_for(job)
        lane = behind.lane if behind else LOOP if inline else self.lane_for(job.runner, slot)
        if lane != LOOP:
            job.runner.last_lanes[slot] = lane
        members, commands = self.put_together(job, now, inline=inline)
        run = Run(members, lane, slot, now, 0.0, behind is not None)
        run.expected = job.runner.expected(run.bytes)
        if len(members) > 1:
            self.see_batch(run)
        if lane != LOOP and not behind and job.runner.short(run.bytes):
            self.moments += 1
            run.opened = self.moments
        return commands + self.start(run)

    def see_batch(self, run):
        counters = run.runner.counters
        counters["batches"] += 1
        counters["batched"] += len(run.members)
        self.met.add("a batch behind another" if run.behind else "a batch")
        if run.lane == LOOP:
            self.met.add("a batch inline")

    def start(self, run):
        self.runs.append(run)
        for job in run.members:
            job.state, job.run = "RUNNING", run
        batch = tuple(job.number for job in run.members) if len(run.members) > 1 else ()
        commands = [("launch", run.members[0].number, run.lane, run.slot, batch)]
        return commands + (self.ask_for_turn() if run.lane == LOOP else [])

    def ask_for_turn(self):
        asked, self.turn_asked = self.turn_asked, True
        return [] if asked else [("next turn",)]

    def follow(self, sources, now):
        """Hand the next jobs of the sources ahead, the best job first."""
        commands = []
        while jobs := [self.first_of(source) for source in sources if self.hands_on(source, now)]:
            job = min(jobs, key=self.rank)
            open_runs = self.open_runs(job.source)
            first = min(open_runs, key=lambda run: (len(self.behind(run)), -run.opened))
            commands += self.launch(job, now, behind=first)
            if len(self.behind(first)) > 1:
                self.met.add("several behind one")
            if len(self.behind(first)) >= self.most_behind(job):
                first.opened = None
            self.launched(job, overdue=False)
            commands += self.settle(now, over=False)
        return commands

    def open_runs(self, source):
        """The short runs of the source whose lanes may be given more jobs."""
        return [run for run in self.runs if run.source is source and run.opened is not None]

    def behind(self, run):
        """What was handed ahead to the lane of a run."""
        return [other for other in self.runs if other.behind and other.lane == run.lane]

    def most_behind(self, job):
        """How many jobs like this one may be behind the run of a lane."""
        bound, limit = job.runner.bound(job.bytes), job.runner.ahead_limit
        together = [number for number in range(1, 8) if number * bound <= limit]
        most = max(together, default=1) if job.together is None else 1
        return most if job.runner.short(job.bytes) else 0

    def hands_on(self, source, now):
        """Whether a lane may be given the source's next job behind the one that it runs."""
        head = self.first_of(source)
        if head is None or not self.open_runs(source) or getattr(source, "closed", False):
            return False
        runner, either = head.runner, self.best_of_either()
        rivals = [self.best_for_a_lane(), either if self.wants_a_lane() else None]
        if head.is_lease_request or not runner.short(head.bytes):
            return False
        if runner.inline(head.bytes) and not self.is_behind(head):
            return False
        if not self.may_be_behind(head):
            return False
        passed = head.deadline is not None and head.deadline <= now
        if (
            passed
            or self.is_late(head, now)
            or any(rival is not None and self.rank(rival) < self.rank(head) for rival in rivals)
        ):
            return False
        if not self.may_be_overdue():
            return True
        waits = [job for job in self.overdue_heads(now) if not job.runner.inline(job.bytes)]
        return not waits and all(job.source is not source for job in self.overdue(now))

    def leave_lane(self, run, now):
        """Pass a run's lane and slot on to a member to retry or to the job behind, or free them."""
        self.runs.remove(run)
        self.moments += 1
        others = [other for other in self.runs if other.lane == run.lane]
        to_come = [job for job in run.to_come if job.state == "RUNNING"]
        if others:
            first = next((other for other in others if not other.behind), others[0])
            retried = to_come or any(other.again for other in others)
            first.behind, first.opened = False, None if retried else self.moments
        if to_come:
            return self.run_again(to_come, run, now, behind=bool(others))
        if not others:
            self.lanes_freed[run.lane] = self.moments
            if run.source is run.runner:
                run.runner.freed[run.slot] = self.moments
        return []

    def run_again(self, jobs, run, now, *, behind):
        """Retry the first of a failed batch's members alone; the others follow one by one."""
        job, *to_come = jobs
        self.take(job)
        job.runner.counters["retried"] += 1
        self.met.add("run again behind another" if behind else "run again")
        again = Run([job], run.lane, run.slot, now, 0.0, behind, again=True, to_come=to_come)
        return self.start(again)

    def learn(self, run, seconds, now, *, ok):
        runner, kind = run.runner, kind_of(run.bytes)
        if run.lane == LOOP and seconds > self.budget:
            for larger in [known for known in runner.times if known >= kind]:
                del runner.times[larger]
        elif ok:
            runner.times.setdefault(kind, []).append((max(1, run.bytes), seconds))
            runner.seen[kind] = now

    def see_health(self, runner, *, ok):
        if ok:
            runner.failures, runner.failing = 0, False
            return []
        runner.failures += 1
        if runner.failures < 5 or runner.failing:
            return []
        runner.failing = True
        return [("failing", self.runners.index(runner))]

    def expire_due(self, now):
        """Expire jobs whose deadline has passed, the earliest first."""
        due = [
            job
            for job in self.jobs
            if job.state in LIVE and job.deadline is not None and job.deadline <= now
        ]
        self.goes_on |= len(due) > SLICE
        due.sort(key=lambda job: (job.deadline, job.number))
        return [self.expire(job) for job in due[:SLICE]]

    def expire(self, job):
        self.end(job, "EXPIRED")
        self.retire()
        return ("expire", job.number)

    def revoke(self, jobs):
        return self.end_all(jobs, "REVOKED", "revoke")

    def end_all(self, jobs, state, command):
        """End jobs together. The order of slices is not promised, so this ends all at once."""
        self.goes_on |= len(jobs) >= SLICE
        for job in jobs:
            self.end(job, state)
        return [(command, job.number) for job in jobs]

    def move_some(self):
        """Jobs whose epoch has come wait for room from now on, in the order of arrival."""
        jobs = [
            job
            for runner in self.runners
            for job in self.waiting_for("epoch", runner)
            if job.min_epoch <= runner.epoch
        ]
        self.goes_on |= len(jobs) > SLICE
        for job in jobs[:SLICE]:
            self.ids += 1
            job.id, job.waits_for = self.ids, "room" if job.bypasses_limits else "tenant"

    def end(self, job, state, count=None):
        job.state = state
        job.runner.counters[count or state.lower()] += 1
        if state != "WITHDRAWN":
            values = self.values_of(job)
            # A member of a failed batch that waits to be retried has begun with the batch.
            started = job.run.started if job.run else job.began
            values["queue"].append((self.now if started is None else started) - job.submitted)
            values["total"].append(self.now - job.submitted)

    def values_of(self, job):
        """Return the lists of values of the jobs of this class that ended as this job did."""
        return job.runner.values.setdefault(
            (job.state, job.priority), {"queue": [], "run": [], "total": [], "batch_size": []}
        )

    def retire(self):
        for lease in self.leases:
            over = lease.released and not any(job.lease is lease and job.live for job in self.jobs)
            if over and not lease.over:
                lease.over = True
                self.moments += 1
                lease.runner.freed[lease.slot] = self.moments

    def over(self):
        """Report the barriers that are reached now, and the runners that are drained now."""
        commands = []
        for runner in self.runners:
            if (
                runner.closed
                and not runner.reached
                and len(self.free_slots(runner)) == runner.slots
            ):
                runner.reached = True
                commands.append(("reached", self.runners.index(runner)))
            held = any(lease.runner is runner and not lease.over for lease in self.leases)
            live = any(job.runner is runner and job.live for job in self.jobs)
            if runner.phase in ("DRAINING", "TERMINATED") and not (held or live or runner.closed):
                runner.phase = "DRAINED"
                commands.append(("drained", self.runners.index(runner)))
        return commands
