"""Callers: which task, or which thread of a `BlockingScheduler`, the loop works for at present."""

from __future__ import annotations

import asyncio
import contextvars
import threading

PATIENCE = 1.0
"""Seconds for which a call waits, and leases are held and not used, before the log says so."""


THREAD: contextvars.ContextVar[threading.Thread | None] = contextvars.ContextVar(
    "THREAD", default=None
)
"""The thread that calls a `BlockingScheduler`, in what the event loop does for the call."""


def caller() -> asyncio.Task[object] | threading.Thread | None:
    """Return the present task, or the thread that the loop works for."""
    return THREAD.get() or asyncio.current_task()
