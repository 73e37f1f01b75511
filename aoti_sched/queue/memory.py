"""Memory: what the constants of a device's models take of it, and whose are freed when others
need the room.

Where the device has a `limit`, whoever needs memory claims it first. What is not there is made by
parking runners, if that is allowed: their constants are freed, and brought back when they are asked
for, while requests wait in their queues.

- A load or an update is refused when parking all that is idle now would not be enough. Of the idle
  ones those go that were used the longest ago.
- Runners that are asked for while they are away stand in line, and are not refused for being too
  many. When not enough of the others are idle, busy ones leave as well: they finish what runs, and
  the rest of theirs waits. Such a one was here before for at least `STAY` times as long as it took
  to come, so that no more than a fifth of the time goes into moving.
- Nobody leaves who has a held lease, or whose weights are being changed, or were, where only memory
  has them (`Holding.fixed`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from aoti_sched.errors import MemoryLimitError
from aoti_sched.queue import barrier
from aoti_sched.queue.commands import Claimed, Command, Park, Return
from aoti_sched.queue.holding import Holding, Stay
from aoti_sched.queue.runner_state import Phase, RunnerState

STAY = 4.0
"""A busy runner is left in memory for at least so many times the time that it took to come."""


class Claim:
    """So many bytes are wanted for one model; for all its constants, if it is one that `returns`.

    `payload` is the front's.
    """

    __slots__ = ("bytes", "holding", "payload", "returns")

    def __init__(
        self,
        holding: Holding,
        size: int,
        payload: Any = None,
        *,
        returns: RunnerState | None = None,
    ) -> None:
        self.holding = holding
        self.bytes = size
        self.payload = payload
        self.returns = returns


class Memory:
    """A device's. Without a `limit` (in bytes) all there is to do is to count.

    `used` is what is there, or was given to a claim; of that, `leaving` is about to be freed.
    `claims` wait for that, in their order, and are `promised` so much in all. In `line` stand
    runners that are away and asked for.
    """

    __slots__ = (
        "claims",
        "device",
        "evicts",
        "holdings",
        "leaving",
        "limit",
        "line",
        "promised",
        "used",
        "wake",
    )

    def __init__(self, device: str, limit: int | None = None, *, evicts: bool = False) -> None:
        self.device = device
        self.limit = limit
        self.evicts = evicts
        self.holdings: dict[Holding, RunnerState | None] = {}
        self.used = 0
        self.leaving = 0
        self.promised = 0
        self.claims: deque[Claim] = deque()
        self.line: dict[RunnerState, None] = {}
        self.wake: float | None = None
        """When a busy runner has been here for long enough, and there is somebody in line."""

    # --- who needs room ---------------------------------------------------------------------------

    def claim(self, claim: Claim, now: float) -> list[Command]:
        """`Claimed` follows when the bytes are there.

        Raises:
            MemoryLimitError: They will not be, even if all that is idle is parked.
        """
        commands: list[Command] = []
        victims = self._idle_victims(self._lacks(claim.bytes))
        if victims is None:
            raise self._refusal(claim)
        self.holdings.setdefault(claim.holding, None)
        self._promise(claim, victims, commands)
        self._give(now, commands)
        return commands

    def give_up(self, claim: Claim, now: float) -> list[Command]:
        """What was claimed is not wanted any more; if it was given, `update_use` gives it back."""
        commands: list[Command] = []
        if claim in self.claims:
            self.claims.remove(claim)
            self.promised -= claim.bytes
            self._give(now, commands)
        return commands

    def update_use(
        self, holding: Holding, constants: int, inactive: int, now: float
    ) -> list[Command]:
        """So much it has in truth."""
        commands: list[Command] = []
        if holding.stay is not Stay.AWAY:
            self.used += constants + inactive - holding.bytes
            if holding.stay is Stay.LEAVING:
                self.leaving += constants + inactive - holding.bytes
        holding.constants, holding.inactive = constants, inactive
        self._give(now, commands)
        return commands

    def release(self, holding: Holding, now: float) -> list[Command]:
        """It is closed, or was not loaded."""
        commands = self.update_use(holding, 0, 0, now)
        self.holdings.pop(holding, None)
        return commands

    def lives(self, runner: RunnerState, *, held: bool) -> None:
        """What was claimed is this runner's, which serves."""
        holding = runner.memory
        holding.stay, holding.updating = Stay.HERE, held
        self.holdings[holding] = runner

    # --- who leaves and comes ---------------------------------------------------------------------

    def asks(self, runner: RunnerState) -> bool:
        """Requests want one that is not here. Whether that is new in line."""
        if runner.memory.stay is not Stay.AWAY or runner in self.line:
            return False
        self.line[runner] = None
        return True

    def call_back(self, runner: RunnerState, now: float) -> list[Command]:
        """It is needed at once, or not at all; nothing happens unless it is away.

        Raises:
            MemoryLimitError: There will be no room, even if all that is idle is parked.
        """
        commands: list[Command] = []
        if runner.memory.stay is Stay.AWAY:
            claim = Claim(runner.memory, runner.memory.bytes, returns=runner)
            victims = self._idle_victims(self._lacks(claim.bytes))
            if victims is None:
                raise self._refusal(claim)
            self._promise(claim, victims, commands)
            self._give(now, commands)
        return commands

    def parked(self, holding: Holding, now: float) -> list[Command]:
        """Its constants have been freed."""
        holding.stay = Stay.AWAY
        holding.parked += 1
        self.leaving -= holding.bytes
        self.used -= holding.bytes
        commands: list[Command] = []
        self._give(now, commands)
        return commands

    def returned(self, holding: Holding, now: float, *, ok: bool) -> list[Command]:
        """They are there again; or could not be brought."""
        commands: list[Command] = []
        if ok:
            holding.stay = Stay.HERE
            holding.took, holding.since = now - holding.since, now
        else:
            holding.stay = Stay.AWAY
            self.used -= holding.bytes
            self._give(now, commands)
        return commands

    def serve(self, now: float, commands: list[Command]) -> list[RunnerState]:
        """Let come back who stands in line, one after the other.

        Returns those who never can: too much of the memory is of `fixed` ones.
        """
        hopeless = []
        self.wake = None
        while self.line:
            runner = next(iter(self.line))
            holding = runner.memory
            if not runner.load.jobs:
                del self.line[runner]  # whoever asked has left
                continue
            if self._never_fits(holding):
                del self.line[runner]
                hopeless.append(runner)
                continue
            lacks = self._lacks(holding.bytes)
            victims = self._idle_victims(lacks)
            if victims is None:
                victims = self._victims(lacks, now)
                if victims is None:
                    break
            self._promise(Claim(holding, holding.bytes, returns=runner), victims, commands)
            self._give(now, commands)
        return hopeless

    def refusal(self, runner: RunnerState) -> MemoryLimitError:
        """Why one that is away can't come back."""
        return self._refusal(Claim(runner.memory, runner.memory.bytes))

    def of(self, holding: Holding) -> int:
        """What it takes now."""
        waits = any(claim.returns is not None and claim.holding is holding for claim in self.claims)
        return 0 if waits or holding.stay is Stay.AWAY else holding.bytes

    # --- how it is decided ------------------------------------------------------------------------

    def _lacks(self, size: int) -> int:
        """What can't be had by waiting for those who leave already."""
        if self.limit is None:
            return 0
        return self.used - self.leaving + self.promised + size - self.limit

    def _idle_victims(self, lacks: int) -> list[RunnerState] | None:
        """Who is to leave for so many bytes, of those that do nothing; None when all of them
        were not enough.
        """
        idle = [runner for runner in self._movable() if not runner.busy]
        return _enough(sorted(idle, key=lambda runner: runner.used), lacks)

    def _victims(self, lacks: int, now: float) -> list[RunnerState] | None:
        """The same, of all that may leave: first those that do nothing, then those that have
        been here for the longest time.
        """
        able = []
        for runner in self._movable():
            at = runner.memory.since + STAY * runner.memory.took
            if not runner.busy or at <= now:
                able.append(runner)
            elif self.wake is None or at < self.wake:
                self.wake = at
        return _enough(sorted(able, key=lambda runner: (runner.busy, runner.memory.since)), lacks)

    def _movable(self) -> Iterable[RunnerState]:
        if not self.evicts:
            return
        for one, runner in self.holdings.items():
            if runner is None or one.stay is not Stay.HERE or not one.bytes:
                continue
            if not (one.fixed or one.updating or runner.leases or runner.phase is not Phase.OPEN):
                yield runner

    def _never_fits(self, holding: Holding) -> bool:
        fixed = sum(one.bytes for one in self.holdings if one.fixed and one.stay is not Stay.AWAY)
        return self.limit is not None and fixed + holding.bytes > self.limit

    def _promise(self, claim: Claim, victims: list[RunnerState], commands: list[Command]) -> None:
        """Those leave, and it comes after them."""
        if claim.returns is not None:
            claim.holding.stay = Stay.COMING
            self.line.pop(claim.returns, None)
        self.claims.append(claim)
        self.promised += claim.bytes
        for runner in victims:
            runner.memory.stay = Stay.LEAVING
            self.leaving += runner.memory.bytes
            barrier.close(runner)
            if barrier.reach(runner):
                commands.append(Park(runner))

    def _give(self, now: float, commands: list[Command]) -> None:
        """To those that were promised something, in their order, as long as it is there."""
        while self.claims:
            claim = self.claims[0]
            if self.limit is not None and claim.bytes and self.used + claim.bytes > self.limit:
                return
            self.claims.popleft()
            self.promised -= claim.bytes
            self.used += claim.bytes
            holding = claim.holding
            if claim.returns is not None:
                holding.since = now
                commands.append(Return(claim.returns))
                continue
            if self.holdings[holding] is None:
                holding.constants += claim.bytes
            else:
                holding.inactive += claim.bytes
            commands.append(Claimed(claim))

    def _refusal(self, claim: Claim) -> MemoryLimitError:
        there = [one for one in self.holdings if one.stay is not Stay.AWAY and one.bytes]
        listed = [f"{one.name!r} {_in_words(one.bytes)}{self._why_it_stays(one)}" for one in there]
        others = [claim.bytes for claim in self.claims]
        if others:
            listed.append(f"{_in_words(sum(others))} are promised to others")
        limit = self.limit or 0
        own = 0 if claim.holding.stay is Stay.AWAY else claim.holding.bytes
        if own + claim.bytes > limit:
            way_out = "It would not fit if it were alone: raise the limit"
        else:
            way_out = "Close a model, or raise the limit"
            way_out += "" if self.evicts else ", or let idle models be parked with evict='lru'"
        return MemoryLimitError(
            f"device {self.device!r}: model {claim.holding.name!r} needs {_in_words(claim.bytes)} "
            f"for its weights, and the memory_limit is "
            f"{_in_words(limit)}; taken: {', '.join(listed) or 'nothing'}. {way_out}",
            device=self.device,
            needed=claim.bytes,
            limit=limit,
            used=self.used,
        )

    def _why_it_stays(self, holding: Holding) -> str:
        """In brackets, where some are parked."""
        runner = self.holdings[holding]
        why = ""
        if self.evicts:
            if runner is None:
                why = "it is being loaded"
            elif holding.fixed:
                why = holding.fixed
            elif holding.updating:
                why = "its weights are being changed"
            elif runner.leases:
                why = "it has held leases"
            elif holding.stay is Stay.HERE and runner.busy:
                why = "it has requests"
        return f" ({why})" if why else ""


def _enough(in_order: list[RunnerState], lacks: int) -> list[RunnerState] | None:
    """The first of them that have so many bytes, without those that would not have been needed
    then; None when all have not.
    """
    chosen: list[RunnerState] = []
    for runner in in_order:
        if lacks <= 0:
            break
        chosen.append(runner)
        lacks -= runner.memory.bytes
    if lacks > 0:
        return None
    for runner in reversed(chosen[:-1]):
        if lacks + runner.memory.bytes <= 0:
            chosen.remove(runner)
            lacks += runner.memory.bytes
    return chosen


def _in_words(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size} bytes"
