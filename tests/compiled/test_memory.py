"""Parking, with really compiled models: the memory is given back, and what comes back computes
what it did.
"""

from __future__ import annotations

import asyncio

import psutil
import pytest
import torch
from torch.testing import assert_close

from aoti_sched import DeviceConfig, MemoryLimitError, Scheduler, SchedulerConfig
from tests.inside import replica_of
from tests.models import build

MIB = 1 << 20


def limited(limit, **rest):
    return Scheduler(
        SchedulerConfig(devices={"cpu": DeviceConfig(memory_limit=limit, evict="lru", **rest)})
    )


async def test_the_memory_of_parked_models_is_given_back_and_they_answer_as_before():
    wide = build("wide")
    path, module, (x,) = wide.path, wide.module(), wide.args
    process = psutil.Process()
    async with limited(70 * MIB) as scheduler:
        runners = [
            await scheduler.load(path, name=f"m{number}", placement="lane") for number in range(5)
        ]
        before = process.memory_full_info().uss
        for runner in runners * 2:
            assert_close(await runner.run(x), module(x), rtol=1e-4, atol=1e-4)
        grown = process.memory_full_info().uss - before
        assert grown < 64 * MIB, "five sets were never there at once"
        memory = scheduler.stats().devices["cpu"].memory
        assert (memory.used, memory.parked) == (64 * MIB, 4 * 64 * MIB)
        assert [runner.stats().parked for runner in runners] == [True] * 4 + [False]


async def test_it_is_refused_before_any_of_it_is_there():
    path = build("wide").path
    before = psutil.Process().memory_full_info().uss
    async with limited(63 * MIB) as scheduler:
        with pytest.raises(
            MemoryLimitError,
            match=r"needs 64\.0 MiB for its weights, and the memory_limit is 63\.0 MiB",
        ):
            await scheduler.load(path)
        assert scheduler.stats().devices["cpu"].memory.used == 0
    assert psutil.Process().memory_full_info().uss - before < 60 * MIB


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "folding",
        "weights_blob",
        "weights_pickle",
        "strided",
        "aliasing",
        "custom_op",
        "linear_algebra",
        "frozen",
    ],
)
async def test_every_kind_of_weights_comes_back(name):
    model = build(name)
    async with limited(1 << 30) as scheduler:
        runner = await scheduler.load(model.path, name=name, placement="lane", instances=2)
        expected = await runner.run(*model.args, **model.kwargs)
        replica = replica_of(runner)
        container = replica.container
        assert container.unparkable == ""
        # its package or its source says that it writes to no buffer
        assert replica.not_evictable_because == ""
        for _ in range(3):
            await asyncio.to_thread(container.park)
            await asyncio.to_thread(container.unpark)
            answers = await asyncio.gather(
                *(runner.run(*model.args, **model.kwargs) for _ in range(8))
            )
            for answer in answers:
                assert_close(answer, expected)
        await asyncio.to_thread(container.park)  # and is closed like that


async def test_a_model_that_came_back_can_be_updated():
    model = build("canary")
    weights = {
        "first": torch.full((16, 16), 7.0),
        "middle": torch.full((64,), 7.0),
        "count": torch.full((3, 3), 7),
        "last": torch.full((5, 7), 7.0),
    }
    size = 1 << 12
    async with limited(size) as scheduler:
        runner = await scheduler.load(model.path, name="canary")
        takes = runner.stats().memory
        assert 1600 <= takes <= size // 2
        others = [
            await scheduler.load(model.path, name=f"other{number}")
            for number in range(size // takes)
        ]
        assert runner.stats().parked
        await runner.update(weights, keep_previous=False)
        assert set((await runner.run(*model.args))[0].flatten().tolist()) == {7.0}
        for other in others * 2:  # what was updated has the only copy of its weights, and stays
            assert set((await other.run(*model.args))[0].flatten().tolist()) == {1.0}
            assert not runner.stats().parked
        assert set((await runner.run(*model.args))[0].flatten().tolist()) == {7.0}


async def test_a_model_that_writes_to_its_buffers_is_not_parked():
    model = build("counter")
    async with limited(1 << 10) as scheduler:
        runner = await scheduler.load(model.path, name="counter")
        await runner.run(*model.args)
        with pytest.raises(MemoryLimitError, match="it writes to its buffers"):
            await scheduler.load(build("canary").path, name="canary")
        assert not runner.stats().parked


async def test_many_clients_of_more_models_than_fit():
    model = build("mlp")
    async with limited(8192) as scheduler:
        runner = await scheduler.load(model.path, name="first")
        takes, expected = runner.stats().memory, await runner.run(*model.args)
        many = [
            await scheduler.load(model.path, name=f"m{number}")
            for number in range(2 * (8192 // takes))
        ]

        async def client(number):
            for step in range(15):
                answer = await many[(number * 7 + step * 3) % len(many)].run(*model.args)
                assert_close(answer, expected)

        await asyncio.gather(*map(client, range(16)))
        stats = scheduler.stats().devices["cpu"]
        assert stats.memory.used <= 8192
        assert sum(one.parks for one in stats.runners.values()) > len(many)
        assert sum(one.failed for one in stats.runners.values()) == 0
