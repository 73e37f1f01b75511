"""Launching: from the queue to a lane, and back.

- `_dispatch` gives free slots and lanes to the best queued jobs.
- `_start` starts a job, together with the queued jobs that join its batch.
- `_follow` hands lanes their next jobs ahead of time.
- `_end` counts a run that is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aoti_sched.queue.commands import Command, Grant, Launch
from aoti_sched.queue.counting import count_end, count_run
from aoti_sched.queue.deadlines import ExpiringJobs
from aoti_sched.queue.ending import SLICE
from aoti_sched.queue.growth import Growth
from aoti_sched.queue.job import Fact, Job, JobState, Priority, row_size
from aoti_sched.queue.queue_state import batch_queue_of
from aoti_sched.queue.runner_state import Lease, RunnerState, Source, may_share_run
from aoti_sched.queue.selection.choice import better, can_start, is_behind, most_ahead
from aoti_sched.queue.selection.forecast import expected
from aoti_sched.queue.selection.placement import LOOP


class Launching(ExpiringJobs):
    """Admits jobs, launches them, and ends their runs."""

    def _admit(self, job: Job, now: float, commands: list[Command], *, waited: bool) -> None:
        """Queue a job, which has `waited` at the gate, or is new."""
        if waited:
            job.happens_at(Fact.ADMIT, now)
        else:
            job.happens(Fact.ADMIT)
        source, runner = job.source, job.source.runner
        job.expected = expected(job, job.bytes)
        if self._forecast.kept:
            self._forecast.add(job)
        if self._urgency.kept and job.deadline is not None:
            self._urgency.add(job, job.deadline)
        self.room.take(job, waited=waited)
        self.fair_shares.enter(job)
        if self._watches_age and not job.is_lease_request:
            job.age_node = source.arrivals.push(job.submitted, job)
        if job.key is not None and may_share_run(job):
            self._arrives(runner, commands)
            key = batch_queue_of(runner).enter(job, now, runner.placing.times.bound(job.bytes))
            if not key.ripe and key.ripe_at < math.inf:
                self.timers.watch_key(runner, job.key, key)
                self._ask_for_wake(commands)
        else:
            source.queue.push(job)
        self._selector.enter(source)
        if runner.closed:
            if self.turns and (turns := self.turns.get(runner)) is not None:
                self._see_turn(turns, now, commands)
            if self.memory.asks(runner):
                self._serve_line(now, commands)

    def _arrives(self, runner: RunnerState, commands: list[Command]) -> None:
        """Note that a job that may share a run has come in this turn of the loop."""
        batches = batch_queue_of(runner)
        if not batches.arrived:
            self._gathering.append(runner)
        batches.note_arrival()
        self._ask_for_turn(commands)

    def _dispatch(self, now: float, commands: list[Command]) -> None:
        """Give free slots and lanes to the best jobs, and admit waiting jobs to the freed room.

        A job whose deadline has passed is not launched, whichever fact finds it first.
        """
        if self.timers.keys:
            self._ripen(now)
        late = 0
        admitted = 0
        while True:
            while admitted < SLICE and (waits := self.room.next_admitted()) is not None:
                self._admit(waits, now, commands, waited=True)
                admitted += 1
            if SLICE in (admitted, late):
                self._ask_to_go_on(commands)
                return
            job = self._selector.next(now)
            if job is None:
                return
            if job.deadline is not None and self._is_late(job, job.deadline, now, commands):
                late += 1
                continue
            leaves = self._selector.leaves_the_loop
            has_choice = self._may_leave_the_loop(job)
            self._unqueue(job)
            if job.is_lease_request:
                self._grant(job, now, commands)
            else:
                self._selector.launches(job, chosen=True)
                placing = job.source.runner.placing
                inline = placing.inline(job.bytes) and not leaves
                if has_choice and not placing.grows(
                    *batch_queue_of(job.source.runner).potential_batch(job)
                ):
                    inline = False  # inline, the batch could not take all jobs of the key
                lane = LOOP if inline else self.lanes.next_for(job.source)
                self._launch(job, lane, now, commands)
            self._selector.enter(job.source)

    def _may_leave_the_loop(self, job: Job) -> bool:
        """Return whether a job that was chosen for the loop may go to a lane instead.

        The job must be one that may share a run, and a lane must be free that no other job wants.
        """
        runner = job.source.runner
        return (
            job.key is not None
            and may_share_run(job)
            and runner.placing.inline(job.bytes)
            and self._selector.has_place(runner, inline=False)
            and not self._selector.is_wanted(inline=False)
        )

    def _ripen(self, now: float) -> None:
        """Release the batch keys whose delay has elapsed."""
        while (found := self.timers.ripe(now)) is not None:
            runner, name = found
            batch_queue_of(runner).refresh(name, now)
            self._selector.enter(runner)

    def _uncontended_lane(self, job: Job, now: float) -> int | None:
        """Return the lane where a new job can start at once; None when it has to be queued.

        A job starts at once if a slot and a lane are free and no other job wants them.
        """
        source = job.source
        if job.is_lease_request or not can_start(source):
            return None
        if job.key is not None and may_share_run(job) and batch_queue_of(source.runner).waits:
            return None
        if job.deadline is not None and self._would_be_late(job, job.deadline, now):
            return None
        inline = source.runner.placing.inline(job.bytes)
        if self.load.jobs:
            if self.timers.keys:
                self._ripen(now)
            if len(source.queue) or self._selector.is_wanted(
                inline=inline
            ):  # its own queue may wait for another place
                return None
        if not self._selector.has_place(source.runner, inline=inline):
            return None
        return LOOP if inline else self.lanes.next_for(source)

    def _launch(self, job: Job, lane: int, now: float, commands: list[Command]) -> None:
        """Launch a job, with its batch, on a free slot and a free lane."""
        self._start(job, lane, job.source.free.pop(), now, commands)
        self.lanes.take(job)
        commands.append(Launch(job))
        if lane == LOOP:
            self._ask_for_turn(commands)

    def _start(self, job: Job, lane: int, slot: int, now: float, commands: list[Command]) -> None:
        """Start a job on a lane and a slot, with the queued jobs that may share its run."""
        job.size = job.bytes
        self.fair_shares.launch(job)
        if job.key is not None and may_share_run(job):
            self._take_along(job, lane == LOOP, now, commands)
        for member in job.members or (job,):
            member.happens(Fact.LAUNCH)
            member.lane = lane
            member.inline = lane == LOOP
            member.slot = slot
            member.epoch = job.source.epoch
            member.started = member.launched = now

    def _take_along(self, job: Job, inline: bool, now: float, commands: list[Command]) -> None:
        """Make the job the leader of a batch with queued jobs of its key.

        Which jobs join is the rule of `growth.py`. Without such jobs there is no batch.
        """
        runner = job.source.runner
        batches = batch_queue_of(runner)
        shorter, longer = batches.queue.lengths_near(job.key, row_size(job))
        if not shorter and not longer:
            return
        growth = Growth(
            batches.rule,
            runner.placing.times,
            job,
            batches.usual_size(job.key),
            now,
            self._urgency.latest_start(job.priority),
            promised=self._urgency.has_higher(job.priority, now),
        )
        members = [job]
        # On the loop's thread, each job that joins is checked, unless all of them may.
        checked = inline and not (
            len(shorter) + len(longer) == 1 and runner.placing.grows(*batches.potential_batch(job))
        )
        for priority in Priority:
            for lengths in (shorter, longer):
                for length in lengths:
                    if not self._take_of(length, priority, growth, members, checked, now, commands):
                        break
        if len(members) > 1:
            job.members = tuple(members)
            job.size = growth.size
            for member in members:
                member.batch = len(members)
            runner.counters.batches += 1
            runner.counters.batched += len(members)

    def _take_of(
        self,
        length: int,
        priority: int,
        growth: Growth,
        members: list[Job],
        checked: bool,
        now: float,
        commands: list[Command],
    ) -> bool:
        """Let jobs of one length and class join a batch, in their order, as long as they fit.

        Args:
            length: The bytes of a row.
            priority: The class.
            growth: The batch.
            members: Its jobs, the leader first.
            checked: Whether the run must stay short enough for the loop's thread.
            now: The present time.
            commands: What follows.

        Returns:
            Whether jobs of lengths that are farther from the leader's may join, too.
        """
        leader = members[0]
        runner = leader.source.runner
        queue, placing = runner.queue, runner.placing
        while not growth.is_full:
            other = queue.head_of(leader.key, length)
            if other is None or other.priority != priority:
                return True
            if other.deadline is not None and other.deadline <= now:
                self._expire(other, now, commands)
                continue
            if not growth.fits(other):
                return True
            if not growth.pays(other):
                return False
            if checked and not placing.grows(growth.size_with(other), len(members) + 1):
                return False
            if other.deadline is not None and self._is_late(other, other.deadline, now, commands):
                continue
            self._unqueue(other)
            self.fair_shares.launch(other)
            other.overdue = leader.overdue
            members.append(other)
            growth.add(other)
        return False

    def _follow(self, sources: Sequence[Source], now: float, commands: list[Command]) -> None:
        """Hand the sources' next jobs ahead to lanes that run short jobs of theirs, the best first.

        Each launch charges its runner, so the best job is chosen anew after it.
        """
        while True:
            job: Job | None = None
            for source in sources:
                job = better(job, self._next_to_follow(source, now))
            if job is None:
                return
            source = job.source
            self._unqueue(job)
            self._selector.launches(job, chosen=False)
            lane, most = self.lanes.open_lane(source), most_ahead(job)
            self._start(job, lane, self.lanes.running[lane].slot, now, commands)
            self.lanes.hand_ahead(job, most)
            commands.append(Launch(job))
            self._selector.enter(source)
            self._dispatch(now, commands)  # waiting jobs may be admitted to the freed room

    def _next_to_follow(self, source: Source, now: float) -> Job | None:
        """Return the source's next job, if a lane may be handed this job ahead.

        No job is handed ahead while a better job waits for a lane.
        """
        if not source.open_for_next or source.closed or source.halted:
            return None
        job, placing = source.queue.head(), source.runner.placing
        if job is None or job.is_lease_request:
            return None
        if placing.inline(job.bytes) and not is_behind(job):
            return None
        if not self.lanes.takes_ahead(source, most_ahead(job)):
            return None
        if job.deadline is not None and (
            job.deadline <= now or self._would_be_late(job, job.deadline, now)
        ):
            return None
        return job if self._selector.may_follow(job, now) else None

    def _grant(self, job: Job, now: float, commands: list[Command]) -> None:
        """Give a lease request its slot, without a lane, and complete the request."""
        runner = job.source.runner
        job.happens(Fact.LAUNCH)
        self.fair_shares.rest(job)
        job.slot = runner.free.pop()
        job.epoch = runner.epoch
        job.started = job.launched = now
        self._lease_ids += 1
        lease = Lease(self._lease_ids, runner, job.slot, job.payload, now)
        runner.leases[lease.id] = lease
        runner.live -= 1
        job.happens(Fact.SUCCEED)
        job.finished = now
        if self.memory.evicts:
            runner.used = now
        runner.counters.completed += 1
        runner.counters.in_time += 1
        runner.counters.queue_seconds += now - job.submitted
        count_end(job, now)
        self.timers.ended(job)
        commands.append(Grant(job, lease))

    def _end(self, job: Job, fact: Fact, started: float, finished: float, seconds: float) -> None:
        """End a job whose run took `seconds`, and count the run.

        The run of a job that was cancelled or expired meanwhile counts as wasted.
        """
        left = job.state is not JobState.RUNNING
        if left:
            job.happens_at(fact, finished)
        else:
            job.happens(fact)
        self._count_run(job, started, seconds)
        self.fair_shares.end(job)
        job.started, job.finished = started, finished
        counters = job.source.runner.counters
        count_run(job, started, finished, left=left)
        if left:
            counters.wasted_seconds += seconds
        elif fact is Fact.SUCCEED:
            counters.completed += 1
            if job.deadline is None or finished <= job.deadline:
                counters.in_time += 1
        else:
            counters.failed += 1
        if not left and job.deadline is not None:
            self.timers.ended(job)
        job.source.live -= 1

    def _end_batch(self, leader: Job, ok: bool, started: float, finished: float) -> None:
        """End the members of a batch. Each is charged a part of the run in proportion to its rows.

        The failure of a batch does not tell which member caused it. So the members that are still
        RUNNING are kept in the leader's `to_retry`.
        """
        rows = sum(member.rows for member in leader.members)
        again = []
        for member in leader.members:
            seconds = (finished - started) * member.rows / rows
            if ok or member.state is not JobState.RUNNING:
                self._end(member, Fact.SUCCEED if ok else Fact.FAIL, started, finished, seconds)
            else:
                self._count_run(member, started, seconds)
                member.source.runner.counters.wasted_seconds += seconds
                again.append(member)
        leader.members = ()
        leader.to_retry = tuple(again)

    def _count_run(self, job: Job, started: float, seconds: float) -> None:
        """Count and charge the seconds of a job's run, or of its part of a batch's run."""
        runner = job.source.runner
        counters = runner.counters
        if not job.retrying:
            counters.queue_seconds += started - job.submitted
        counters.run_seconds += seconds
        if job.inline:
            counters.inline += 1
        self.fair_shares.settle(job, seconds * runner.width)
        self._selector.took(job, seconds * runner.width)
