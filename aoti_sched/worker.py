"""Worker threads: blocking calls of the front. Whatever a call raises is an `Exception` on the loop, and ends its own operation alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from aoti_sched.errors import LoadError
from aoti_sched.foreign import own

_T = TypeVar("_T")


async def in_worker(call: Callable[[], _T], limiter: anyio.CapacityLimiter, what: str) -> _T:
    """Call in a worker thread. The call goes on to its end when it is given up, and so does its caller.

    Args:
        call: Blocks.
        limiter: Of the threads.
        what: Names the call in a `LoadError`, which stands for a `BaseException` that it raises.
    """

    def guarded() -> _T:
        try:
            return call()
        except Exception:
            raise
        except BaseException as error:
            raise own(error, LoadError, what) from error

    return await anyio.to_thread.run_sync(guarded, limiter=limiter)
