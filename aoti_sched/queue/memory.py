"""Memory: which models are resident on a device, and which are evicted for others.

Where the device has a `limit`, memory is reserved with a claim before it is used. When too little
is free, runners are evicted, if that is allowed: their constants are freed, and restored when
requests ask for them. The requests wait in the runners' queues meanwhile.

- A load or an update is rejected when evicting all idle runners would not be enough. Of the idle
  runners, the least recently used are evicted.
- Evicted runners that requests ask for wait in line, however many they are. When too few of the
  others are idle, busy runners are evicted as well: their runs finish, and their other jobs wait.
  A busy runner is evicted only when it has been resident for at least `STAY` times as long as its
  restore took. So no more than a fifth of the time goes into restores.
- A runner is not evicted while it has a held lease, or while its weights are being changed. Nor is
  it evicted after a change whose weights exist in memory only (`Holding.fixed`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from aoti_sched.errors import MemoryLimitError
from aoti_sched.queue import barrier
from aoti_sched.queue.commands import Claimed, Command, Park, Return
from aoti_sched.queue.holding import Holding, Stay
from aoti_sched.queue.runner_state import Phase, RunnerState

STAY: Final = 4.0
"""A busy runner stays resident for at least this many times the time that its restore took."""


class Claim:
    """A request to reserve memory for one model.

    Args:
        holding: The model's record.
        size: The bytes to reserve, kept as `bytes`.
        payload: The caller's own; no rule reads it.
        returns: The evicted runner that the memory restores; None for a load or an update.

    Attributes:
        number: The number of the claim on its device, where facts are recorded; -1 before.
    """

    __slots__ = ("bytes", "holding", "number", "payload", "returns")

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
        self.number = -1


class Memory:
    """Accounts for one device's memory.

    Args:
        device: The device's name, for messages.
        limit: Bytes that the models may take; without a limit, memory is only counted.
        evicts: Whether runners are evicted when others need their memory.

    Attributes:
        holdings: The records of all models, each with its runner; None while that is loading.
        used: Bytes that are resident, or that were given to a claim.
        leaving: The part of `used` that evictions under way will free.
        claims: Claims that were accepted and wait until memory is freed, in their order.
        promised: Bytes of the waiting claims.
        line: Evicted runners that requests ask for, in their order.
        wake: When the next busy runner may be evicted; None when no runner in line waits for that.
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

    # --- claims and use ---------------------------------------------------------------------------

    def claim(self, claim: Claim, now: float) -> list[Command]:
        """Reserve memory. `Claimed` follows when the bytes are free.

        Raises:
            MemoryLimitError: Evicting all idle models would not be enough.
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
        """Cancel a claim that still waits. Memory that was given is released by `update_use`."""
        commands: list[Command] = []
        if claim in self.claims:
            self.claims.remove(claim)
            self.promised -= claim.bytes
            self._give(now, commands)
        return commands

    def update_use(
        self, holding: Holding, constants: int, inactive: int, now: float
    ) -> list[Command]:
        """Record a model's actual memory use in bytes."""
        commands: list[Command] = []
        if holding.stay is not Stay.AWAY:
            self.used += constants + inactive - holding.bytes
            if holding.stay is Stay.LEAVING:
                self.leaving += constants + inactive - holding.bytes
        holding.constants, holding.inactive = constants, inactive
        self._give(now, commands)
        return commands

    def release(self, holding: Holding, now: float) -> list[Command]:
        """Release the memory of a model that was closed or could not be loaded."""
        commands = self.update_use(holding, 0, 0, now)
        self.holdings.pop(holding, None)
        return commands

    def lives(self, runner: RunnerState, *, held: bool) -> None:
        """Note that a runner's model is resident and takes requests.

        With `held`, the model is not evicted until `DeviceQueue.update_use` unpins it.
        """
        holding = runner.memory
        holding.stay, holding.updating = Stay.HERE, held
        self.holdings[holding] = runner

    # --- evictions and restores -------------------------------------------------------------------

    def asks(self, runner: RunnerState) -> bool:
        """Put an evicted runner that requests ask for in line.

        Returns:
            Whether the runner is new in line. False also when the runner is not evicted.
        """
        if runner.memory.stay is not Stay.AWAY or runner in self.line:
            return False
        self.line[runner] = None
        return True

    def call_back(self, runner: RunnerState, now: float) -> list[Command]:
        """Restore a runner ahead of those in line. Changes nothing unless it is evicted.

        Raises:
            MemoryLimitError: Evicting all idle models would not be enough.
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
        """Note that an eviction is complete: the constants are freed."""
        holding.stay = Stay.AWAY
        holding.parked += 1
        self.leaving -= holding.bytes
        self.used -= holding.bytes
        commands: list[Command] = []
        self._give(now, commands)
        return commands

    def returned(self, holding: Holding, now: float, *, ok: bool) -> list[Command]:
        """Note that a restore is complete, or without `ok`, that it failed."""
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
        """Begin to restore the runners in line, one after the other, until the memory is used up.

        Returns:
            The runners that can't be restored, since `fixed` models take too much of the memory.
        """
        hopeless = []
        self.wake = None
        while self.line:
            runner = next(iter(self.line))
            holding = runner.memory
            if not runner.load.jobs:
                del self.line[runner]  # the requests that asked have ended
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
        """Return the error of an evicted runner that can't be restored."""
        return self._refusal(Claim(runner.memory, runner.memory.bytes))

    def of(self, holding: Holding) -> int:
        """Return the bytes that a model takes now; 0 while evicted, or waiting to be restored."""
        waits = any(claim.returns is not None and claim.holding is holding for claim in self.claims)
        return 0 if waits or holding.stay is Stay.AWAY else holding.bytes

    # --- decisions --------------------------------------------------------------------------------

    def _lacks(self, size: int) -> int:
        """Return the bytes that further evictions must free; 0 or less when none are needed."""
        if self.limit is None:
            return 0
        return self.used - self.leaving + self.promised + size - self.limit

    def _idle_victims(self, lacks: int) -> list[RunnerState] | None:
        """Choose idle runners to evict, the least recently used first.

        Returns:
            Runners that have `lacks` bytes together; None when all idle ones do not have them.
        """
        idle = [runner for runner in self._movable() if not runner.busy]
        return _enough(sorted(idle, key=lambda runner: runner.used), lacks)

    def _victims(self, lacks: int, now: float) -> list[RunnerState] | None:
        """Choose runners to evict: first idle ones, then busy ones, the longest resident first.

        Sets `wake` to the time at which the next busy runner may be evicted.

        Returns:
            Runners that have `lacks` bytes together; None when all that may be evicted do not.
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
        """Accept a claim, and begin to evict the runners whose memory the claim waits for."""
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
        """Give free memory to the accepted claims, in their order."""
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
        """Return why a model is not evicted, in brackets; "" where models never are."""
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
    """Choose the first runners that have `lacks` bytes together.

    A later runner may have so many bytes that an earlier one is not needed; that one is left out.

    Returns:
        The chosen runners; None when all of them do not have enough bytes.
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
