"""The pytest fixtures, and the scheduler on a fake backend that they and other tests use."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from aoti_sched.config import SchedulerConfig
from aoti_sched.config_file import read_config
from aoti_sched.engine.dispatcher import Clock
from aoti_sched.scheduler import Scheduler
from aoti_sched.testing.backend import FakeBackend, settle
from aoti_sched.testing.clock import ManualClock

_F = TypeVar("_F", bound=Callable[..., Any])


def _async_fixture(function: _F) -> _F:
    """Return pytest-asyncio's fixture where it is installed; anyio's plugin takes pytest's own."""
    fixture: Any = pytest.fixture
    with contextlib.suppress(ImportError):
        fixture = importlib.import_module("pytest_asyncio").fixture
    decorated: _F = fixture(function)
    return decorated


@pytest.fixture
def aoti_clock() -> ManualClock:
    """Return the `ManualClock` of the `aoti_scheduler` fixture."""
    return ManualClock()


@pytest.fixture
def aoti_backend(aoti_clock: ManualClock) -> FakeBackend:
    """Return the hand-stepped `FakeBackend` with two lanes of the `aoti_scheduler` fixture."""
    return FakeBackend(clock=aoti_clock)


@asynccontextmanager
async def fake_scheduler(
    backend: FakeBackend | None = None,
    clock: Clock | None = None,
    *,
    config: SchedulerConfig | str | os.PathLike[str] | None = None,
) -> AsyncIterator[Scheduler]:
    """Run a real `Scheduler` on a fake backend.

    On leaving, queued requests fail, running ones are finished, and async models are cancelled.

    Args:
        backend: The device; None for one without models. Without a clock, it gets the scheduler's.
        clock: The scheduler's clock; None for the event loop's.
        config: Settings, or the path of a TOML file. Their models are loaded on entry, so the
            backend must have a function for each.
    """
    backend = backend or FakeBackend()
    backend.keep_time(clock)
    if isinstance(config, (str, os.PathLike)):
        config = read_config(config)
    devices = {backend.name: backend}
    async with Scheduler(config, devices=devices, clock=clock) as scheduler:
        backend.watch(scheduler)
        try:
            yield scheduler
        finally:
            closing = asyncio.ensure_future(scheduler.terminate())
            await settle()  # what is queued has failed now, and will not follow on what finishes
            backend.finish_all()
            await settle()
            backend.cancel_all()
            await closing


@_async_fixture
async def aoti_scheduler(
    aoti_clock: ManualClock, aoti_backend: FakeBackend
) -> AsyncIterator[Scheduler]:
    """Run a real `Scheduler` on the `aoti_backend` and `aoti_clock`."""
    async with fake_scheduler(aoti_backend, aoti_clock) as scheduler:
        yield scheduler
