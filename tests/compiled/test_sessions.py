"""Sessions on really compiled models: each answer is that of the weights the session began with."""

from __future__ import annotations

import asyncio
import math
import random

import anyio
import pytest
import torch
from torch.testing import assert_close

from aoti_sched import Batching, EpochError, Scheduler
from tests.compiled.conftest import EXECUTORS
from tests.compiled.test_live_weights import canary_weights, number_in
from tests.models import build

UPDATES = 60


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    return request.param


@pytest.mark.parametrize("placement", ["lane", "auto"])
async def test_sessions_keep_their_weights_under_updates_and_rollbacks(executor, placement):
    x, draw = torch.randn(32, 16), random.Random(0)
    numbers, over = {1: 1}, False
    answers = {"sessions": 0, "behind": 0, "others": 0}
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path, instances=2, placement=placement)

        async def in_sessions(blocks_updates):
            while not over:
                async with runner.session(blocks_updates=blocks_updates) as session:
                    for _ in range(draw.randint(1, 30)):
                        try:
                            future = session.submit(x)
                            number = number_in(await future)
                        except EpochError:
                            assert not blocks_updates
                            break
                        assert future.trace.epoch == session.epoch
                        assert number == numbers[session.epoch]
                        answers["sessions"] += 1
                        answers["behind"] += session.epoch != runner.epoch
                        await asyncio.sleep(0)

        async def others():
            while not over:
                future = runner.submit(x)
                assert number_in(await future) == numbers[future.trace.epoch]
                answers["others"] += 1
                await asyncio.sleep(0)

        async def change():
            nonlocal over
            for number in range(2, UPDATES + 2):
                if runner.info.previous_epoch is not None and draw.random() < 0.2:
                    await runner.rollback()
                else:
                    numbers[max(numbers) + 1] = number
                    await runner.update(canary_weights(number), keep_previous=draw.random() < 0.8)
                await asyncio.sleep(draw.choice([0.0, 0.001, 0.01]))
            over = True

        clients = [in_sessions(number % 4 == 0) for number in range(12)]
        with anyio.fail_after(240):
            await asyncio.gather(change(), *clients, *[others() for _ in range(4)])
        stats = runner.stats()
        assert (stats.failed, stats.rejected, stats.queued, stats.running) == (0, 0, 0, 0)
        assert stats.submitted == stats.completed + stats.revoked
    assert min(answers.values()) > 0, answers


async def test_requests_of_sessions_that_are_behind_run_in_batches(executor):
    built = build("mlp")
    module = built.module()
    x = torch.randn(24, 8)
    async with Scheduler() as scheduler:
        batching = Batching(max_size=32, max_seconds=math.inf)
        runner = await scheduler.load(built.path, batching=batching, placement="lane")
        old = module(x)
        state = {name: value * 2 for name, value in module.state_dict().items()}
        module.load_state_dict(state)
        sizes = []
        async with runner.session() as one, runner.session() as other:
            await runner.update(state)
            for _ in range(10):
                handles = [(one, other, runner)[row % 3] for row in range(24)]
                futures = [handle.submit(x[row : row + 1]) for row, handle in enumerate(handles)]
                rows = await asyncio.gather(*futures)
                new = module(x)
                for row, handle in enumerate(handles):
                    expected = new if handle is runner else old
                    assert_close(rows[row], expected[row : row + 1])
                sizes += [f.trace.batch_size for f in futures if f.trace.epoch == 1]
        assert max(sizes) > 1
        assert runner.stats().failed == 0
