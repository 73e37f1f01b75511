"""DeviceQueue: the one mutator of a device's queue.

A method per fact, each taking `now` (seconds on the caller's clock, never going back) and returning the
commands that follow. The same facts give the same commands, always. An illegal fact raises
`IllegalFactError` and changes nothing. O(log n) per fact in the queued jobs, O(1) in idle runners.

A job's way: `submit` puts it at the gate (when there is no room and it may wait) or into its source's
queue; a source (a runner, or a held lease) that has a job and a free slot contends for a lane; `Launch`
gives the best job its slot and lane; `complete` brings both home. What a job can go through stands in
`job.TRANSITIONS`.
"""

from __future__ import annotations

import heapq
import math

from aoti_sched.errors import AotiSchedError, LeaseError, QueueFullError, RunnerClosedError
from aoti_sched.queue.admission import Bounds, Load
from aoti_sched.queue.command import (
    Command,
    Drained,
    Expire,
    Grant,
    Launch,
    Reject,
    Revoke,
    WakeAt,
)
from aoti_sched.queue.job import Fact, IllegalFactError, Job, JobState, Priority
from aoti_sched.queue.lease import Lease, Phase, RunnerState, Source
from aoti_sched.queue.order import Contest, JobQueue


def _must_be_lawful(job: Job) -> None:
    """Refuse a job that no order or bound is defined for; the front makes none."""
    if not 0 <= job.priority < len(Priority):
        raise IllegalFactError(f"there is no priority class {job.priority}")
    if job.bytes < 0:
        raise IllegalFactError(f"a job's inputs have {job.bytes} bytes")
    if job.deadline is not None and math.isnan(job.deadline):
        raise IllegalFactError("a job's deadline is not a number")
    if job.holds and isinstance(job.source, Lease):
        raise IllegalFactError(f"lease {job.source.id} holds one slot and can't lease it again")


def _gate_of(source: Source) -> JobQueue:
    return source.gate


def _queue_of(source: Source) -> JobQueue:
    return source.queue


def _has_free_slot(source: Source) -> bool:
    return bool(source.free)


def _has_room(source: Source) -> bool:
    head = source.gate.head()
    return head is not None and source.load.refusal(head.bytes) is None


