"""Leases: a job that asks for a slot is queued as any other and granted in its order."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aoti_sched.engine.future import future_of
from aoti_sched.errors import AotiSchedError
from aoti_sched.queue.job import Job, Priority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aoti_sched.engine.replica import Replica
    from aoti_sched.queue.runner_state import Lease


async def acquire(replica: Replica, job: Job, tag: str = "") -> tuple[Replica, Lease]:
    """Queue a job that asks for a lease, and wait for the grant.

    Args:
        replica: Where the lease is asked for.
        job: Asks for it.
        tag: The caller's name for it.

    Returns:
        The lease, with the replica that granted it. A rerouted job is granted by another replica.
    """
    future = future_of(replica, job, (), tag)
    try:
        replica.dispatcher.submit(job, wait=replica.blocks_when_full)
    except AotiSchedError as error:
        error.tag = tag
        raise
    try:
        state = await future
    except asyncio.CancelledError:
        if future.done() and not future.cancelled() and future.exception() is None:
            # The lease was granted, and the caller was cancelled before it could take it.
            future._replica.dispatcher.release(future.result())
        raise
    return future._replica, state


@asynccontextmanager
async def slot_for_update(replica: Replica) -> AsyncIterator[None]:
    """Hold a slot for the library's own work on the weights.

    The next free slot is granted, after HIGH requests that came before. Bounds protect against
    callers that send too much, so they do not apply here.
    """
    job = Job(replica.state, Priority.HIGH, None, 0, is_lease_request=True, bypasses_limits=True)
    holder, lease = await acquire(replica, job)
    try:
        yield
    finally:
        holder.dispatcher.release(lease)
