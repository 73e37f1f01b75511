"""DeviceQueue: the one mutator of a device's queue.

A method per fact, each taking `now` (seconds on the caller's clock, never going back) and returning the
commands that follow. The same facts give the same commands, always. An illegal fact raises
`IllegalFactError` and changes nothing. O(log n) per fact in the queued jobs, O(1) in idle runners.

A job's way: `submit` puts it at the gate (when there is no room and it may wait) or into its source's
queue; a source (a runner, or a held lease) that has a job and a free slot contends for a lane, or, when
its run is short, for the loop's own thread (`placement`); `Launch` gives the best job its slot and lane, and takes
along what may run with it (`batch`); `complete` brings both home. The best is of the highest class, then of the runner and
the tenant that had the least for its share (`fair`), then the earliest due (`policy`); and who waited too long has every second turn. What a job can go through stands in
`job.TRANSITIONS`. A `barrier` between two epochs holds a runner's queue until every slot is home.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import msgspec

from aoti_sched.errors import (
    AotiSchedError,
    DeadlineUnreachableError,
    LoadError,
    RunnerClosedError,
    UpdateAbortedError,
)
from aoti_sched.queue import barrier
from aoti_sched.queue.admission import rejection as refusal
from aoti_sched.queue.admission.gate import Room
from aoti_sched.queue.admission.load import Bounds, Load
from aoti_sched.queue.batching import Batching, Company
from aoti_sched.queue.check import check
from aoti_sched.queue.commands import (
    BarrierReached,
    Command,
    Drained,
    Expire,
    Failing,
    GoOn,
    Grant,
    Launch,
    NextTurn,
    Park,
    Reject,
    Revoke,
    Shed,
    WakeAt,
    Withdraw,
)
from aoti_sched.queue.ending import SLICE, Ending
from aoti_sched.queue.job import Fact, IllegalFactError, Job, JobState, Priority
from aoti_sched.queue.lanes import Lanes
from aoti_sched.queue.memory import Claim, Holding, Memory, Stay
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.runner_state import UNHEALTHY, Lease, Phase, RunnerState, Source
from aoti_sched.queue.selection.choice import Choice, can_start
from aoti_sched.queue.selection.fairness import Ledger
from aoti_sched.queue.selection.forecast import Forecast, expected
from aoti_sched.queue.selection.placement import INLINE_BUDGET, LOOP, Placing
from aoti_sched.queue.timers import Timers


def _must_be_lawful(job: Job) -> None:
    """Refuse a job that no order or bound is defined for; the front makes none."""
    if not Priority.HIGH <= job.priority <= Priority.LOW:
        raise IllegalFactError(f"there is no priority class {job.priority}")
    if job.bytes < 0:
        raise IllegalFactError(f"a job's inputs have {job.bytes} bytes")
    if job.deadline is not None and math.isnan(job.deadline):
        raise IllegalFactError("a job's deadline is not a number")
    if job.holds and isinstance(job.source, Lease):
        raise IllegalFactError(f"lease {job.source.id} holds one slot and can't lease it again")
    if job.exempt and (not job.holds or job.bytes or job.min_epoch):
        raise IllegalFactError(
            "only what takes a lease is exempt from bounds; it has no inputs and waits for no epoch"
        )
    if job.key is not None and (job.holds or job.rows < 1):
        raise IllegalFactError("a job with a key runs, and has rows")


def _company(runner: RunnerState) -> Company:
    """Of a runner that makes batches."""
    return runner.company  # type: ignore[return-value]


class DeviceQueue:
    """The queue of one device with `lanes` lanes; at most `bounds` may be queued over all its runners."""

    def __init__(
        self,
        name: str,
        lanes: int,
        bounds: Bounds | None = None,
        *,
        inline_budget: float = INLINE_BUDGET,
        cores: int | None = None,
        policy: Policy | None = None,
        memory_limit: int | None = None,
        evicts: bool = False,
    ) -> None:
        """`cores` (as many as lanes, if not given) is what the runs on lanes may take together. With `evicts`, idle runners are parked
        when others need their part of the `memory_limit` (bytes)."""
        if lanes < 1:
            raise IllegalFactError(f"{name}: a device has at least one lane, not {lanes}")
        cores = lanes if cores is None else cores
        if cores < 1:
            raise IllegalFactError(f"{name}: a device has at least one core, not {cores}")
        self.name = name
        self.policy = policy or Policy()
        self.lanes = Lanes(lanes, cores, inline_budget)
        self.room = Room(name, bounds or Bounds())
        self.load = self.room.load
        self.memory = Memory(name, memory_limit, evicts=evicts)
        self.runners: dict[str, RunnerState] = {}
        self.ledger = Ledger(self.policy.fair)
        self._watches_age = self.policy.max_wait is not None
        self._choice = Choice(self.lanes, self.policy.max_wait)
        self._forecast = Forecast(self.lanes, fair=self.policy.fair)
        self._turn_asked = False
        self._endings: deque[Ending] = deque()
        self._goes_on = False  # `go_on` was asked for
        self.timers = Timers()
        self._gathering: list[
            RunnerState
        ] = []  # jobs that may have company have come to them in this turn
        self._wake: float | None = None
        self._ids = 0
        self._lease_ids = 0
        self._lease_ended = False  # since the runners in line for memory were served last

    @property
    def busy_lanes(self) -> int:
        """How many lanes run something."""
        return self.lanes.count - len(self.lanes.free)

    # --- facts about runners -------------------------------------------------------------------------

    def add_runner(
        self,
        name: str,
        slots: int,
        bounds: Bounds | None = None,
        *,
        epoch: int = 1,
        placing: Placing | None = None,
        batching: Batching | None = None,
        width: int = 1,
        share: float = 1.0,
        sheds: bool = False,
        predicts: bool = False,
        foreseen: bool = False,
        memory: Holding | None = None,
    ) -> RunnerState:
        """A runner that gives out `slots`. Its runs take `width` cores each on a lane; it has its `share` of the device's time.

        With `sheds`, queued jobs make room for better ones; with `predicts`, jobs that would end too late are refused; one
        that is `foreseen` is asked `when_finished`. `memory` is what was claimed for it, if
        that was; it is on `hold` then.
        """
        if name in self.runners:
            raise IllegalFactError(f"{self.name} has a runner {name!r} already")
        if slots < 1:
            raise IllegalFactError(f"runner {name!r}: at least one slot, not {slots}")
        if not 1 <= width <= self.lanes.cores:
            raise IllegalFactError(
                f"runner {name!r}: {width} cores for a run, {self.name} has {self.lanes.cores}"
            )
        if not 0.0 < share < math.inf:
            raise IllegalFactError(f"runner {name!r}: a share is a positive number, not {share}")
        if batching is not None and self.policy.max_wait is not None:
            delay = min(
                batching.max_delay, self.policy.max_wait
            )  # who is overdue waits for no company
            batching = msgspec.structs.replace(batching, max_delay=delay)
        load = Load(f"runner {name!r}", bounds or Bounds())
        runner = RunnerState(
            name,
            slots,
            load,
            epoch,
            placing or Placing(),
            self.ledger.open(name, share),
            memory or Holding(name),
            batching=batching,
            width=width,
            share=share,
            sheds=sheds,
            predicts=predicts,
        )
        self.runners[name] = runner
        self.memory.lives(runner, held=memory is not None)
        if (predicts or foreseen) and not self._forecast.kept:
            self._forecast.kept = True
            for other in self.runners.values():
                for source in (other, *other.leases.values()):
                    for job in source.queue.jobs():
                        self._forecast.add(job)
        return runner

    def drain_runner(self, runner: RunnerState, now: float) -> list[Command]:
        """Refuse new work from now on and finish what was accepted, held leases included.

        What awaits an epoch could wait for ever, and is revoked.
        """
        self._known(runner)
        if runner.phase is Phase.OPEN:
            runner.phase = Phase.DRAINING
        commands: list[Command] = []

        def error(job: Job) -> AotiSchedError:
            return RunnerClosedError(
                f"runner {runner.name!r} is draining; epoch {job.min_epoch}, which the request waits for, has not come"
            )

        if runner.awaiting:
            ending = Ending(runner, self._ids, error, queued=False, awaiting=True)
            self._end_in_slices(ending, now, commands)
        if runner.company is not None:
            runner.company.hurry(now)
            self._choice.enter(runner)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    def terminate_runner(self, runner: RunnerState, now: float) -> list[Command]:
        """Fail what is queued, take held leases back, let what runs finish."""
        self._known(runner)
        if runner.phase >= Phase.TERMINATED:
            return []
        runner.phase = Phase.TERMINATED
        commands: list[Command] = []

        def error(_: Job) -> AotiSchedError:
            return RunnerClosedError(
                f"runner {runner.name!r} was terminated while the request was queued"
            )

        ending = Ending(runner, self._ids, error, awaiting=True, leases=True)
        self._end_in_slices(ending, now, commands)
        for lease in list(runner.leases.values()):
            lease.released = True
            self._retire_if_over(lease)
        self._dispatch(now, commands)  # the room that was freed may let others in
        self._see_what_is_over(runner, now, commands)
        return commands

    def withdraw(self, runner: RunnerState, now: float) -> list[Command]:
        """Take out what is waiting or queued, to be submitted anew at another replica; what one fact takes out is in the order in which it came.

        What draws its slot from a held lease stays, and so does what is `exempt`: that is needed at this very runner.
        """
        self._known(runner)
        commands: list[Command] = []
        self._end_in_slices(Ending(runner, self._ids, None, awaiting=True), now, commands)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    def remove_runner(self, runner: RunnerState) -> None:
        """Forget a runner that was `Drained`."""
        self._known(runner)
        if runner.phase is not Phase.DRAINED:
            raise IllegalFactError(
                f"runner {runner.name!r} is {runner.phase.name}, it can't be removed"
            )
        del self.runners[runner.name]
        self.ledger.close(runner.name)
        self._choice.forget(runner)
        self.room.gates.leave(runner)

    def close_barrier(
        self, runner: RunnerState, now: float, *, abort: bool = False
    ) -> list[Command]:
        """Start nothing more of this runner, but for its held leases; `BarrierReached` follows when every slot is home.

        With `abort`, what is queued (and not a held lease's) is revoked and does not wait.
        """
        self._known(runner)
        barrier.close(runner)
        commands: list[Command] = []

        def error(_: Job) -> AotiSchedError:
            return UpdateAbortedError(
                f"runner {runner.name!r}: an update of its weights with barrier='abort' failed what was queued; "
                "send the request again"
            )

        if abort:
            self._end_in_slices(Ending(runner, self._ids, error), now, commands)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    def open_barrier(
        self, runner: RunnerState, now: float, *, epoch: int | None = None
    ) -> list[Command]:
        """Go on, on another epoch when one is given. Jobs that waited for it now take their place in the queue."""
        self._known(runner)
        before = runner.epoch
        barrier.open_on(runner, epoch)
        commands: list[Command] = []
        if epoch is not None:
            self._serve_epoch(runner, now, commands, back=runner.epoch < before)
        self._choice.enter(runner)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    # --- facts about memory --------------------------------------------------------------------------

    def claim(self, claim: Claim, now: float) -> list[Command]:
        """So much memory is wanted for a model that is being loaded, or for new weights of one on `hold`. `Claimed` follows.

        Raises:
            MemoryLimitError: It can't be had, even if all that is idle is parked.
        """
        if claim.holding.runner is not None and not claim.holding.updating:
            raise IllegalFactError(
                f"runner {claim.holding.name!r}: memory is claimed for one on hold"
            )
        return self.memory.claim(claim, now)

    def give_up(self, claim: Claim, now: float) -> list[Command]:
        """A claim that was not answered yet is not wanted any more."""
        return self._and_who_waits(self.memory.give_up(claim, now), now)

    def hold(self, runner: RunnerState) -> None:
        """Its weights are about to be changed: from now on it is not chosen to be parked, until `settle`."""
        self._known(runner)
        runner.memory.updating = True

    def settle(
        self, holding: Holding, now: float, *, constants: int, inactive: int, fixed: str = ""
    ) -> list[Command]:
        """What a model has in truth, in bytes, and why it must not be parked, if it must not; nobody changes its weights any more."""
        holding.fixed, holding.updating = fixed, False
        return self._and_who_waits(self.memory.settle(holding, constants, inactive, now), now)

    def forget(self, holding: Holding, now: float) -> list[Command]:
        """A model's memory is free again: it was closed, or could not be loaded."""
        return self._and_who_waits(self.memory.forget(holding, now), now)

    def call_back(self, runner: RunnerState, now: float) -> list[Command]:
        """A runner is needed, and not just by requests. `Return` follows, unless it is here.

        Raises:
            MemoryLimitError: There is no room, even if all that is idle is parked.
        """
        self._known(runner)
        return self.memory.call_back(runner, now)

    def parked(self, runner: RunnerState, now: float) -> list[Command]:
        """The constants of one that was to `Park` are freed. What is queued asks for them again."""
        if runner.memory.stay is not Stay.LEAVING or not runner.reached:
            raise IllegalFactError(f"runner {runner.name!r} was not to be parked")
        commands = self.memory.parked(runner.memory, now)
        if runner.load.jobs:
            self.memory.asks(runner)
        return self._and_who_waits(commands, now)

    def returned(self, runner: RunnerState, now: float, *, error: str = "") -> list[Command]:
        """The constants of one that was to `Return` are there; or, with an `error`, can't be brought, and what is queued fails."""
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
            self._choice.enter(runner)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return self._and_who_waits(commands, now)

    # --- facts about jobs, and time ------------------------------------------------------------------

    def turn(self, now: float) -> list[Command]:
        """A new turn of the loop has begun: it has its whole budget of inline runs again."""
        self.lanes.inline_left = self.lanes.inline_budget
        self._turn_asked = LOOP in self.lanes.running  # what runs there belongs to this turn, too
        commands: list[Command] = [NextTurn()] if self._turn_asked else []
        gathering, self._gathering = self._gathering, []
        for runner in gathering:
            _company(runner).turn(now)
            self._choice.enter(runner)
        self._dispatch(now, commands)
        for runner in gathering:
            self._follow(runner, now, commands)
        return commands

    def submit(
        self, job: Job, now: float, *, wait: bool = False, since: float | None = None
    ) -> list[Command]:
        """A new job. With `wait`, it is held at the gate when there is no room, otherwise rejected.

        One that stands for a job that was withdrawn at another replica, where its caller has waited `since`, was accepted before:
        it is not refused for what is predicted, nor for those who await an epoch, too.
        """
        runner = job.source.runner
        if (
            runner.phase is not Phase.DRAINED
        ):  # one that was drained and removed is refused, not unknown
            self._known(runner)
        if job.state is not JobState.NEW:
            raise IllegalFactError(f"job {job.id} was submitted before, it is {job.state.name}")
        _must_be_lawful(job)
        self._ids += 1
        job.id = self._ids
        job.submitted = now if since is None else since
        job.due = self.policy.due(job.submitted, job.deadline)
        runner.counters.submitted += 1
        error: AotiSchedError | None = refusal.for_good(job, self.load, moved=since is not None)
        full: str | None = None
        shed: Sequence[Job] = ()
        if error is None and job.min_epoch <= job.source.epoch:
            if runner.predicts and since is None:
                error = self._unreachable(job, now)
            if error is None:
                full = self.room.full(job)
                if full is not None and not wait:
                    shed = self.room.make_way(job) if runner.sheds else ()
                    error = None if shed else refusal.for_now(job, full)
        if error is not None:
            job.happens(Fact.REJECT)
            runner.counters.rejected += 1
            return [Reject(job, error)]
        if job.deadline is not None:
            if job.deadline <= now:
                job.happens(Fact.EXPIRE)
                runner.counters.expired += 1
                return [Expire(job)]
            self.timers.watch(job, job.deadline)
        commands: list[Command] = []
        if shed:
            for other in shed:
                self._shed(other, now, commands)
            full = None  # the room is the newcomer's, even if another job is at the gate by now
        job.source.live += 1
        if job.min_epoch > job.source.epoch:
            job.happens(Fact.HOLD)
            runner.awaiting[job.id] = job
        elif full is not None:
            job.happens(Fact.HOLD)
            self.room.wait(job)
            self._dispatch(now, commands)
        elif (lane := self._uncontended_lane(job, now)) is not None:
            job.happens(Fact.ADMIT)
            job.expected = expected(job, job.bytes)
            self.ledger.enter(job)
            self.ledger.leave(job)
            self._choice.launches(job, chosen=False)
            if not self.load.jobs:
                self._choice.rests()
            if job.key is not None and self._may_have_company(job):
                self._arrives(runner, commands)
            self._launch(job, lane, now, commands)
            if self.load.jobs:  # what waited for company may have done so long enough
                self._dispatch(now, commands)
        else:
            self._admit(job, now, commands, waited=False)
            self._dispatch(now, commands)
            self._follow(job.source, now, commands)
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
        """A launched job's run is over, and the device done with it: its lane and slot come home.

        `job.state` then says whether its caller is still there (DONE, FAILED) or had left. `started` and
        `finished` are the lane's own stamps, where it has better ones than the launch and `now`.
        """
        lanes = self.lanes
        if not lanes.hold(job):
            raise IllegalFactError(
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
        for member in job.rest:
            if member.state is JobState.RUNNING:
                break
            self.ledger.end(member)  # its caller has left, so it is passed over
        again = lanes.leave(job, now)
        if again is not None:
            self.ledger.launch(again)
            commands.append(Launch(again))
        if inline:
            lanes.inline_left -= seconds
        if isinstance(source, Lease):
            self._retire_if_over(source)
        too_long = inline and seconds > lanes.inline_budget
        moved = (ok or too_long) and runner.placing.learn(size, seconds, now, too_long=too_long)
        if self.load.jobs:  # nobody waits for room, a slot or a lane when nothing is queued
            for other in (runner, *runner.leases.values()) if moved else (source,):
                self._choice.enter(other)
            self._dispatch(now, commands)
            self._follow(source, now, commands)
        if self.memory.evicts:
            runner.used = now
        if runner.closed or runner.phase is not Phase.OPEN or self.memory.line:
            self._see_what_is_over(runner, now, commands)
        return commands

    def cancel(self, job: Job, now: float) -> list[Command]:
        """The caller gave up. A queued job leaves at once; a running one leaves its lane busy until it is done."""
        commands: list[Command] = []
        if job.state is JobState.RUNNING:
            job.happens(Fact.CANCEL)
            self.timers.ended(job)
        else:
            self._leave_queue(job, Fact.CANCEL, now)
        job.source.runner.counters.cancelled += 1
        self._dispatch(now, commands)
        self._see_what_is_over(job.source.runner, now, commands)
        return commands

    def tick(self, now: float) -> list[Command]:
        """Time has passed: every live job whose deadline is not after `now` expires."""
        commands: list[Command] = []
        self._wake = None
        self._expire_some(now, commands)
        self._dispatch(now, commands)
        self._serve_line(now, commands)
        return commands

    def go_on(self, now: float) -> list[Command]:
        """Do more of what one fact was not to do at once."""
        commands: list[Command] = []
        self._goes_on = False
        self._end_some(now, commands)
        self._expire_some(now, commands)
        self._dispatch(now, commands)
        self._serve_line(now, commands)
        return commands

    def release(self, lease: Lease, now: float) -> list[Command]:
        """The holder is through with its lease; saying so twice changes nothing."""
        commands: list[Command] = []
        if not lease.released:
            lease.released = True
            self._retire_if_over(lease)
        self._dispatch(now, commands)
        self._see_what_is_over(lease.runner, now, commands)
        return commands

    def when_finished(self, job: Job, now: float) -> float:
        """In how many seconds a job would be finished that came now, by what is known. A question, and no fact: nothing changes."""
        runner = job.source.runner
        idle = not self.load.jobs and can_start(runner)
        at_once = idle and self._choice.has_place(runner, inline=runner.placing.inline(job.bytes))
        waits = 0.0 if at_once else self._forecast.waiting_time(job, now)
        return runner.placing.times.typical(job.bytes) + waits

    # --- in slices ---------------------------------------------------------------------------------------

    def _end_in_slices(self, ending: Ending, now: float, commands: list[Command]) -> None:
        """Begin to end jobs, after those of endings that are under way."""
        self._endings.append(ending)
        self._end_some(now, commands)

    def _end_some(self, now: float, commands: list[Command]) -> None:
        left = SLICE
        while self._endings and left:
            ending = self._endings[0]
            runner, error = ending.runner, ending.error
            jobs = ending.some(left)
            for job in jobs:
                if error is not None:
                    self._revoke(job, error(job), now, commands)
                else:
                    self._leave_queue(job, Fact.WITHDRAW, now)
                    runner.counters.withdrawn += 1
                    commands.append(Withdraw(job))
            if len(jobs) < left:  # there are no more
                self._endings.popleft()
                ending.over()
                for source in (runner, *runner.leases.values()):
                    self._choice.enter(source)
                self.room.gates.enter(runner)
            left -= len(jobs)
            self._see_what_is_over(runner, now, commands)
        if self._endings:
            self._ask_to_go_on(commands)

    def _expire_some(self, now: float, commands: list[Command]) -> None:
        for _ in range(SLICE):
            job = self.timers.due(now)
            if job is None:
                return
            self._expire(job, now, commands)
        if self.timers.due(now) is not None:
            self._ask_to_go_on(commands)

    def _ask_to_go_on(self, commands: list[Command]) -> None:
        if not self._goes_on:
            self._goes_on = True
            commands.append(GoOn())

    # --- what follows from facts ---------------------------------------------------------------------

    def _shed(self, job: Job, now: float, commands: list[Command]) -> None:
        self._leave_queue(job, Fact.SHED, now)
        job.source.runner.counters.shed += 1
        commands.append(Shed(job, refusal.shed(job)))
        self._see_what_is_over(job.source.runner, now, commands)

    def _unreachable(self, job: Job, now: float) -> DeadlineUnreachableError | None:
        """Whether it would be finished too late, by what is known; of those that would, every so often one is tried."""
        runner, deadline = job.source.runner, job.deadline
        times = runner.placing.times
        if (
            deadline is None
            or deadline <= now
            or job.holds
            or job.source is not runner
            or not times.knows(job.bytes)
        ):
            return None
        takes = self.when_finished(job, now)
        if now + takes <= deadline:
            return None
        if times.doubt(job.bytes, now):
            job.tried = True
            return None
        return DeadlineUnreachableError(
            runner.name, takes, deadline - now if job.timeout is None else job.timeout
        )

    def _admit(self, job: Job, now: float, commands: list[Command], *, waited: bool) -> None:
        """It is queued."""
        job.happens(Fact.ADMIT)
        source, runner = job.source, job.source.runner
        job.expected = expected(job, job.bytes)
        if self._forecast.kept:
            self._forecast.add(job)
        self.room.take(job, waited=waited)
        self.ledger.enter(job)
        if self._watches_age and not job.holds:
            source.arrivals.push(job.submitted, job)
        if job.key is not None and self._may_have_company(job):
            self._arrives(runner, commands)
            key = _company(runner).enter(job, now, runner.placing.times.bound(job.bytes))
            if not key.ripe and key.ripe_at < math.inf:
                self.timers.watch_key(runner, job.key, key)
                self._ask_for_wake(commands)
        else:
            source.queue.push(job)
        self._choice.enter(source)
        if runner.closed and self.memory.asks(runner):
            self._serve_line(now, commands)

    def _may_have_company(self, job: Job) -> bool:
        """Whether others may run with a job that has a key: it draws its slot from a runner that makes batches."""
        return job.source is job.source.runner and job.source.runner.company is not None

    def _arrives(self, runner: RunnerState, commands: list[Command]) -> None:
        """A job that may have company has come in this turn of the loop."""
        company = _company(runner)
        if not company.arrived:
            self._gathering.append(runner)
        company.arrives()
        self._ask_for_turn(commands)

    def _ask_for_turn(self, commands: list[Command]) -> None:
        if not self._turn_asked:
            self._turn_asked = True
            commands.append(NextTurn())

    def _dispatch(self, now: float, commands: list[Command]) -> None:
        """Give free slots and lanes to the best jobs, and the room that this makes to those at the gate.

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
            job = self._choice.next(now)
            if job is None:
                return
            if job.deadline is not None and self._is_late(job, job.deadline, now, commands):
                late += 1
                continue
            has_choice = self._may_leave_the_loop(job)
            self._unqueue(job)
            if job.holds:
                self._grant(job, now, commands)
            else:
                self._choice.launches(job, chosen=True)
                placing = job.source.runner.placing
                inline = placing.inline(job.bytes)
                if has_choice and not placing.grows(*_company(job.source.runner).around(job)):
                    inline = False  # there it would leave some of its company behind
                self._launch(job, LOOP if inline else self.lanes.free[-1], now, commands)
            self._choice.enter(job.source)

    def _may_leave_the_loop(self, job: Job) -> bool:
        """Whether a lane is free, that nobody waits for, for one that may have company and was chosen for the loop."""
        runner = job.source.runner
        return (
            job.key is not None
            and self._may_have_company(job)
            and runner.placing.inline(job.bytes)
            and self._choice.has_place(runner, inline=False)
            and not self._choice.is_wanted(inline=False)
        )

    def _ripen(self, now: float) -> None:
        """Let take part what has waited for company long enough."""
        while (found := self.timers.ripe(now)) is not None:
            runner, name = found
            _company(runner).see(name, now)
            self._choice.enter(runner)

    def _uncontended_lane(self, job: Job, now: float) -> int | None:
        """The lane it can have at once, since a slot and the lane are free and nobody else wants them; or None."""
        source = job.source
        if job.holds or not can_start(source):
            return None
        if job.key is not None and self._may_have_company(job) and _company(source.runner).waits:
            return None
        if job.deadline is not None and self._would_be_late(job, job.deadline, now):
            return None
        inline = source.runner.placing.inline(job.bytes)
        if self.load.jobs:
            if self.timers.keys:
                self._ripen(now)
            if len(source.queue) or self._choice.is_wanted(
                inline=inline
            ):  # its own queue may wait for another place
                return None
        if not self._choice.has_place(source.runner, inline=inline):
            return None
        return LOOP if inline else self.lanes.free[-1]

    # --- launches and their ends ---------------------------------------------------------------------

    def _launch(self, job: Job, lane: int, now: float, commands: list[Command]) -> None:
        """A job, and what goes with it, gets its slot and its lane."""
        self._start(job, lane, job.source.free.pop(), now, commands)
        self.lanes.take(job)
        commands.append(Launch(job))
        if lane == LOOP:
            self._ask_for_turn(commands)

    def _start(self, job: Job, lane: int, slot: int, now: float, commands: list[Command]) -> None:
        """It runs there, and with it what may and is queued."""
        job.size = job.bytes
        self.ledger.launch(job)
        if job.key is not None and self._may_have_company(job):
            self._take_along(job, lane == LOOP, now, commands)
        for member in job.members or (job,):
            member.happens(Fact.LAUNCH)
            member.lane = lane
            member.inline = lane == LOOP
            member.slot = slot
            member.epoch = job.source.epoch
            member.started = now

    def _take_along(self, job: Job, inline: bool, now: float, commands: list[Command]) -> None:
        """Find the job's company among what is queued, in its order, as long as there is room for the next."""
        runner = job.source.runner
        company, placing = _company(runner), runner.placing
        members, rows = [job], job.rows
        fits = not inline or placing.grows(*company.around(job))
        while (other := company.queue.head_of(job.key)) is not None:
            if other.deadline is not None and other.deadline <= now:
                self._expire(other, now, commands)
                continue
            if rows + other.rows > company.rule.max_rows:
                break
            if not fits and not placing.grows(job.size + other.bytes, len(members) + 1):
                break
            if other.deadline is not None and self._is_late(other, other.deadline, now, commands):
                continue
            self._unqueue(other)
            self.ledger.launch(other)
            other.overdue = job.overdue
            members.append(other)
            rows += other.rows
            job.size += other.bytes
        if len(members) > 1:
            job.members = tuple(members)
            for member in members:
                member.batch = len(members)
            runner.counters.batches += 1
            runner.counters.batched += len(members)

    def _end(self, job: Job, fact: Fact, started: float, finished: float, seconds: float) -> None:
        """A job's run of so many seconds is over, whether its caller is still there or had left."""
        left = job.state is not JobState.RUNNING
        job.happens(fact)
        self._count_run(job, started, seconds)
        self.ledger.end(job)
        job.started, job.finished = started, finished
        counters = job.source.runner.counters
        if left:
            counters.wasted_seconds += seconds
        elif fact is Fact.SUCCEED:
            counters.completed += 1
        else:
            counters.failed += 1
        if not left and job.deadline is not None:
            self.timers.ended(job)
        job.source.live -= 1

    def _end_batch(self, leader: Job, ok: bool, started: float, finished: float) -> None:
        """Each member has its part of the run by its rows. One that failed says nothing of any one of them: they are run again."""
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
        leader.rest = tuple(again)

    def _count_run(self, job: Job, started: float, seconds: float) -> None:
        """One more run of a job, or its part of one, has taken so long."""
        runner = job.source.runner
        counters = runner.counters
        if not job.again:
            counters.queue_seconds += started - job.submitted
        counters.run_seconds += seconds
        if job.inline:
            counters.inline += 1
        self.ledger.settle(job, seconds * runner.width)
        self._choice.took(job, seconds * runner.width)

    def _follow(self, source: Source, now: float, commands: list[Command]) -> None:
        """Hand the source's next jobs to lanes that run short ones of it, unless a better job waits for a lane."""
        placing = source.runner.placing
        while (
            source.followed
            and not source.closed
            and not source.halted
            and (job := source.queue.head()) is not None
        ):
            if job.holds or not placing.follows(job.bytes) or placing.inline(job.bytes):
                return
            if job.deadline is not None and (
                job.deadline <= now or self._would_be_late(job, job.deadline, now)
            ):
                return
            if not self._choice.may_follow(job, now):
                return
            self._unqueue(job)
            self._choice.launches(job, chosen=False)
            lane = source.followed.pop()
            self._start(job, lane, self.lanes.running[lane].slot, now, commands)
            self.lanes.following[lane] = job
            commands.append(Launch(job))
            self._choice.enter(source)
            self._dispatch(now, commands)  # the room it left may let others in

    def _grant(self, job: Job, now: float, commands: list[Command]) -> None:
        """What asked for a lease gets its slot, for which no lane is needed, and is done."""
        runner = job.source.runner
        job.happens(Fact.LAUNCH)
        self.ledger.rest(job)
        job.slot = runner.free.pop()
        job.epoch = runner.epoch
        job.started = now
        self._lease_ids += 1
        lease = Lease(self._lease_ids, runner, job.slot, job.payload)
        runner.leases[lease.id] = lease
        runner.live -= 1
        job.happens(Fact.SUCCEED)
        job.finished = now
        if self.memory.evicts:
            runner.used = now
        runner.counters.completed += 1
        runner.counters.queue_seconds += now - job.submitted
        self.timers.ended(job)
        commands.append(Grant(job, lease))

    def _leave_queue(self, job: Job, fact: Fact, now: float) -> None:
        """A job that is waiting or queued ends there."""
        waiting = job.state is JobState.WAITING
        job.happens(fact)
        job.finished = now
        source = job.source
        source.live -= 1
        if waiting:
            if source.runner.awaiting.pop(job.id, None) is None:
                self.room.leave(job)
        else:
            self._unqueue(job)
            self.ledger.rest(job)
            self._choice.enter(source)
        self.timers.ended(job)
        if isinstance(source, Lease):
            self._retire_if_over(source)

    def _unqueue(self, job: Job) -> None:
        """It leaves its queue, and the room that it had."""
        source, runner = job.source, job.source.runner
        if job.key is not None and self._may_have_company(job):
            _company(runner).leave(job)
        else:
            source.queue.remove(job)
        if self._forecast.kept:
            self._forecast.remove(job)
        self.ledger.leave(job)
        if self._watches_age and not job.holds:
            source.arrivals.remove(job)
        self.room.give_back(job)

    def _retire_if_over(self, lease: Lease) -> None:
        runner = lease.runner
        if lease.released and not lease.live and lease.id in runner.leases:
            del runner.leases[lease.id]
            runner.free.append(lease.free.pop())
            self._choice.forget(lease)
            self._choice.enter(runner)
            self._lease_ended = True

    def _revoke(self, job: Job, error: AotiSchedError, now: float, commands: list[Command]) -> None:
        self._leave_queue(job, Fact.REVOKE, now)
        job.source.runner.counters.revoked += 1
        commands.append(Revoke(job, error))

    def _serve_epoch(
        self, runner: RunnerState, now: float, commands: list[Command], *, back: bool
    ) -> None:
        """The runner's epoch has changed: who waited for it may queue, who can't have theirs any more, since it went back, is told."""
        for job in [*runner.waiting(), *runner.queue.jobs()] if back else []:
            error = barrier.epoch_refusal(job)
            if error is not None:
                self._revoke(job, error, now, commands)
        for job in [job for job in runner.awaiting.values() if job.min_epoch <= runner.epoch]:
            del runner.awaiting[job.id]
            self._ids += 1
            job.id = self._ids  # its turn counts from now
            self.room.wait(job)
        self.room.gates.enter(runner)

    def _see_what_is_over(self, runner: RunnerState, now: float, commands: list[Command]) -> None:
        if runner.closed and barrier.reach(runner):
            commands.append(BarrierReached(runner) if runner.memory.is_here else Park(runner))
        if runner.phase in (Phase.DRAINING, Phase.TERMINATED) and runner.idle:
            runner.phase = Phase.DRAINED
            commands.append(Drained(runner))
        # A busy runner may be evicted, too, but not while it has held leases.
        if self.memory.line and (self._lease_ended or not runner.busy):
            self._serve_line(now, commands)

    def _and_who_waits(self, commands: list[Command], now: float) -> list[Command]:
        """The same, and what follows for those that stand in line for memory."""
        self._serve_line(now, commands)
        return commands

    def _refused(self, runner: RunnerState) -> Ending:
        """There will be no room for the constants of a runner that is away."""
        error = self.memory.refusal(runner)
        return Ending(runner, self._ids, lambda _: error)

    def _serve_line(self, now: float, commands: list[Command]) -> None:
        self._lease_ended = False
        for runner in self.memory.serve(now, commands):
            self._end_in_slices(self._refused(runner), now, commands)
            self._see_what_is_over(runner, now, commands)
        self._ask_for_wake(commands)

    def _known(self, runner: RunnerState) -> None:
        if self.runners.get(runner.name) is not runner:
            raise IllegalFactError(f"{self.name} has no runner {runner.name!r}")

    # --- time ----------------------------------------------------------------------------------------

    def _is_late(self, job: Job, deadline: float, now: float, commands: list[Command]) -> bool:
        """Whether a job that is to start must not: its deadline has passed, or can't be met, by what is known of its runs.

        What is known may have become wrong, and only runs can tell: so every so often one is tried all the same.
        """
        if deadline <= now:  # this fact came before its tick
            self._expire(job, now, commands)
            return True
        if not self._would_be_late(job, deadline, now):
            return False
        times = job.source.runner.placing.times
        if times.doubt(job.bytes, now):
            job.tried = True
            return False
        self._expire(job, now, commands, self._takes(job))
        return True

    def _would_be_late(self, job: Job, deadline: float, now: float) -> bool:
        """Whether a run that starts now would end after its deadline, by what is known. A lease is no run."""
        if not self.policy.expire_late or job.holds or job.tried:
            return False
        return now + self._takes(job) > deadline

    def _takes(self, job: Job) -> float:
        """Seconds that it may need, by what is known. Where nobody else waits, half a chance is good enough to try."""
        times = job.source.runner.placing.times
        if self.load.jobs <= (job.state is JobState.QUEUED):
            return times.typical(job.bytes)
        return times.bound(job.bytes) if times.knows(job.bytes) else 0.0

    def _expire(
        self, job: Job, now: float, commands: list[Command], takes: float | None = None
    ) -> None:
        if job.state is JobState.RUNNING:
            job.happens(Fact.EXPIRE)
            self.timers.ended(job)
        else:
            self._leave_queue(job, Fact.EXPIRE, now)
        runner = job.source.runner
        runner.counters.expired += 1
        commands.append(Expire(job, takes))
        self._see_what_is_over(runner, now, commands)

    def _ask_for_wake(self, commands: list[Command]) -> None:
        at = None if self._goes_on else self.timers.next()
        if self.memory.wake is not None:
            at = self.memory.wake if at is None else min(at, self.memory.wake)
        if at is not None and (self._wake is None or at < self._wake):
            self._wake = at
            commands.append(WakeAt(at))

    # --- invariants ----------------------------------------------------------------------------------

    def check(self) -> None:
        """State the invariants; raises AssertionError. For tests, after every fact."""
        check(self)
