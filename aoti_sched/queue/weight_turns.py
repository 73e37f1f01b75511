"""Weight turns: two sets of weights of one model, of which its container runs one at a time.

Sessions keep the weights that they began with (`engine/sessions.py`). While some of them are one
set behind, a model has two runner records on its device. `main` has the set that was published
last, and takes all other jobs. `behind` has the set before, and takes the jobs of those sessions.
Each has slots of its own, but only one of them serves: the barrier of the other is closed.

**A turn** closes the barrier of the record that serves. When every slot of it is free, `Turn`
follows, the caller exchanges the weights, and the other record's barrier opens.

**When.** The record that serves gives way if the other has queued jobs, and

- has none itself, or
- the other's first job is of a higher class, or
- both first jobs are of one class, it has served for `SHARE` times as long as the last turn took,
  and a run of it has ended.

So turns take no more than a fifth of the time, however many jobs are queued on both. A record with
held leases does not give way: their runs need its weights.

**On hold.** While the weights are changed or copied, `main` serves, and no turn begins.
"""

from __future__ import annotations

from typing import Final

from aoti_sched.queue.runner_state import RunnerState

SHARE: Final = 4.0
"""A record with queued jobs serves for at least this many times the time that a turn takes."""


class Turns:
    """The two records of one model, and which of them serves.

    Args:
        main: Has the set of weights that was published last.
        behind: Has the other set.
        now: The present time.

    Attributes:
        serving: The record whose weights the container runs.
        turning: Whether the barrier of that record is closed for a turn.
        held: Whether no turn may begin, except to `main`.
        broken: Whether the weights could not be exchanged, so that no turn begins any more.
        began: When the turn under way began.
        since: When the last turn ended.
        took: Seconds that the last turn took.
        ran: Whether a run has ended since the last turn.
    """

    __slots__ = (
        "began",
        "behind",
        "broken",
        "held",
        "main",
        "ran",
        "serving",
        "since",
        "took",
        "turning",
    )

    def __init__(self, main: RunnerState, behind: RunnerState, now: float) -> None:
        self.main = main
        self.behind = behind
        self.serving = main
        self.turning = False
        self.held = False
        self.broken = False
        self.began = now
        self.since = now
        self.took = 0.0
        self.ran = False

    @property
    def other(self) -> RunnerState:
        """Return the record that does not serve."""
        return self.behind if self.serving is self.main else self.main

    def gives_way(self, now: float) -> bool:
        """Return whether the record that serves is to give way now."""
        serving, other = self.serving, self.other
        if serving.closed or serving.leases or self.broken:
            return False
        if self.held:
            return other is self.main
        if not len(other.queue) or other.halted:
            return False
        if not len(serving.queue):
            return True
        theirs, ours = other.queue.head(), serving.queue.head()
        if theirs is not None and ours is not None and theirs.priority != ours.priority:
            return theirs.priority < ours.priority
        return self.ran and now - self.since >= SHARE * self.took

    def begin(self, now: float) -> None:
        """Begin a turn: the record that serves starts nothing more."""
        self.serving.closed = self.serving.aside = True
        self.turning = True
        self.began = now

    def cancel(self) -> None:
        """Cancel a turn whose weights are not exchanged: the same record serves on."""
        serving = self.serving
        serving.closed = serving.reached = serving.aside = False
        self.turning = False

    def end(self, now: float, *, exchanged: bool) -> None:
        """End a turn. Without an exchange of the weights, it was the last one."""
        if exchanged:
            self.serving = self.other
        else:
            self.broken = True
        self.cancel()
        self.ran = False
        self.took, self.since = now - self.began, now
