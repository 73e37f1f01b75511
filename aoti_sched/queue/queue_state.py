"""The parts of a device's queue, and what happens to them when a job leaves the queue.

The classes of `slices.py`, `deadlines.py`, `launching.py`, `lifecycle.py`, `sessions.py` and
`device_queue.py` extend this one in that order. Each uses only what the ones before it define.
"""

from __future__ import annotations

from collections import deque

from aoti_sched.queue.admission.gate import Room
from aoti_sched.queue.admission.load import Bounds
from aoti_sched.queue.batching import BatchQueue
from aoti_sched.queue.commands import Command, GoOn, NextTurn, WakeAt
from aoti_sched.queue.ending import Ending
from aoti_sched.queue.job import Fact, IllegalFactError, Job, JobState
from aoti_sched.queue.lanes import Lanes
from aoti_sched.queue.memory import Memory
from aoti_sched.queue.policy import Policy
from aoti_sched.queue.runner_state import Lease, RunnerState, may_share_run
from aoti_sched.queue.selection.choice import Selector
from aoti_sched.queue.selection.fairness import FairShares
from aoti_sched.queue.selection.forecast import Forecast
from aoti_sched.queue.selection.placement import INLINE_BUDGET
from aoti_sched.queue.selection.urgency import Urgency
from aoti_sched.queue.timers import Timers
from aoti_sched.queue.weight_turns import Turns


def batch_queue_of(runner: RunnerState) -> BatchQueue:
    """Return the batchable jobs of a runner that makes batches."""
    return runner.batch_queue  # type: ignore[return-value]


class QueueState:
    """The parts of one device's queue.

    Args:
        name: The device's name.
        lanes: The number of lanes.
        bounds: The most that may be queued over all runners.
        inline_budget: Seconds of inline runs in one turn of the loop.
        cores: Cores that runs on lanes may take together; as many as lanes, if not given.
        policy: The device's choices among the rules.
        memory_limit: Bytes that the models may take; None for no limit.
        evicts: Whether idle runners are evicted when others need their memory.
    """

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
        if lanes < 1:
            raise IllegalFactError(f"{name}: a device has at least one lane, not {lanes}")
        cores = lanes if cores is None else cores
        if cores < 1:
            raise IllegalFactError(f"{name}: a device has at least one core, not {cores}")
        self.name = name
        self.policy = policy or Policy()
        self.lanes = Lanes(
            lanes,
            cores,
            inline_budget,
            keeps=self.policy.keeps_lanes,
            most=self.policy.most_lanes,
        )
        self.room = Room(name, bounds or Bounds())
        self.load = self.room.load
        self.memory = Memory(name, memory_limit, evicts=evicts)
        self.runners: dict[str, RunnerState] = {}
        self.turns: dict[RunnerState, Turns] = {}  # of both records of a model that takes turns
        self.fair_shares = FairShares(self.policy.fair)
        self._watches_age = self.policy.max_wait is not None
        self._selector = Selector(self.lanes, self.policy.max_wait)
        self._forecast = Forecast(self.lanes, fair=self.policy.fair)
        self._urgency = Urgency()
        self._turn_asked = False
        self._endings: deque[Ending] = deque()
        # Runners with jobs whose epoch has come, and that have not moved to the gate yet.
        self._moving: dict[RunnerState, None] = {}
        self._goes_on = False  # `go_on` was asked for
        self.timers = Timers()
        # Runners that received batchable jobs in this turn of the loop.
        self._gathering: list[RunnerState] = []
        self._wake: float | None = None
        self._ids = 0
        self._lease_ids = 0
        self._lease_ended = False  # since the runners in line for memory were served last

    @property
    def busy_lanes(self) -> int:
        """Return how many lanes run a job."""
        return self.lanes.count - len(self.lanes.free)

    def _leave_queue(self, job: Job, fact: Fact, now: float) -> None:
        """End a job that is waiting or queued."""
        waiting = job.state is JobState.WAITING
        job.happens_at(fact, now)
        job.finished = now
        source = job.source
        source.live -= 1
        if waiting:
            if not source.runner.awaiting.remove(job):
                self.room.leave(job)
                if job.names_epoch:
                    source.runner.epoch_bound.remove(job)
        else:
            self._unqueue(job)
            self.fair_shares.rest(job)
            self._selector.enter(source)
        self.timers.ended(job)
        if isinstance(source, Lease):
            self._retire_if_over(source)

    def _unqueue(self, job: Job) -> None:
        """Take a job out of its queue, and release its room."""
        source, runner = job.source, job.source.runner
        if job.key is not None and may_share_run(job):
            batch_queue_of(runner).leave(job)
        else:
            source.queue.remove(job)
        if self._forecast.kept:
            self._forecast.remove(job)
        if self._urgency.kept and job.deadline is not None:
            self._urgency.remove(job)
        self.fair_shares.leave(job)
        if job.age_node is not None:
            source.arrivals.remove(job.age_node)
            job.age_node = None
        self.room.give_back(job)
        if job.names_epoch:
            runner.epoch_bound.remove(job)

    def _retire_if_over(self, lease: Lease) -> None:
        runner = lease.runner
        if lease.released and not lease.live and lease.id in runner.leases:
            del runner.leases[lease.id]
            runner.free.append(lease.free.pop())
            self._selector.forget(lease)
            self._selector.enter(runner)
            self._lease_ended = True

    def _known(self, runner: RunnerState) -> None:
        if self.runners.get(runner.name) is not runner:
            raise IllegalFactError(f"{self.name} has no runner {runner.name!r}")

    def _ask_for_turn(self, commands: list[Command]) -> None:
        if not self._turn_asked:
            self._turn_asked = True
            commands.append(NextTurn())

    def _ask_to_go_on(self, commands: list[Command]) -> None:
        if not self._goes_on:
            self._goes_on = True
            commands.append(GoOn())

    def _ask_for_wake(self, commands: list[Command]) -> None:
        at = None if self._goes_on else self.timers.next()
        if self.memory.wake is not None:
            at = self.memory.wake if at is None else min(at, self.memory.wake)
        if at is not None and (self._wake is None or at < self._wake):
            self._wake = at
            commands.append(WakeAt(at))
