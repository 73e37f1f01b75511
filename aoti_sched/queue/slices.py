"""Slices: ends many waiting or queued jobs, a few in each fact, with all that follows."""

from __future__ import annotations

from aoti_sched.errors import AotiSchedError
from aoti_sched.queue import barrier
from aoti_sched.queue.commands import BarrierReached, Command, Drained, Park, Revoke, Turn, Withdraw
from aoti_sched.queue.counting import count_end
from aoti_sched.queue.ending import SLICE, Ending
from aoti_sched.queue.job import Fact, Job
from aoti_sched.queue.queue_state import QueueState
from aoti_sched.queue.runner_state import Phase, RunnerState
from aoti_sched.queue.weight_turns import Turns


class Slices(QueueState):
    """Ends jobs that are waiting or queued."""

    def _end_in_slices(self, ending: Ending, now: float, commands: list[Command]) -> None:
        """Begin to end jobs, after the jobs of endings that are under way."""
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
                    self._selector.enter(source)
                self.room.gates.enter(runner)
            left -= len(jobs)
            self._see_what_is_over(runner, now, commands)
        if self._endings:
            self._ask_to_go_on(commands)

    def _revoke(self, job: Job, error: AotiSchedError, now: float, commands: list[Command]) -> None:
        self._leave_queue(job, Fact.REVOKE, now)
        job.source.runner.counters.revoked += 1
        count_end(job, now)
        commands.append(Revoke(job, error))

    def _see_what_is_over(self, runner: RunnerState, now: float, commands: list[Command]) -> None:
        if self.turns and (turns := self.turns.get(runner)) is not None:
            self._see_turn(turns, now, commands)
        if runner.closed and barrier.reach(runner):
            commands.append(BarrierReached(runner) if runner.memory.is_here else Park(runner))
        if runner.phase in (Phase.DRAINING, Phase.TERMINATED) and runner.idle:
            runner.phase = Phase.DRAINED
            commands.append(Drained(runner))
        # A busy runner may be evicted, too, but not while it has held leases.
        if self.memory.line and (self._lease_ended or not runner.busy):
            self._serve_line(now, commands)

    def _see_turn(self, turns: Turns, now: float, commands: list[Command]) -> None:
        """Begin a turn if one is due; ask for the exchange once every slot is free."""
        if turns.gives_way(now):
            turns.begin(now)
        if turns.turning and barrier.reach(turns.serving):
            commands.append(Turn(turns.main))

    def _serve_line(self, now: float, commands: list[Command]) -> None:
        self._lease_ended = False
        for runner in self.memory.serve(now, commands):
            self._end_in_slices(self._refused(runner), now, commands)
            self._see_what_is_over(runner, now, commands)
        self._ask_for_wake(commands)

    def _and_who_waits(self, commands: list[Command], now: float) -> list[Command]:
        """Serve the runners in line for memory; return the commands, with those that follow."""
        self._serve_line(now, commands)
        return commands

    def _refused(self, runner: RunnerState) -> Ending:
        """Return the ending of the jobs of an evicted runner that can't be restored."""
        error = self.memory.refusal(runner)
        return Ending(runner, self._ids, lambda _: error)
