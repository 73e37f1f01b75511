"""Pruning: deletes extracted packages that no process uses, beside what the scheduler does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from aoti_sched.engine.worker import in_worker
from aoti_sched.events import log
from aoti_sched.package.prune import prune

if TYPE_CHECKING:
    import anyio


async def prune_cache(
    cache_dir: str | None, limit: int | None, age: float | None, limiter: anyio.CapacityLimiter
) -> None:
    """Prune the cache in a worker thread, and log the outcome..

    Args:
        cache_dir: The cache; None for the user's.
        limit: Bytes that may stay; None for any number.
        age: Seconds since the last use after which an entry is deleted; None for never.
        limiter: Of the worker threads.
    """
    folder = None if cache_dir is None else Path(cache_dir)
    call = functools.partial(prune, folder, limit=limit, age=age)
    try:
        pruned = await in_worker(call, limiter, "pruning the cache")
    except Exception as error:  # noqa: BLE001 -- the models serve on
        log.warning("cache not pruned", error=error)
    else:
        log.info(
            "cache pruned",
            entries=pruned.entries,
            bytes=pruned.bytes,
            left_bytes=pruned.left_bytes,
        )
