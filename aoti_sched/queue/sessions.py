"""Sessions: facts about jobs that keep an epoch's weights, and about `weight_turns.py`."""

from __future__ import annotations

from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.admission.load import Load
from aoti_sched.queue.commands import Command
from aoti_sched.queue.ending import Ending
from aoti_sched.queue.job import IllegalFactError
from aoti_sched.queue.lifecycle import Lifecycle
from aoti_sched.queue.runner_state import Phase, RunnerState
from aoti_sched.queue.weight_turns import Turns


class SessionFacts(Lifecycle):
    """Keeps the jobs of sessions on their weights."""

    def add_behind(self, main: RunnerState, name: str, now: float) -> RunnerState:
        """Add a second record to a runner, for the weights that are about to be replaced.

        The barrier of the runner must be reached. The second record has the runner's present epoch,
        its bounds once more, and shares all else with it. Turns are on hold until `release_turns`.

        Args:
            main: The runner.
            name: The name of the second record, which no other runner of the device has.
            now: The present time.

        Returns:
            The second record.
        """
        self._known(main)
        if main in self.turns or name in self.runners:
            raise IllegalFactError(f"runner {main.name!r} has a second record, or {name!r} exists")
        if not main.reached:
            raise IllegalFactError(f"runner {main.name!r}: slots are out, its weights serve on")
        batches = main.batch_queue
        behind = RunnerState(
            name,
            main.slots,
            Load(f"runner {name!r}", main.load.bounds),
            main.epoch,
            main.placing,
            main.accounts,
            main.memory,
            batching=None if batches is None else batches.rule,
            width=main.width,
            share=main.share,
            sheds=main.sheds,
            tenants=main.tenants,
        )
        behind.counters = main.counters
        behind.last_lanes = main.last_lanes
        behind.histograms = main.histograms
        behind.rejections = main.rejections
        behind.phase = main.phase
        behind.closed = behind.reached = behind.aside = True
        self.runners[name] = behind
        turns = self.turns[main] = self.turns[behind] = Turns(main, behind, now)
        turns.held = True
        return behind

    def keep_epoch(self, main: RunnerState, now: float) -> list[Command]:
        """Let the second record of a runner have the runner's present epoch, which ends.

        The barrier of the runner must be reached. The jobs of the second record are withdrawn.
        """
        turns = self._turns_of(main)
        behind = turns.behind
        if not main.reached or turns.serving is not main:
            raise IllegalFactError(f"runner {main.name!r}: slots are out, its weights serve on")
        commands: list[Command] = []
        self._end_in_slices(Ending(behind, self._ids, None), now, commands)
        behind.epoch = main.epoch
        behind.published = max(behind.published, behind.epoch)
        self._dispatch(now, commands)
        self._see_what_is_over(behind, now, commands)
        return commands

    def withdraw_pinned(self, runner: RunnerState, now: float) -> list[Command]:
        """Take out the waiting and queued jobs that are pinned to the runner's present epoch."""
        self._known(runner)
        commands: list[Command] = []
        epochs = (runner.epoch - 1, runner.epoch)
        ending = Ending(runner, self._ids, None, epochs=epochs, pinned=True)
        self._end_in_slices(ending, now, commands)
        self._dispatch(now, commands)
        self._see_what_is_over(runner, now, commands)
        return commands

    def revoke_behind(self, main: RunnerState, now: float, error: AotiSchedError) -> list[Command]:
        """Revoke the jobs of a runner's second record, whose weights are about to be gone."""
        behind = self._turns_of(main).behind
        commands: list[Command] = []
        self._end_in_slices(Ending(behind, self._ids, lambda _: error), now, commands)
        self._dispatch(now, commands)
        self._see_what_is_over(behind, now, commands)
        return commands

    def hold_turns(self, main: RunnerState, now: float) -> list[Command]:
        """Begin no turn from now on, except the one back to the runner's first record."""
        turns = self._turns_of(main)
        turns.held = True
        commands: list[Command] = []
        if turns.turning and turns.serving is main and not main.reached:
            turns.cancel()
            self._selector.enter(main)
            self._dispatch(now, commands)
        self._see_what_is_over(main, now, commands)
        return commands

    def release_turns(self, main: RunnerState, now: float) -> list[Command]:
        """Let turns begin again."""
        turns = self._turns_of(main)
        turns.held = False
        commands: list[Command] = []
        self._see_what_is_over(main, now, commands)
        return commands

    def turned(self, main: RunnerState, now: float, *, exchanged: bool) -> list[Command]:
        """Note that the weights of a runner that was to `Turn` are exchanged, or can't be.

        If they can't, the caller terminates the runner and its second record.
        """
        turns = self._turns_of(main)
        if not turns.turning or not turns.serving.reached:
            raise IllegalFactError(f"runner {main.name!r} was not to turn")
        turns.end(now, exchanged=exchanged)
        commands: list[Command] = []
        self._selector.enter(turns.serving)
        self._dispatch(now, commands)
        for one in (turns.serving, turns.other):
            self._see_what_is_over(one, now, commands)
        return commands

    def remove_runner(self, runner: RunnerState) -> None:
        """Remove a runner that was `Drained`, and its second record, if any, that was, too."""
        turns = self.turns.get(runner)
        if turns is not None:
            if runner is not turns.main or turns.behind.phase is not Phase.DRAINED:
                raise IllegalFactError(
                    f"runner {turns.behind.name!r} is {turns.behind.phase.name}, it can't be "
                    f"removed with {runner.name!r}"
                )
            if runner.phase is Phase.DRAINED:
                del self.turns[turns.main], self.turns[turns.behind]
                self._forget(turns.behind)
        super().remove_runner(runner)

    def _turns_of(self, main: RunnerState) -> Turns:
        turns = self.turns.get(main)
        if turns is None or turns.main is not main:
            raise IllegalFactError(f"runner {main.name!r} has no second record")
        return turns
