"""Holders: which tasks hold the leases of a runner, and which calls wait for such a lease in vain.

A task that awaits a slot while it holds all of them itself waits for ever. Such a call is refused.
Where a call only seems to wait for ever, the log says so: other tasks can release a lease.
In the place of a task stands the thread that calls a `BlockingScheduler`.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from aoti_sched.engine.callers import PATIENCE, caller
from aoti_sched.errors import LeaseError
from aoti_sched.events import log
from aoti_sched.queue.runner_state import Phase

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from aoti_sched.engine.dispatcher import Clock, Timer
    from aoti_sched.engine.replica import Replica
    from aoti_sched.queue.runner_state import Lease, RunnerState


class Held:
    """A lease that is held.

    Attributes:
        lease: The queue's record of it.
        owner: The task or thread that acquired it; a weak reference.
        name: The owner's name.
        shared: Whether another task or thread has used it, and so may release it.
        uses: How many requests it was used for.
        reported: Whether the log has said that calls wait for it.
    """

    __slots__ = ("lease", "name", "owner", "reported", "shared", "uses")

    def __init__(self, lease: Lease, owner: asyncio.Task[object] | threading.Thread) -> None:
        self.lease = lease
        self.owner = weakref.ref(owner)
        if isinstance(owner, threading.Thread):
            self.name = f"thread {owner.name!r}"
        else:
            self.name = f"task {owner.get_name()!r}"
        self.shared = False
        self.uses = 0
        self.reported = False

    def __str__(self) -> str:
        return f"lease {self.lease.id} (slot {self.lease.slot}) of {self.name}"


class Holders:
    """The held leases of one runner.

    Args:
        name: The runner's.
        serving: The replicas that take requests, kept up to date by the router.
        clock: The scheduler's.

    Attributes:
        held: The leases; empty in most runners, which is all that a request looks at.
    """

    __slots__ = ("_clock", "_name", "_seen", "_serving", "_timer", "held")

    def __init__(self, name: str, serving: Sequence[Replica], clock: Clock) -> None:
        self.held: dict[Lease, Held] = {}
        self._name = name
        self._serving = serving
        self._clock = clock
        self._timer: Timer | None = None
        self._seen: dict[Lease, int] = {}

    def acquired(self, lease: Lease) -> None:
        """Note that the present task holds a lease."""
        owner = caller()
        if owner is not None:
            self.held[lease] = Held(lease, owner)
            self.watch()  # calls may wait already

    def released(self, lease: Lease) -> None:
        """Note that a lease is released."""
        self.held.pop(lease, None)

    def used(self, lease: Lease) -> None:
        """Note that a lease is used for a request."""
        held = self.held.get(lease)
        if held is not None:
            held.uses += 1
            if not held.shared and caller() is not held.owner():
                held.shared = True

    # --- certain ---------------------------------------------------------------------------------

    def must_leave_a_slot(self, call: str) -> None:
        """Check that the present task does not await a slot while it holds every slot.

        Raises:
            LeaseError: It does.
        """
        states = [replica.state for replica in self._serving]
        if len(self.held) < sum(state.slots for state in states):
            return
        own = self._own()
        for state in states:
            mine = sum(held.lease.runner is state for held in own)
            if mine < state.slots or state.phase is not Phase.OPEN:
                return
        if own:
            raise LeaseError(
                f"runner {self._name!r}: {call} would wait for ever: its caller holds every slot "
                f"itself ({_listed(own)}). Call lease.run(...) inside the block, or load the model "
                "with more instances"
            )

    def must_hold_none(self, call: str, device: str | None = None) -> None:
        """Check that the present task does not await the end of a lease that it holds.

        Args:
            call: What would wait.
            device: Only leases on this device are waited for; None for all devices.

        Raises:
            LeaseError: It does.
        """
        there = [one.state for one in self._serving if device in (None, one.device)]
        own = [held for held in self._own() if held.lease.runner in there]
        if own:
            raise LeaseError(
                f"runner {self._name!r}: {call} would wait for ever: it waits for held leases, and "
                f"its caller holds {_listed(own)}. Leave the block first"
            )

    def _own(self) -> list[Held]:
        """Return the leases that only the present task is known to use."""
        present = caller()
        return [
            held
            for held in self.held.values()
            if held.owner() is present is not None and not (held.shared or held.lease.released)
        ]

    # --- likely ----------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look after a while whether calls wait for leases that are not used."""
        if self._timer is None:
            self._seen = {lease: held.uses for lease, held in self.held.items()}
            self._timer = self._clock.call_at(self._clock.time() + PATIENCE, self._look)

    def close(self) -> None:
        """Stop looking. The runner is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        idle = [
            held
            for lease, held in self.held.items()
            if not lease.live and not lease.released and self._seen.get(lease) == held.uses
        ]
        waits = self._waits({held.lease for held in idle})
        if waits and not all(held.reported for held in idle):
            for held in idle:
                held.reported = True
            log.warning(
                "calls wait for leases that are not used",
                runner=self._name,
                waiting=", ".join(waits),
                holders=_listed(idle),
            )
        elif self._waits(set(self.held)):  # the leases were used meanwhile
            self.watch()

    def _waits(self, leases: set[Lease]) -> list[str]:
        """Return in words which calls wait until one of these leases is released."""
        states: dict[RunnerState, int] = {}
        for lease in leases:
            states[lease.runner] = states.get(lease.runner, 0) + 1
        waits = []
        requests = sum(
            state.waits + len(state.queue)
            for state, count in states.items()
            if count == state.slots
        )
        if requests and all(replica.state in states for replica in self._serving):
            waits.append(f"{requests} request{'s' * (requests != 1)}")
        if any(state.closed and state.memory.is_here for state in states):
            waits.append("an update")
        if any(state.phase is Phase.DRAINING for state in states):
            waits.append("a drain")
        return waits


def _listed(held: list[Held]) -> str:
    return ", ".join(map(str, held))
