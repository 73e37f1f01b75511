"""Parking: frees the weights of runners that have to make room, and brings them back. When, and whose, is decided in `queue/memory.py`.

Both are long and blocking, so they are done in worker threads. A runner whose weights are being changed is not parked meanwhile, and one that is
parked comes back first (`at_home`): so whoever touches a container finds it there.
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
    from aoti_sched.queue.holding import Holding
    from aoti_sched.runner import Runner


class Parking:
    """Parks one scheduler's runners.

    Args:
        limiter: Of the threads in which memory is freed and filled.
    """

    def __init__(self, limiter: anyio.CapacityLimiter) -> None:
        self._limiter = limiter

    async def park(self, runner: Runner) -> None:
        """Its slots are all home: free its weights."""
        try:
            await in_worker(
                runner.container.park, self._limiter, f"runner {runner.name!r}: parking"
            )
        except Exception as error:  # noqa: BLE001 -- nobody waits for it, and nothing is lost
            log.error("weights can't be freed", runner=runner.name, error=error, exc_info=error)
        log.info(
            "model parked",
            runner=runner.name,
            device=runner.device,
            bytes=runner.state.memory.bytes,
        )
        runner.dispatcher.parked(runner.state)

    async def bring_back(self, runner: Runner) -> None:
        """There is room for its weights. If they can't be brought, its requests fail, and the next one tries again."""
        fault = None
        try:
            await in_worker(
                runner.container.unpark, self._limiter, f"runner {runner.name!r}: its return"
            )
        except Exception as error:  # noqa: BLE001 -- it is told to those who wait
            fault = error
            log.error(
                "weights can't be brought back", runner=runner.name, error=error, exc_info=error
            )
        runner.dispatcher.returned(runner.state, fault)
        if fault is None:
            took = round(runner.state.memory.took, 6)
            log.info("model is back", runner=runner.name, device=runner.device, seconds=took)

    @asynccontextmanager
    async def at_home(self, runner: Runner, *, needed: bool) -> AsyncIterator[None]:
        """Inside, its weights are in memory and stay there; afterwards it is known what they take. If they are not `needed`, they may also
        be parked, and stay so.

        Raises:
            MemoryLimitError: It is parked, and there is no room for it.
        """
        if runner.state.phase is not Phase.OPEN:  # it is not to be changed
            yield
            return
        runner.dispatcher.queue.pin(runner.state)
        try:
            if not needed:
                await self.still(runner)
            while needed and runner.state.memory.stay is not Stay.HERE:
                runner.dispatcher.call_back(runner.state)
                error = await asyncio.shield(runner.dispatcher.moved(runner.state))
                if error is not None:
                    raise error
            yield
        finally:
            account(runner)

    async def still(self, runner: Runner) -> None:
        """Wait until it neither leaves nor comes."""
        while runner.state.memory.stay in (Stay.LEAVING, Stay.COMING):
            await asyncio.shield(runner.dispatcher.moved(runner.state))


async def claim(dispatcher: Dispatcher, holding: Holding, size: int) -> None:
    """Wait for so many bytes of a device's memory.

    Raises:
        MemoryLimitError: They can't be had, even if all that is idle is parked.
    """
    wanted = dispatcher.claim(holding, size)
    try:
        await wanted.payload
    except BaseException:
        dispatcher.give_up(wanted)
        raise


def account(runner: Runner) -> None:
    """What a runner takes of its device's memory, now that nobody changes it any more."""
    container = runner.container
    kept = "" if runner.weights.is_empty else f"it keeps {runner.weights.inactive.value}"
    inactive = container.constant_bytes if container.inactive_bytes else 0
    runner.dispatcher.settle(
        runner.state.memory,
        constants=container.constant_bytes,
        inactive=inactive,
        fixed=runner.fixed or container.unparkable or kept,
    )
    runner.state.memory.workspace = container.workspace or 0
