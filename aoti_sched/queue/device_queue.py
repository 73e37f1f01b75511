"""DeviceQueue: the facts of one device, and the commands that follow.

Theory of operation
===================

**Facts and commands.** A fact is something that has happened: a job was submitted, a run is over,
time has passed. `DeviceQueue` has one method per fact. Each takes `now`, in seconds on the caller's
clock, which never goes back, and returns the commands that the caller must perform, in order
(`commands.py`). The same facts give the same commands. A fact that can't happen in the present
state raises `IllegalFactError`, which tells the job's story, and changes nothing. Commands are
performed at once, and their outcomes return as further facts.

**A job's way.** `job.TRANSITIONS` holds every state of a job and every way out of it. `submit`
rejects a job, queues it, or lets it wait at its source's gate until there is room (`admission/`). A
source is what a job draws its slot from: a runner, or a held lease. A source that has a queued job
and a free slot contends for a lane. `Launch` gives the best job a slot and a lane; `complete`
releases both.

**The order of jobs.** Jobs are ordered by priority class first. Within a class, those jobs go first
whose runner and tenant have used the least device time for their share (`selection/fairness.py`).
Then the due time decides (`policy.py`). With `max_wait`, every second launch goes to the oldest
overdue job, within a quarter of the time (`selection/choice.py`). If the first job in line for a
lane needs more cores than are free, no other job overtakes it.

**Slots and lanes.** A run occupies one slot of its source and one lane of the device. The run takes
as many cores as its runner is wide. A short run may instead go inline, on the loop's own thread,
within a budget per turn of the loop (`selection/placement.py`). Which free lane a run goes to, and
whether lanes are added with runners, are the policy's choices (`lanes.py`). A lane that runs a
short job may be handed the next jobs of the same source ahead of time; they share one slot, since
they run one after the other. A lease holds a slot without a lane, and its jobs take lanes as others
do.

**Batches and retries.** Queued jobs of a runner with an equal key may run as one batch
(`batching.py`). Its first job, the leader, has the lane and the slot, and holds the others as
`members`. When a batch fails, no member is known to be the cause. So each member whose caller is
still there is retried alone, on the same lane and slot, one after the other. Two places carry out
this one rule. `complete` leaves such members RUNNING and puts them into the leader's `to_retry`,
and `Lanes.leave` turns the first of them into the next `Launch`. The dispatcher, which resolves the
futures of a failed batch, skips the members that are still RUNNING: they are retried.

**Barriers.** A closed barrier stops a runner from starting anything but the runs of held leases.
When every slot is free, `BarrierReached` follows, and the caller exchanges the weights. Then the
barrier opens on the next epoch, an earlier one, or the same (`barrier.py`). Jobs that asked for an
epoch that is yet to come wait outside the queue. Jobs whose epoch was rolled back are revoked.

**Sessions.** Jobs of a session run on the epoch that the session began with. When the next epoch is
published, they move to a second runner record, which keeps the weights before. The two records of
a model take turns with its one container (`weight_turns.py`).

**Memory.** Where the device has a limit, memory is reserved before a model is loaded. When it does
not suffice, runners are evicted: their barrier closes, `Park` asks the caller to free the weights,
and `Return` to restore them, when requests want them and there is room (`memory.py`).

**Slices.** No fact takes long, however many jobs it concerns. Facts that end, move or admit many
jobs do so for `SLICE` of them. They return `GoOn`, to be continued in the loop's next turn. The
fact decides which jobs end, and a runner whose jobs are ending starts nothing (`ending.py`).

**What is guaranteed**

- Each job ends exactly once, and each slot, lane and byte is released.
- Nothing launches on another epoch than its source's, and no job after its deadline.
- No bound is exceeded, and no job overtakes a job that waits for room.
- No job waits while a slot of its source and a place to run are free.
- A fact costs O(log n) in the queued jobs and nothing in idle runners.

`check.check` states these as sentences that tests verify after every fact. The code stands in
layers, each a class that extends the one before: `queue_state.py` (the parts, and how a job leaves
the queue), `slices.py`, `deadlines.py`, `launching.py`, `lifecycle.py` (facts about runners),
`sessions.py`, and this file (facts about memory, jobs and time).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aoti_sched.errors import AotiSchedError, LoadError
from aoti_sched.queue import barrier
from aoti_sched.queue.admission import rejection
from aoti_sched.queue.commands import Command, Expire, Failing, Launch, NextTurn, Reject, Shed
from aoti_sched.queue.counting import count_end, count_rejection
from aoti_sched.queue.ending import Ending
from aoti_sched.queue.holding import Holding, Stay
from aoti_sched.queue.job import Fact, IllegalFactError, Job, JobState, Priority
from aoti_sched.queue.memory import Claim
from aoti_sched.queue.queue_state import batch_queue_of
from aoti_sched.queue.runner_state import (
    UNHEALTHY,
    Lease,
    Phase,
    RunnerState,
    may_share_run,
)
from aoti_sched.queue.selection.forecast import expected
from aoti_sched.queue.selection.placement import LOOP
from aoti_sched.queue.sessions import SessionFacts


def _must_be_lawful(job: Job) -> None:
    """Check a new job.

    Raises:
        IllegalFactError: No order or bound is defined for the job.
    """
    if not Priority.HIGH <= job.priority <= Priority.LOW:
        raise IllegalFactError(f"there is no priority class {job.priority}")
    if job.bytes < 0:
        raise IllegalFactError(f"a job's inputs have {job.bytes} bytes")
    if job.deadline is not None and math.isnan(job.deadline):
        raise IllegalFactError("a job's deadline is not a number")
    if job.is_lease_request and isinstance(job.source, Lease):
        raise IllegalFactError(f"lease {job.source.id} holds one slot and can't lease it again")
    if job.bypasses_limits and (not job.is_lease_request or job.bytes or job.min_epoch):
        raise IllegalFactError(
            "a job with bypasses_limits asks for a lease, with no inputs and no min_epoch"
        )
    if job.key is not None and (job.is_lease_request or job.rows < 1):
        raise IllegalFactError("a job with a key runs, and has rows")


class DeviceQueue(SessionFacts):
    """The queue of one device: a method per fact."""

    def claim(self, claim: Claim, now: float) -> list[Command]:
        """Reserve memory for a model being loaded, or for new weights of a pinned runner.

        `Claimed` follows when the memory is there.

        Raises:
            MemoryLimitError: Evicting all idle models would not be enough.
        """
        if self.memory.holdings.get(claim.holding) is not None and not claim.holding.updating:
            raise IllegalFactError(
                f"runner {claim.holding.name!r}: new weights need a runner on hold; call pin first"
            )
        return self.memory.claim(claim, now)

    def give_up(self, claim: Claim, now: float) -> list[Command]:
        """Cancel a claim that was not answered by `Claimed` yet."""
        return self._and_who_waits(self.memory.give_up(claim, now), now)

    def pin(self, runner: RunnerState) -> None:
        """Keep a runner, whose weights are about to be changed, resident until `update_use`."""
        self._known(runner)
        runner.memory.updating = True

    def update_use(
        self, holding: Holding, now: float, *, constants: int, inactive: int, fixed: str = ""
    ) -> list[Command]:
        """Record a model's actual memory use in bytes, and unpin the model.

        `fixed` says why the model can't be evicted; "" when it can.
        """
        holding.fixed, holding.updating = fixed, False
        return self._and_who_waits(self.memory.update_use(holding, constants, inactive, now), now)

    def release_memory(self, holding: Holding, now: float) -> list[Command]:
        """Release the memory of a model that was closed, or could not be loaded."""
        return self._and_who_waits(self.memory.release(holding, now), now)

    def call_back(self, runner: RunnerState, now: float) -> list[Command]:
        """Restore a runner for another reason than requests.

        `Return` follows, unless it is resident.

        Raises:
            MemoryLimitError: Evicting all idle models would not be enough.
        """
        self._known(runner)
        return self.memory.call_back(runner, now)

    def parked(self, runner: RunnerState, now: float) -> list[Command]:
        """Note that the weights of a runner that was to `Park` are freed.

        Jobs that are queued ask for them again.
        """
        if runner.memory.stay is not Stay.LEAVING or not runner.reached:
            raise IllegalFactError(f"runner {runner.name!r} was not to be parked")
        commands = self.memory.parked(runner.memory, now)
        if runner.load.jobs:
            self.memory.asks(runner)
        return self._and_who_waits(commands, now)

    def returned(self, runner: RunnerState, now: float, *, error: str = "") -> list[Command]:
        """Note that the weights of a runner that was to `Return` are restored.

        With an `error` they can't be, and the queued jobs are revoked.
        """
        if runner.memory.stay is not Stay.COMING:
            raise IllegalFactError(f"runner {runner.name!r} was not to come back")
        commands = self.memory.returned(runner.memory, now, ok=not error)
        if error:
            what = (
                f"runner {runner.name!r} was parked, and its weights can't be brought back: {error}"
            )
            self._end_in_slices(Ending(runner, self._ids, lambda _: LoadError(what)), now, commands)
        else:
            barrier.open_on(runner, None)
            self._selector.enter(runner)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return self._and_who_waits(commands, now)

    def turn(self, now: float) -> list[Command]:
        """Begin a new turn of the loop, with its whole budget of inline runs."""
        self.lanes.inline_left = self.lanes.inline_budget
        self._turn_asked = LOOP in self.lanes.running  # what runs there belongs to this turn, too
        commands: list[Command] = [NextTurn()] if self._turn_asked else []
        gathering, self._gathering = self._gathering, []
        for runner in gathering:
            batch_queue_of(runner).turn(now)
            self._selector.enter(runner)
            if self.turns and (turns := self.turns.get(runner)) is not None:
                self._see_turn(turns, now, commands)  # jobs that were held back may contend now
        self._dispatch(now, commands)
        self._follow(gathering, now, commands)
        return commands

    def submit(
        self, job: Job, now: float, *, wait: bool = False, since: float | None = None
    ) -> list[Command]:
        """Take a new job. Without room, the job waits at the gate with `wait`, or is rejected.

        A job with `since` replaces a job that was withdrawn at another replica and submitted then.
        Such a job was accepted before, so neither a prediction nor a bound of jobs that await an
        epoch or room rejects it.
        """
        runner = job.source.runner
        # A job for a drained runner, which may be removed by now, is rejected, and not illegal.
        if runner.phase is not Phase.DRAINED:
            self._known(runner)
        if job.state is not JobState.NEW:
            raise job.illegal(f"job {job.id} was submitted before, it is {job.state.name}")
        _must_be_lawful(job)
        if self._urgency.kept:
            self._urgency.note(job, now)
        self._ids += 1
        job.id = self._ids
        job.submitted = now if since is None else since
        job.due = self.policy.due(job.submitted, job.deadline)
        runner.counters.submitted += 1
        error: AotiSchedError | None = rejection.for_good(job, self.load, moved=since is not None)
        full: str | None = None
        shed: Sequence[Job] = ()
        if error is None and job.min_epoch <= job.source.epoch:
            if runner.predicts and since is None:
                error = self._unreachable(job, now)
            if error is None:
                full = self.room.full(job)
                if full is not None and not wait:
                    shed = self.room.shed_for(job) if runner.sheds else ()
                    error = None if shed else rejection.for_now(job, full)
                elif full is not None and since is None:
                    error = rejection.to_wait(job, self.room.crowded(job))
        if error is not None:
            job.happens_at(Fact.REJECT, now)
            runner.counters.rejected += 1
            count_rejection(job, error, now)
            return [Reject(job, error)]
        if job.deadline is not None:
            if job.deadline <= now:
                job.happens_at(Fact.EXPIRE, now)
                runner.counters.expired += 1
                count_end(job, now)
                return [Expire(job)]
            self.timers.watch(job, job.deadline)
        commands: list[Command] = []
        if shed:
            for other in shed:
                self._shed(other, now, commands)
            full = None  # the new job has the room, even if another job is at the gate by now
        job.source.live += 1
        if job.min_epoch > job.source.epoch:
            job.happens_at(Fact.HOLD, now)
            runner.awaiting.add(job)
        elif full is not None:
            job.happens_at(Fact.HOLD, now)
            if job.names_epoch and job.source is runner:
                runner.epoch_bound.add(job)
            self.room.wait(job)
            self._dispatch(now, commands)
        elif (lane := self._uncontended_lane(job, now)) is not None:
            job.happens(Fact.ADMIT)
            job.expected = expected(job, job.bytes)
            self.fair_shares.enter(job)
            self.fair_shares.leave(job)
            self._selector.launches(job, chosen=False)
            if not self.load.jobs:
                self._selector.rests()
            if job.key is not None and may_share_run(job):
                self._arrives(runner, commands)
            self._launch(job, lane, now, commands)
            if self.load.jobs:  # the delay of a key may have elapsed
                self._dispatch(now, commands)
        else:
            if job.names_epoch and job.source is runner:
                runner.epoch_bound.add(job)
            self._admit(job, now, commands, waited=False)
            self._dispatch(now, commands)
            self._follow((job.source,), now, commands)
        if job.deadline is not None:
            self._ask_for_wake(commands)
        return commands

    def complete(
        self,
        job: Job,
        now: float,
        *,
        ok: bool = True,
        started: float | None = None,
        finished: float | None = None,
    ) -> list[Command]:
        """Release the lane and slot of a job whose run is over.

        `job.state` then says whether the caller is still there (DONE, FAILED) or had left.
        `started` and `finished` are the lane's own stamps; by default the launch and `now`.
        """
        lanes = self.lanes
        if not lanes.has_launched(job):
            raise job.illegal(
                f"job {job.id} is {job.state.name} and not on a lane: it can't complete"
            )
        source, runner = job.source, job.source.runner
        started = job.started if started is None else started
        finished = now if finished is None else finished
        seconds = finished - started
        inline, size, size_of_batch = job.inline, job.size, job.batch
        commands: list[Command] = []
        if job.members:
            self._end_batch(job, ok, started, finished)
        else:
            self._end(job, Fact.SUCCEED if ok else Fact.FAIL, started, finished, seconds)
        if ok:
            runner.failures = 0
        elif size_of_batch == 1:
            runner.failures += 1
            if runner.failures == UNHEALTHY:
                commands.append(Failing(runner))
        for member in job.to_retry:
            if member.state is JobState.RUNNING:
                break
            self.fair_shares.end(member)  # its caller has left, so it is passed over
        again = lanes.leave(job, now)
        if again is not None:
            self.fair_shares.launch(again)
            commands.append(Launch(again))
        if inline:
            lanes.inline_left -= seconds
        if isinstance(source, Lease):
            self._retire_if_over(source)
        if self.turns and (turns := self.turns.get(runner)) is not None:
            turns.ran = True
            self._see_turn(turns, now, commands)  # before the next job is launched
        too_long = inline and seconds > lanes.inline_budget
        moved = (ok or too_long) and runner.placing.learn(size, seconds, now, too_long=too_long)
        if self.load.jobs:  # no job waits for room, a slot or a lane when none is queued
            for other in (runner, *runner.leases.values()) if moved else (source,):
                self._selector.enter(other)
            self._dispatch(now, commands)
            self._follow((source,), now, commands)
        if self.memory.evicts:
            runner.used = now
        if runner.closed or runner.phase is not Phase.OPEN or self.memory.line:
            self._see_what_is_over(runner, now, commands)
        return commands

    def cancel(self, job: Job, now: float) -> list[Command]:
        """End a job whose caller gave up.

        A queued job leaves at once. A running job occupies its lane until the run is over.
        """
        commands: list[Command] = []
        if job.state is JobState.RUNNING:
            job.happens_at(Fact.CANCEL, now)
            self.timers.ended(job)
        else:
            self._leave_queue(job, Fact.CANCEL, now)
        job.source.runner.counters.cancelled += 1
        count_end(job, now)
        self._dispatch(now, commands)
        self._see_what_is_over(job.source.runner, now, commands)
        return commands

    def tick(self, now: float) -> list[Command]:
        """Expire every live job whose deadline is not after `now`, a slice at a time."""
        commands: list[Command] = []
        self._wake = None
        self._expire_some(now, commands)
        self._dispatch(now, commands)
        self._serve_line(now, commands)
        return commands

    def go_on(self, now: float) -> list[Command]:
        """Continue what an earlier fact left for the loop's next turn."""
        commands: list[Command] = []
        self._goes_on = False
        self._end_some(now, commands)
        self._move_some(commands)
        self._expire_some(now, commands)
        self._dispatch(now, commands)
        self._serve_line(now, commands)
        return commands

    def release(self, lease: Lease, now: float) -> list[Command]:
        """Release a lease. A second release changes nothing."""
        commands: list[Command] = []
        if not lease.released:
            lease.released = True
            self._retire_if_over(lease)
        if self.turns and (turns := self.turns.get(lease.runner)) is not None:
            self._see_turn(turns, now, commands)  # before the slot is given out again
        self._dispatch(now, commands)
        self._see_what_is_over(lease.runner, now, commands)
        return commands

    def _shed(self, job: Job, now: float, commands: list[Command]) -> None:
        self._leave_queue(job, Fact.SHED, now)
        job.source.runner.counters.shed += 1
        count_end(job, now)
        commands.append(Shed(job, rejection.shed(job)))
        self._see_what_is_over(job.source.runner, now, commands)