class DeviceQueue:
    """The queue of one device with `lanes` lanes; at most `bounds` may be queued over all its runners."""

    def __init__(self, name: str, lanes: int, bounds: Bounds | None = None) -> None:
        if lanes < 1:
            raise IllegalFactError(f"{name}: a device has at least one lane, not {lanes}")
        self.name = name
        self.lanes = lanes
        self.load = Load(f"device {name}", bounds or Bounds())
        self.runners: dict[str, RunnerState] = {}
        self._free_lanes = list(reversed(range(lanes)))
        self._running: dict[int, Job] = {}  # by lane
        self._ready = Contest(_queue_of, _has_free_slot)
        self._gates = Contest(_gate_of, _has_room)
        self._deadlines: list[tuple[float, int, Job]] = []
        self._dead_deadlines = 0
        self._wake: float | None = None
        self._ids = 0
        self._lease_ids = 0

    @property
    def busy_lanes(self) -> int:
        """How many lanes run something."""
        return len(self._running)

    # --- facts about runners -------------------------------------------------------------------------

    def add_runner(
        self, name: str, slots: int, bounds: Bounds | None = None, *, epoch: int = 1
    ) -> RunnerState:
        if name in self.runners:
            raise IllegalFactError(f"{self.name} has a runner {name!r} already")
        if slots < 1:
            raise IllegalFactError(f"runner {name!r}: at least one slot, not {slots}")
        runner = RunnerState(name, slots, Load(f"runner {name!r}", bounds or Bounds()), epoch)
        self.runners[name] = runner
        return runner

    def drain_runner(self, runner: RunnerState, now: float) -> list[Command]:  # noqa: ARG002 -- facts take now
        """Refuse new work from now on and finish what was accepted, held leases included."""
        self._known(runner)
        if runner.phase is Phase.OPEN:
            runner.phase = Phase.DRAINING
        commands: list[Command] = []
        self._see_if_drained(runner, commands)
        return commands

    def terminate_runner(self, runner: RunnerState, now: float) -> list[Command]:
        """Fail what is queued, take held leases back, let what runs finish."""
        self._known(runner)
        if runner.phase >= Phase.TERMINATED:
            return []
        runner.phase = Phase.TERMINATED
        commands: list[Command] = []
        sources: list[Source] = [runner, *runner.leases.values()]
        for job in [job for source in sources for job in (*source.gate.jobs(), *source.queue.jobs())]:
            self._leave_queue(job, Fact.REVOKE, now)
            runner.counters.revoked += 1
            error = RunnerClosedError(f"runner {runner.name!r} was terminated while the request was queued")
            commands.append(Revoke(job, error))
        for lease in list(runner.leases.values()):
            lease.released = True
            self._retire_if_over(lease)
        self._dispatch(now, commands)  # the room that was freed may let others in
        self._see_if_drained(runner, commands)
        return commands

    def remove_runner(self, runner: RunnerState) -> None:
        """Forget a runner that was `Drained`."""
        self._known(runner)
        if runner.phase is not Phase.DRAINED:
            raise IllegalFactError(f"runner {runner.name!r} is {runner.phase.name}, it can't be removed")
        del self.runners[runner.name]
        self._ready.leave(runner)
        self._gates.leave(runner)

    # --- facts about jobs ----------------------------------------------------------------------------

    def submit(self, job: Job, now: float, *, wait: bool = False) -> list[Command]:
        """A new job. With `wait`, it is held at the gate when there is no room, otherwise rejected."""
        runner = job.source.runner
        if runner.phase is not Phase.DRAINED:  # one that was drained and removed is refused, not unknown
            self._known(runner)
        if job.state is not JobState.NEW:
            raise IllegalFactError(f"job {job.id} was submitted before, it is {job.state.name}")
        _must_be_lawful(job)
        self._ids += 1
        job.id = self._ids
        job.submitted = now
        runner.counters.submitted += 1
        error = self._refusal(job, wait=wait)
        if error is not None:
            job.happens(Fact.REJECT)
            runner.counters.rejected += 1
            return [Reject(job, error)]
        if job.deadline is not None:
            if job.deadline <= now:
                job.happens(Fact.EXPIRE)
                runner.counters.expired += 1
                return [Expire(job)]
            heapq.heappush(self._deadlines, (job.deadline, job.id, job))
        commands: list[Command] = []
        job.source.live += 1
        if self._full(job) is not None:
            job.happens(Fact.HOLD)
            job.source.gate.push(job)
            self._look_at_gate(job.source)
            self._dispatch(now, commands)
        elif self._is_uncontended(job):
            job.happens(Fact.ADMIT)
            self._launch(job, now, commands)
        else:
            self._admit(job)
            self._dispatch(now, commands)
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
        if self._running.get(job.lane) is not job:
            raise IllegalFactError(f"job {job.id} is {job.state.name} and not on a lane: it can't complete")
        left = job.state is not JobState.RUNNING
        job.happens(Fact.SUCCEED if ok else Fact.FAIL)
        job.started = job.started if started is None else started
        job.finished = now if finished is None else finished
        source, runner = job.source, job.source.runner
        counters, seconds = runner.counters, job.finished - job.started
        counters.queue_seconds += job.started - job.submitted
        counters.run_seconds += seconds
        if left:
            counters.wasted_seconds += seconds
        elif ok:
            counters.completed += 1
        else:
            counters.failed += 1
        if not left and job.deadline is not None:
            self._count_dead_deadline()
        del self._running[job.lane]
        self._free_lanes.append(job.lane)
        source.free.append(job.slot)
        source.live -= 1
        commands: list[Command] = []
        if isinstance(source, Lease):
            self._retire_if_over(source)
        self._ready.enter(source)
        self._dispatch(now, commands)
        self._see_if_drained(runner, commands)
        return commands

    def cancel(self, job: Job, now: float) -> list[Command]:
        """The caller gave up. A queued job leaves at once; a running one leaves its lane busy until it is done."""
        commands: list[Command] = []
        if job.state is JobState.RUNNING:
            job.happens(Fact.CANCEL)
            if job.deadline is not None:
                self._count_dead_deadline()
        else:
            self._leave_queue(job, Fact.CANCEL, now)
        job.source.runner.counters.cancelled += 1
        self._dispatch(now, commands)
        self._see_if_drained(job.source.runner, commands)
        return commands

    def tick(self, now: float) -> list[Command]:
        """Time has passed: every live job whose deadline is not after `now` expires."""
        commands: list[Command] = []
        while (entry := self._earliest()) is not None and entry[0] <= now:
            self._expire(entry[2], now, commands)
        self._dispatch(now, commands)
        self._wake = None
        self._ask_for_wake(commands)
        return commands

    def release(self, lease: Lease, now: float) -> list[Command]:
        """The holder is through with its lease; saying so twice changes nothing."""
        commands: list[Command] = []
        if not lease.released:
            lease.released = True
            self._retire_if_over(lease)
            self._dispatch(now, commands)
            self._see_if_drained(lease.runner, commands)
        return commands

    # --- what follows from facts ---------------------------------------------------------------------

    def _refusal(self, job: Job, *, wait: bool) -> AotiSchedError | None:
        source, runner = job.source, job.source.runner
        if isinstance(source, Lease):
            if runner.phase >= Phase.TERMINATED:
                return RunnerClosedError(
                    f"runner {runner.name!r} is {runner.phase.name.lower()}; its leases are gone"
                )
            if source.released:
                return LeaseError(
                    f"lease {source.id} of runner {runner.name!r} (slot {source.slot}) was released; take a new one "
                    "with runner.lease()"
                )
        elif runner.phase is not Phase.OPEN:
            return RunnerClosedError(
                f"runner {runner.name!r} is {runner.phase.name.lower()}; it takes no new requests"
            )
        never = source.load.never_fits(job.bytes) or self.load.never_fits(job.bytes)
        if never is not None:
            return QueueFullError(f"runner {runner.name!r}: the request can never be queued, {never}")
        full = None if wait else self._full(job)
        if full is None:
            return None
        return QueueFullError(
            f"runner {runner.name!r}: {full}. Send less, raise the bound, or load with overflow='wait'"
        )

    def _full(self, job: Job) -> str | None:
        """Why a job can't be queued now. Nobody passes those who wait at a gate already.

        A held lease answers for its own jobs alone. Those in the queue may wait for the very slot it
        holds: were its jobs held back by them, neither would ever go on.
        """
        source = job.source
        reason = source.load.refusal(job.bytes)
        waiting = len(source.gate) > 0
        if not isinstance(source, Lease):
            reason = reason or self.load.refusal(job.bytes)
            waiting = waiting or self._gates.best() is not None
        if reason is None and waiting:
            reason = "earlier requests are waiting for room"
        return reason

    def _admit(self, job: Job) -> None:
        job.happens(Fact.ADMIT)
        source = job.source
        for load in self._loads_of(source):
            load.add(job.bytes)
        source.queue.push(job)
        self._ready.enter(source)

    def _dispatch(self, now: float, commands: list[Command]) -> None:
        """Give free slots and lanes to the best jobs, and the room that this makes to those at the gate.

        A job whose deadline has passed is not launched, whichever fact finds it first.
        """
        while True:
            self._open_gates()
            job = self._ready.best()
            if job is None or not (job.holds or self._free_lanes):
                return
            if job.deadline is not None and job.deadline <= now:  # this fact came before its tick
                self._expire(job, now, commands)
                continue
            source = job.source
            source.queue.remove(job)
            self._free_room(job)
            self._launch(job, now, commands)
            self._ready.enter(source)

    def _is_uncontended(self, job: Job) -> bool:
        """Whether a slot and a lane are free for it and nobody else wants them: then it need not queue."""
        free = job.source.free and self._free_lanes
        return bool(free) and not job.holds and self._ready.best() is None

    def _launch(self, job: Job, now: float, commands: list[Command]) -> None:
        source = job.source
        job.happens(Fact.LAUNCH)
        job.slot = source.free.pop()
        job.epoch = source.epoch
        job.started = now
        if job.holds:
            self._grant(job, now, commands)
        else:
            job.lane = self._free_lanes.pop()
            self._running[job.lane] = job
            commands.append(Launch(job))

    def _grant(self, job: Job, now: float, commands: list[Command]) -> None:
        runner = job.source.runner
        self._lease_ids += 1
        lease = Lease(self._lease_ids, runner, job.slot, job.payload)
        runner.leases[lease.id] = lease
        runner.live -= 1
        job.happens(Fact.SUCCEED)
        job.finished = now
        runner.counters.completed += 1
        runner.counters.queue_seconds += now - job.submitted
        if job.deadline is not None:
            self._count_dead_deadline()
        commands.append(Grant(job, lease))

    def _open_gates(self) -> None:
        while (job := self._gates.best()) is not None and self.load.refusal(job.bytes) is None:
            runner = job.source.runner
            runner.gate.remove(job)
            self._admit(job)
            self._gates.enter(runner)

    def _look_at_gate(self, source: Source) -> None:
        """Its head or the room behind it changed. A runner's gate then contends for the device's room."""
        if isinstance(source, Lease):
            while (job := source.gate.head()) is not None and source.load.refusal(job.bytes) is None:
                source.gate.remove(job)
                self._admit(job)
        self._gates.enter(source.runner)

    def _leave_queue(self, job: Job, fact: Fact, now: float) -> None:
        """A job that is waiting or queued ends there."""
        waiting = job.state is JobState.WAITING
        job.happens(fact)
        job.finished = now
        source = job.source
        source.live -= 1
        if waiting:
            source.gate.remove(job)
            self._look_at_gate(source)
        else:
            source.queue.remove(job)
            self._free_room(job)
            self._ready.enter(source)
        if job.deadline is not None:
            self._count_dead_deadline()
        if isinstance(source, Lease):
            self._retire_if_over(source)

    def _free_room(self, job: Job) -> None:
        source = job.source
        for load in self._loads_of(source):
            load.remove(job.bytes)
        self._look_at_gate(source)

    def _loads_of(self, source: Source) -> tuple[Load, ...]:
        """Everything that counts a queued job of this source."""
        if isinstance(source, Lease):
            return source.load, source.runner.load, self.load
        return source.load, self.load

    def _retire_if_over(self, lease: Lease) -> None:
        runner = lease.runner
        if lease.released and not lease.live and lease.id in runner.leases:
            del runner.leases[lease.id]
            runner.free.append(lease.free.pop())
            self._ready.leave(lease)
            self._ready.enter(runner)

    def _see_if_drained(self, runner: RunnerState, commands: list[Command]) -> None:
        if runner.phase in (Phase.DRAINING, Phase.TERMINATED) and runner.idle:
            runner.phase = Phase.DRAINED
            commands.append(Drained(runner))

    def _known(self, runner: RunnerState) -> None:
        if self.runners.get(runner.name) is not runner:
            raise IllegalFactError(f"{self.name} has no runner {runner.name!r}")

    # --- deadlines -----------------------------------------------------------------------------------

    @staticmethod
    def _is_dead(job: Job) -> bool:
        return job.state > JobState.RUNNING

    def _expire(self, job: Job, now: float, commands: list[Command]) -> None:
        if job.state is JobState.RUNNING:
            job.happens(Fact.EXPIRE)
            self._count_dead_deadline()
        else:
            self._leave_queue(job, Fact.EXPIRE, now)
        runner = job.source.runner
        runner.counters.expired += 1
        commands.append(Expire(job))
        self._see_if_drained(runner, commands)

    def _ask_for_wake(self, commands: list[Command]) -> None:
        entry = self._earliest()
        if entry is not None and (self._wake is None or entry[0] < self._wake):
            self._wake = entry[0]
            commands.append(WakeAt(self._wake))

    def _earliest(self) -> tuple[float, int, Job] | None:
        """The first deadline of a live job; those of ended jobs before it are dropped."""
        while self._deadlines and self._is_dead(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
            self._dead_deadlines -= 1
        return self._deadlines[0] if self._deadlines else None

    def _count_dead_deadline(self) -> None:
        """Entries of ended jobs stay in the heap until they surface, or until they outnumber the others."""
        self._dead_deadlines += 1
        if self._dead_deadlines > len(self._deadlines) // 2 + 16:
            self._deadlines = [entry for entry in self._deadlines if not self._is_dead(entry[2])]
            heapq.heapify(self._deadlines)
            self._dead_deadlines = 0

    # --- invariants ----------------------------------------------------------------------------------

    def check(self) -> None:
        """State the invariants; raises AssertionError. For tests, after every fact."""

        def must(truth: bool, sentence: str) -> None:
            if not truth:
                raise AssertionError(f"{self.name}: {sentence}")

        must(len(self._free_lanes) + len(self._running) == self.lanes, "each lane is free or runs one job")
        must(
            sorted([*self._free_lanes, *self._running]) == list(range(self.lanes)),
            "no lane is lost or doubled",
        )
        queued_jobs = queued_bytes = 0
        for runner in self.runners.values():
            on_lanes = [job for job in self._running.values() if job.source.runner is runner]
            held = [lease.slot for lease in runner.leases.values()]
            own = [job.slot for job in on_lanes if job.source is runner]
            must(
                sorted([*runner.free, *held, *own]) == list(range(runner.slots)), "free + leased = all slots"
            )
            for lease in runner.leases.values():
                busy = [job for job in on_lanes if job.source is lease]
                must(len(busy) + len(lease.free) == 1, "a lease runs at most one job at a time")
                must(not lease.released or lease.live > 0, "a released lease with no jobs is retired")
            sources: list[Source] = [runner, *runner.leases.values()]
            queued = [job for source in sources for job in source.queue.jobs()]
            gate = [job for source in sources for job in source.gate.jobs()]
            must(all(job.state is JobState.QUEUED for job in queued), "what is in a queue is QUEUED")
            must(all(job.state is JobState.WAITING for job in gate), "what is at a gate is WAITING")
            must(runner.load.jobs == len(queued), "a runner's load counts its queued jobs")
            must(runner.load.bytes == sum(job.bytes for job in queued), "a runner's load counts its bytes")
            for lease in runner.leases.values():
                jobs = lease.queue.jobs()
                must(lease.load.jobs == len(jobs), "a lease's load counts its queued jobs")
                must(lease.load.bytes == sum(job.bytes for job in jobs), "a lease's load counts its bytes")
                must(lease.load.within_bounds(), "no bound of a lease is exceeded")
                must(
                    not lease.gate.jobs() or not _has_room(lease),
                    "nobody waits at a lease's gate when it has room",
                )
            must(
                sum(s.live for s in sources) == len(queued) + len(gate) + len(on_lanes),
                "live jobs are somewhere",
            )
            must(runner.load.within_bounds(*_lease_loads(runner)), "no bound of a runner is exceeded")
            if _has_room(runner):
                first = self._gates.best()
                blocked = first is not None and self.load.refusal(first.bytes) is not None
                must(blocked, "nobody waits at a gate when there is room")
            must((runner.phase is not Phase.DRAINED) or runner.idle, "a drained runner is idle")
            if self._free_lanes:
                must(
                    not any(s.free and len(s.queue) for s in sources),
                    "no job waits while a lane and a slot are free",
                )
            queued_jobs += len(queued)
            queued_bytes += sum(job.bytes for job in queued)
        must(
            self.load.jobs == queued_jobs and self.load.bytes == queued_bytes,
            "the device's load is its runners'",
        )
        leases = [load for runner in self.runners.values() for load in _lease_loads(runner)]
        must(self.load.within_bounds(*leases), "no bound of the device is exceeded")
        must(
            sum(self._is_dead(e[2]) for e in self._deadlines) == self._dead_deadlines,
            "dead deadlines are counted",
        )


def _lease_loads(runner: RunnerState) -> list[Load]:
    return [lease.load for lease in runner.leases.values()]
