"""Lifecycle: facts about runners, from the first to the last, and the barriers between epochs."""

from __future__ import annotations

import math

import msgspec

from aoti_sched.errors import AotiSchedError, RunnerClosedError, UpdateAbortedError
from aoti_sched.queue import barrier
from aoti_sched.queue.admission.load import Bounds, Load
from aoti_sched.queue.batching import Batching
from aoti_sched.queue.commands import Command
from aoti_sched.queue.ending import Ending
from aoti_sched.queue.job import IllegalFactError, Job
from aoti_sched.queue.launching import Launching
from aoti_sched.queue.memory import Holding
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
