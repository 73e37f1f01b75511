"""Parking: evicts the weights of replicas that have to make room, and restores them.

`queue/memory.py` decides when, and whose weights.

Both block for long, so they run in worker threads. Weights that are being changed are not evicted
meanwhile, and evicted weights are restored before they are changed (`resident`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from aoti_sched.backends.reading import Abandoned
from aoti_sched.engine.worker import SourceThread, in_worker
from aoti_sched.errors import LoadError, RunnerClosedError
from aoti_sched.events import log
from aoti_sched.foreign import ended_by
from aoti_sched.queue.holding import Stay
from aoti_sched.queue.runner_state import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from aoti_sched.engine.dispatcher import Dispatcher
    from aoti_sched.engine.replica import Replica
    from aoti_sched.queue.holding import Holding


class Parking:
    """Evicts and restores the weights of one scheduler's replicas.

    Args:
        limiter: Limits the threads in which memory is freed.
    """

    def __init__(self, limiter: anyio.CapacityLimiter) -> None:
        self._limiter = limiter
        self._restores: dict[Replica, Callable[[], None]] = {}

    async def park(self, replica: Replica) -> None:
        """Free the weights of a replica with no run under way."""
        try:
            await in_worker(
                replica.container.park, self._limiter, f"runner {replica.name!r}: parking"
            )
        except Exception as error:  # noqa: BLE001 -- no caller waits, and nothing is lost
            log.error("weights can't be freed", runner=replica.name, error=error, exc_info=error)
        log.info(
            "model parked",
            runner=replica.name,
            device=replica.device,
            bytes=replica.state.memory.bytes,
        )
        replica.dispatcher.parked(replica.state)

    async def bring_back(self, replica: Replica) -> None:
        """Restore the weights, for which there is room now.

        If they can't be restored, the queued requests fail, and the next request tries again. The
        weights file may block for ever, so a thread of its own restores, and no other restore waits
        for it.
        """
        fault = None
        what = f"runner {replica.name!r}: its return"

        def ended(error: BaseException) -> Exception:
            if isinstance(error, Abandoned):
                return RunnerClosedError(f"{what}: abandoned, because the runner closes")
            return ended_by(error, LoadError, what)

        try:
            thread = SourceThread(
                replica.container.unpark, f"aoti weights of {replica.name}", what, ended
            )
            self._restores[replica] = thread.leave
            try:
                await thread.result()
            finally:
                del self._restores[replica]
        except Exception as error:  # noqa: BLE001 -- the requests that wait get it
            fault = error
            log.error(
                "weights can't be brought back", runner=replica.name, error=error, exc_info=error
            )
        replica.dispatcher.returned(replica.state, fault)
        if fault is None:
            took = round(replica.state.memory.took, 6)
            log.info("model is back", runner=replica.name, device=replica.device, seconds=took)

    @asynccontextmanager
    async def resident(self, replica: Replica, *, needed: bool) -> AsyncIterator[None]:
        """Keep the weights where they are for the duration of the block, then measure them again.

        Args:
            replica: Whose weights.
            needed: Whether the weights must be in memory. Otherwise evicted weights stay evicted.

        Raises:
            MemoryLimitError: The weights are evicted, and there is no room for them.
        """
        if replica.state.phase is not Phase.OPEN:  # its weights are not to be changed
            yield
            return
        replica.dispatcher.queue.pin(replica.state)
        try:
            if not needed:
                await self.settled_residency(replica)
            while needed and replica.state.memory.stay is not Stay.HERE:
                replica.dispatcher.call_back(replica.state)
                error = await asyncio.shield(replica.dispatcher.residency_change(replica.state))
                if error is not None:
                    raise error
            yield
        finally:
            replica.refresh_memory_use()

    def leave(self, replica: Replica) -> None:
        """Wait no longer for the weights file of a replica that closes and has no requests."""
        if replica in self._restores:
            self._restores[replica]()

    async def settled_residency(self, replica: Replica) -> None:
        """Wait until the weights are neither evicted nor restored at the moment."""
        while replica.state.memory.stay in (Stay.LEAVING, Stay.COMING):
            await asyncio.shield(replica.dispatcher.residency_change(replica.state))


async def claim(dispatcher: Dispatcher, holding: Holding, size: int) -> None:
    """Wait for `size` bytes of a device's memory.

    Raises:
        MemoryLimitError: There is no room, even if all idle models are evicted.
    """
    wanted = dispatcher.claim(holding, size)
    try:
        await wanted.payload
    except BaseException:
        dispatcher.give_up(wanted)
        raise
