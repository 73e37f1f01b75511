"""Loading in two steps: memory is reserved between inspecting a model and making its container."""

from __future__ import annotations

import msgspec
import pytest

from aoti_sched import DeviceConfig, MemoryLimitError, Scheduler, SchedulerConfig
from aoti_sched.testing import FakeBackend

CONFIG = SchedulerConfig(devices={"cpu": DeviceConfig(memory_limit=2)})


def backend_of(size, kind=FakeBackend):
    return kind({"m": len}, weights={"m": dict.fromkeys("abcd"[:size], 1)}, auto=True)


class Silent(FakeBackend):
    """Its packages do not state how many bytes their constants take."""

    def inspect(self, request):
        return msgspec.structs.replace(super().inspect(request), constant_bytes=0)


async def test_no_container_is_made_of_a_model_that_does_not_fit():
    backend = backend_of(3)
    async with Scheduler(CONFIG, devices={"cpu": backend}) as scheduler:
        with pytest.raises(MemoryLimitError):
            await scheduler.load("m.pt2")
        assert backend.containers == []
        assert scheduler.stats().devices["cpu"].memory.used == 0


async def test_memory_that_a_package_does_not_state_is_reserved_after_the_load():
    async with Scheduler(CONFIG, devices={"cpu": backend_of(2, Silent)}) as scheduler:
        await scheduler.load("m.pt2")
        assert scheduler.stats().devices["cpu"].memory.used == 2


async def test_a_loaded_model_that_proves_too_large_is_freed():
    backend = backend_of(3, Silent)
    async with Scheduler(CONFIG, devices={"cpu": backend}) as scheduler:
        with pytest.raises(MemoryLimitError):
            await scheduler.load("m.pt2")
        assert [container.closed for container in backend.containers] == [True]
        assert scheduler.stats().devices["cpu"].memory.used == 0
