"""Where runs of a really compiled model go: to lanes, or inline on the loop's thread; what the
loop feels of it.
"""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch.testing import assert_close

from aoti_sched import Scheduler
from tests.compiled.conftest import EXECUTORS
from tests.models import build

X = torch.ones(2, 8)


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    return request.param


@pytest.fixture
def expected():
    with torch.no_grad():
        return build("mlp").module()(X)


async def test_the_stats_say_which_executor_runs(executor):
    async with Scheduler() as scheduler:
        await scheduler.load(build("mlp").path)
        assert scheduler.stats().devices["cpu"].executor == executor


async def test_a_run_that_goes_inline_is_over_without_a_turn_of_the_loop(executor, expected):
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("mlp").path, placement="inline")
        future = runner.submit(X)
        assert future.done()
        assert (future.trace.placement, future.trace.lane) == ("inline", -1)
        assert_close(await future, expected)
        await asyncio.sleep(
            0.01
        )  # a new turn has its whole budget, however long the first run took
        running = runner.run(X)
        with pytest.raises(StopIteration) as over:
            running.send(None)
        assert_close(over.value.value, expected)
        assert runner.stats().inline == 2


async def test_runs_that_are_short_are_learned_to_go_inline(executor, expected):
    async with Scheduler() as scheduler:
        # The limit is far above what the model takes, on however busy a machine.
        runner = await scheduler.load(build("mlp").path, placement="auto", inline_limit=0.5)
        places = []
        for _ in range(200):
            future = runner.submit(X)
            assert_close(await future, expected)
            places.append(future.trace.placement)
        assert places[0] == "lane"
        assert (
            "inline" in places
        )  # where the machine stops one for longer than a turn's budget, it is learned anew


async def test_a_client_that_awaits_inline_runs_in_a_tight_loop_lets_others_run(executor):
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("mlp").path, placement="inline")
        over = False
        turns = runs = 0

        async def other():
            nonlocal turns, over
            for _ in range(50):
                await asyncio.sleep(0)
                turns += 1
            over = True

        task = asyncio.create_task(other())
        while not over:
            await runner.run(X)
            runs += 1
        await task
        assert turns == 50
        assert runner.stats().inline == runs
