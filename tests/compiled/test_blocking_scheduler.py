"""Programs without a loop, on really compiled models: threads, mappings, and the process's end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

from aoti_sched import BlockingScheduler, ConfigError, InputMismatchError
from tests.compiled.conftest import EXECUTORS, living_lanes
from tests.models import build

MLP = build("mlp")


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    return request.param


def requests(count):
    (example,) = MLP.args
    return [torch.randn(1, *example.shape[1:]) for _ in range(count)]


def test_threads_and_mappings_get_what_the_module_gives(executor):
    module, xs = MLP.module(), requests(60)
    expected = [module(x) for x in xs]
    with BlockingScheduler() as scheduler:
        runner = scheduler.load(MLP.path, instances=2, batching=True)
        with ThreadPoolExecutor(6) as pool:
            assert_close(list(pool.map(runner.run, xs)), expected)
        assert_close(list(runner.map(xs, at_once=8)), expected)
        assert_close([future.result() for future in map(runner.submit, xs)], expected)
        with runner.lease() as lease:
            assert_close(lease.run(xs[0]), expected[0])
        with pytest.raises(InputMismatchError):
            runner.run(xs[0].double())
        report = runner.update(module.state_dict())
        assert report.epoch == runner.epoch == 2
        assert_close(runner.run(xs[0]), expected[0])
    assert living_lanes() == []


async def test_a_mapping_over_an_async_source_gives_what_the_module_gives(executor, scheduler):
    module, xs = MLP.module(), requests(60)

    async def source():
        for x in xs:
            yield x

    runner = await scheduler.load(MLP.path, instances=2, batching=True)
    results = [result async for result in runner.map(source(), at_once=8)]
    assert_close(results, [module(x) for x in xs])
    async for _ in runner.map(source(), at_once=8, ordered=False):
        break
    assert_close(await runner.run(xs[0]), module(xs[0]))


def test_a_program_that_never_closes_ends(executor, python):
    program = """
    import sys, torch, aoti_sched
    runner = aoti_sched.BlockingScheduler().start().load(sys.argv[1], instances=2)
    x = torch.zeros(1, *map(int, sys.argv[2:]))
    futures = [runner.submit(x) for _ in range(500)]
    print(runner.run(x).shape[0])
    """
    (example,) = MLP.args
    done = python(program, MLP.path, *example.shape[1:])
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


async def test_a_signature_that_does_not_fit_the_package_leaves_nothing(scheduler):
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor: ...

    class One(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    with pytest.raises(ConfigError, match="missing a required argument: 'y'"):
        await scheduler.load(MLP.path, signature=Two.forward)
    assert scheduler.runners == {}
    runner = await scheduler.load(MLP.path, signature=One.forward)
    (x,) = requests(1)
    assert_close(await runner.run(x), MLP.module()(x))
