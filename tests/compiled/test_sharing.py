"""Sharing and overload with really compiled models: what is measured of their runs is what they
are charged for.
"""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch.testing import assert_close

from aoti_sched import DeadlineUnreachableError, Limits, RunError, Scheduler
from tests.compiled.conftest import EXECUTORS
from tests.inside import container_of, replica_of, updates_of
from tests.models import build


@pytest.fixture(params=EXECUTORS)
async def scheduler(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    async with Scheduler() as scheduler:
        yield scheduler


def heavy_args():
    return build("heavy").args


async def test_models_get_their_shares_of_the_time_that_their_runs_really_take(scheduler):
    """One model's runs are many times as long as the other's; what counts is time."""
    settings = {"instances": 4, "limits": Limits(jobs=None), "placement": "lane"}
    much = await scheduler.load(build("heavy").path, name="much", share=3.0, **settings)
    little = await scheduler.load(build("mlp").path, name="little", **settings)
    short = torch.ones(64, 8)
    futures = [much.submit(*heavy_args()) for _ in range(40)]
    futures += [little.submit(short) for _ in range(100)]
    await asyncio.wait(futures[:20])  # both have had something to do all the time
    had = {runner.name: runner.stats().run_seconds for runner in (much, little)}
    done_little = little.stats().completed
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
    assert done_little == 100 or had["little"] > 0.2 * had["much"]
    assert much.stats().completed >= 20


async def test_runs_of_two_threads_take_two_cores_each(scheduler):
    runner = await scheduler.load(build("parallel").path, threads=2, instances=4)
    cpu = scheduler.stats().devices["cpu"]
    futures = [runner.submit(*build("parallel").args) for _ in range(50)]
    seen = set()
    while not all(future.done() for future in futures):
        now = scheduler.stats().devices["cpu"]
        seen.add(now.busy_lanes)
        assert now.free_cores == cpu.cores - runner.info.threads * now.busy_lanes >= 0
        await asyncio.sleep(0)
    assert max(seen) == cpu.cores // runner.info.threads
    for future in futures:
        assert_close(await future, build("parallel").module()(*build("parallel").args))


async def test_what_can_not_be_done_in_time_is_refused_once_runs_are_known(scheduler):
    runner = await scheduler.load(build("heavy").path, admission="predictive")
    for _ in range(8):
        await runner.run(*heavy_args())
    futures = [runner.submit(*heavy_args()) for _ in range(20)]
    with pytest.raises(
        DeadlineUnreachableError, match="runner 'model': the request would be finished in about "
    ) as refused:
        runner.options(timeout=0.001).submit(*heavy_args())
    assert refused.value.predicted > refused.value.timeout > 0
    answers = await asyncio.gather(*futures)
    assert len(answers) == 20


async def test_a_container_whose_runs_fail_is_built_anew_and_serves_with_its_weights(scheduler):
    failing = build("failing")
    runner = await scheduler.load(failing.path, on_failure="rebuild", instances=2)
    weights = {name: tensor * 2 for name, tensor in failing.module().state_dict().items()}
    await runner.update(weights)
    good, bad = torch.tensor([1, 2, 3]), torch.tensor([10])
    expected = await runner.run(good)
    before = container_of(runner)._raw
    for _ in range(5):
        with pytest.raises(RunError, match="index out of bounds"):
            await runner.run(bad)
    waiting = [runner.submit(good) for _ in range(8)]
    for answer in await asyncio.gather(*waiting):
        assert_close(answer, expected)
    assert runner.stats().health == "ok"
    assert container_of(runner)._raw is not before
    assert before._handle is None, "the old one is freed"
    assert runner.epoch == 2
    assert not runner.info.staged
    assert runner.info.previous_epoch is None


@pytest.mark.parametrize(
    "name", ["frozen", "custom_op", "weights_blob", "weights_pickle", "folding", "strided"]
)
async def test_whatever_its_weights_are_a_container_that_is_built_anew_gives_the_same_results(name):
    built = build(name)
    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path)
        before = await runner.run(*built.args, **built.kwargs)
        await updates_of(runner).renew(replica_of(runner))
        assert_close(await runner.run(*built.args, **built.kwargs), before, rtol=0, atol=0)
        assert runner.stats().phase == "OPEN"
