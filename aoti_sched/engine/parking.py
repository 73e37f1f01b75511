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

from aoti_sched.engine.worker import in_worker
from aoti_sched.events import log
from aoti_sched.queue.holding import Stay
from aoti_sched.queue.runner_state import Phase

if TYPE_CHECKING:
    from aoti_sched.engine.dispatcher import Dispatcher
    from aoti_sched.engine.replica import Replica
    from aoti_sched.queue.holding import Holding


class Parking:
    """Evicts and restores the weights of one scheduler's replicas.

    Args:
        limiter: Limits the threads in which memory is freed and filled.
    """

    def __init__(self, limiter: anyio.CapacityLimiter) -> None:
        self._limiter = limiter

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

        If they can't be restored, the queued requests fail, and the next request tries again.
        """
        fault = None
        try:
            await in_worker(
                replica.container.unpark, self._limiter, f"runner {replica.name!r}: its return"
            )
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
