"""Lifecycle: facts about runners, from adding to removing them, and about their barriers."""

from __future__ import annotations

import math
from dataclasses import replace

from aoti_sched.errors import AotiSchedError, RunnerClosedError, UpdateAbortedError
from aoti_sched.queue import barrier
from aoti_sched.queue.admission.load import Bounds, Load
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Command
from aoti_sched.queue.ending import SLICE, Ending
from aoti_sched.queue.holding import Holding
from aoti_sched.queue.job import IllegalFactError, Job
from aoti_sched.queue.launching import Launching
from aoti_sched.queue.runner_state import Phase, RunnerState
from aoti_sched.queue.selection.placement import Placing


class Lifecycle(Launching):
    """Adds, drains, terminates and removes runners, and closes and opens their barriers."""

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
        routable: bool = False,
        memory: Holding | None = None,
    ) -> RunnerState:
        """Add a runner.

        Args:
            name: The runner's name, which no other runner of the device has.
            slots: How many slots the runner gives out.
            bounds: The most that may be queued at the runner.
            epoch: The epoch that serves at first.
            placing: Where runs go, on a lane or inline.
            batching: How jobs are batched; None where jobs always run alone.
            width: Cores that a run takes on a lane.
            share: The runner's part of the device's time, relative to the other runners' shares.
            sheds: Whether queued jobs are shed for better ones when the queue is full.
            predicts: Whether jobs that are predicted to miss their deadline are rejected.
            routable: Whether `when_finished` will be asked for this runner.
            memory: The record of the memory that was claimed for the runner, if any. The runner is
                then pinned until `update_use`.

        Returns:
            The runner's record.
        """
        if name in self.runners:
            raise IllegalFactError(f"{self.name} has a runner {name!r} already")
        if slots < 1:
            raise IllegalFactError(f"runner {name!r}: a runner has at least one slot, not {slots}")
        if not 1 <= width <= self.lanes.cores:
            raise IllegalFactError(
                f"runner {name!r}: a run takes {width} cores, and {self.name} has "
                f"{self.lanes.cores}"
            )
        if not 0.0 < share < math.inf:
            raise IllegalFactError(f"runner {name!r}: a share is a positive number, not {share}")
        if batching is not None and self.policy.max_wait is not None:
            # An overdue job does not wait for others to join its batch.
            delay = min(batching.max_delay, self.policy.max_wait)
            batching = replace(batching, max_delay=delay)
        load = Load(f"runner {name!r}", bounds or Bounds())
        runner = RunnerState(
            name,
            slots,
            load,
            epoch,
            placing or Placing(),
            self.fair_shares.open(name, share),
            memory or Holding(name),
            batching=batching,
            width=width,
            share=share,
            sheds=sheds,
            predicts=predicts,
        )
        self.runners[name] = runner
        self.lanes.add_slots(slots)
        self.memory.lives(runner, held=memory is not None)
        if (predicts or routable) and not self._forecast.kept:
            self._forecast.kept = True
            for other in self.runners.values():
                for source in (other, *other.leases.values()):
                    for job in source.queue.jobs():
                        self._forecast.add(job)
        if batching is not None and not self._urgency.kept:
            self._urgency.kept = True
            for other in self.runners.values():
                for source in (other, *other.leases.values()):
                    for job in source.queue.jobs():
                        if job.deadline is not None:
                            self._urgency.add(job, job.deadline)
        return runner

    def drain_runner(self, runner: RunnerState, now: float) -> list[Command]:
        """Refuse new work from now on and finish what was accepted, held leases included.

        Jobs that await an epoch are revoked, since they could wait for ever.
        """
        self._known(runner)
        if runner.phase is Phase.OPEN:
            runner.phase = Phase.DRAINING
        commands: list[Command] = []

        def error(job: Job) -> AotiSchedError:
            return RunnerClosedError(
                f"runner {runner.name!r} is draining; epoch {job.min_epoch}, which the request "
                f"waits for, was not published"
            )

        epochs = (runner.published, math.inf)
        if runner.awaiting.first(*epochs) is not None:
            ending = Ending(runner, self._ids, error, epochs=epochs)
            self._end_in_slices(ending, now, commands)
        if runner.batch_queue is not None:
            runner.batch_queue.flush(now)
            self._selector.enter(runner)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    def terminate_runner(self, runner: RunnerState, now: float) -> list[Command]:
        """Revoke what is queued, release held leases, and let the running jobs finish."""
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
        self._dispatch(now, commands)  # waiting jobs may be admitted to the freed room
        self._see_what_is_over(runner, now, commands)
        return commands

    def withdraw(self, runner: RunnerState, now: float) -> list[Command]:
        """Take out the waiting and queued jobs, to be submitted at another replica.

        One fact takes out a slice, in the order of arrival.

        Jobs of held leases stay, and so do jobs that bypass limits: they are meant for this runner.
        """
        self._known(runner)
        commands: list[Command] = []
        self._end_in_slices(Ending(runner, self._ids, None, awaiting=True), now, commands)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    def remove_runner(self, runner: RunnerState) -> None:
        """Remove a runner that was `Drained`."""
        self._known(runner)
        if runner.phase is not Phase.DRAINED:
            raise IllegalFactError(
                f"runner {runner.name!r} is {runner.phase.name}, it can't be removed"
            )
        self._forget(runner)
        self.lanes.remove_slots(runner)
        self.fair_shares.close(runner.name)

    def _forget(self, runner: RunnerState) -> None:
        del self.runners[runner.name]
        self._selector.forget(runner)
        self.room.gates.leave(runner)

    def close_barrier(
        self, runner: RunnerState, now: float, *, abort: bool = False
    ) -> list[Command]:
        """Start nothing more of this runner except runs of held leases.

        `BarrierReached` follows when every slot is free.

        With `abort`, queued jobs that are not a held lease's are revoked.
        """
        self._known(runner)
        barrier.close(runner)
        commands: list[Command] = []

        def error(_: Job) -> AotiSchedError:
            return UpdateAbortedError(
                f"runner {runner.name!r}: an update of its weights with barrier='abort' failed "
                "the queued requests. Send the request again"
            )

        if abort:
            self._end_in_slices(Ending(runner, self._ids, error), now, commands)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    def open_barrier(
        self, runner: RunnerState, now: float, *, epoch: int | None = None
    ) -> list[Command]:
        """Start jobs again, on another epoch if one is given.

        Jobs that waited for the epoch move to the gate, a slice at a time.
        """
        self._known(runner)
        before = runner.epoch
        barrier.open_on(runner, epoch)
        commands: list[Command] = []
        if epoch is not None:
            if runner.epoch < before:
                self._revoke_rolled_back(runner, now, commands)
            self._moving[runner] = None
            self._move_some(commands)
            self.room.gates.enter(runner)
        self._selector.enter(runner)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    def _revoke_rolled_back(self, runner: RunnerState, now: float, commands: list[Command]) -> None:
        """Revoke, in slices, the jobs that ask for a later epoch than the one that serves now."""
        epochs = (runner.epoch, runner.published)
        if any(jobs.first(*epochs) for jobs in (runner.awaiting, runner.epoch_bound)):
            ending = Ending(runner, self._ids, barrier.rolled_back, epochs=epochs)
            self._end_in_slices(ending, now, commands)

    def _move_some(self, commands: list[Command]) -> None:
        """Move a slice of the jobs whose epoch has come from `awaiting` to the gate.

        Jobs get new ids, so they count as arrived now. A halted runner is skipped, because its
        ending covers the jobs that have not moved.
        """
        left = SLICE
        for runner in list(self._moving):
            awaiting = runner.awaiting
            while (
                left and not runner.halted and (job := awaiting.first(0, runner.epoch)) is not None
            ):
                awaiting.remove(job)
                self._ids += 1
                job.id = self._ids
                runner.epoch_bound.add(job)
                self.room.wait(job)
                left -= 1
            if awaiting.first(0, runner.epoch) is None:
                del self._moving[runner]
        if self._moving:
            self._ask_to_go_on(commands)
