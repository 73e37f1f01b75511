"""Requests that run as one on really compiled models give each what it gets alone, on both
executors.
"""

from __future__ import annotations

import asyncio
import math
import random

import anyio
import pytest
import torch
from torch.testing import assert_close

import aoti_sched
from aoti_sched import Batching, Scheduler
from aoti_sched.engine import warmup
from tests.compiled.conftest import EXECUTORS
from tests.models import build


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    return request.param


def rows_of(args, dim, first, count):
    return [arg.narrow(dim, first, count).contiguous() for arg in args]


async def together(runner, requests):
    """All in one turn of the loop, behind a request that has the only lane."""
    futures = [runner.submit(*request) for request in requests]
    with anyio.fail_after(60):
        return await asyncio.gather(*futures), futures


@pytest.mark.parametrize("placement", ["lane", "inline"])
@pytest.mark.parametrize("name", ["mlp", "unbounded", "zero_rows", "frozen", "failing"])
async def test_rows_of_one_batch_equal_those_of_single_runs_at_every_size(
    executor, placement, name
):
    built = build(name)
    module = built.module()
    async with Scheduler() as scheduler:
        dim = 0 if built.definition.foreign else None
        batching = Batching(dim=dim, max_seconds=math.inf)
        runner = await scheduler.load(built.path, batching=batching, placement=placement)
        most = min(runner.info.max_batch, 16)
        (example,) = built.args
        sizes = []
        for size in range(1, most + 1):
            shape = (size, *example.shape[1:])
            whole = (
                torch.randn(shape) if example.is_floating_point() else torch.randint(0, 5, shape)
            )
            expected = module(whole)
            answers, futures = await together(
                runner, [(whole[row : row + 1],) for row in range(size)]
            )
            assert_close(torch.cat(answers), expected)
            sizes += [future.trace.batch_size for future in futures]
        assert max(sizes) > 1  # how large batches grow depends on the times, so on the machine
        assert runner.stats().failed == 0


async def test_requests_of_several_rows_share_a_batch_in_their_order(executor):
    built = build("mlp")
    module = built.module()
    rng = random.Random(0)
    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path, batching=Batching(max_size=32), placement="lane")
        requests = [(torch.randn(rng.randint(1, 9), 8),) for _ in range(60)]
        answers, futures = await together(runner, requests)
        for (x,), answer in zip(requests, answers, strict=True):
            assert_close(answer, module(x))
        assert max(future.trace.batch_size for future in futures) > 1


async def test_a_sequence_is_padded_to_the_longest_and_its_answer_cut_back(executor):
    built = build("attention")
    module = built.module()
    async with Scheduler() as scheduler:
        padded = Batching(ragged={"tokens": 0.0, "mask": False})
        runner = await scheduler.load(built.path, batching=padded, placement="lane")
        requests = [
            (torch.randn(1, length, 16), torch.ones(1, length, dtype=torch.bool))
            for length in [3, 9, 1, 32, 5, 5, 17, 2] * 4
        ]
        answers, futures = await together(runner, requests)
        for (tokens, mask), answer in zip(requests, answers, strict=True):
            assert answer.shape == tokens.shape
            assert_close(answer, module(tokens, mask), rtol=1e-4, atol=1e-5)
        assert max(future.trace.batch_size for future in futures) == 8


async def test_without_ragged_only_equal_lengths_go_together(executor):
    built = build("attention")
    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path, batching=True, placement="lane")
        requests = [
            (torch.randn(1, length, 16), torch.ones(1, length, dtype=torch.bool))
            for length in [3, 9] * 8
        ]
        answers, futures = await together(runner, requests)
        assert [answer.shape[1] for answer in answers] == [3, 9] * 8
        assert 1 < max(future.trace.batch_size for future in futures) <= 8


async def test_a_model_compiled_for_two_rows_takes_one_and_padding_is_never_returned(executor):
    built = build("conv")
    module = built.module()
    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path, batching=Batching(dim=0), placement="lane")
        requests = [(torch.randn(1, 3, 8, 8),) for _ in range(7)]
        answers, _ = await together(runner, requests)
        for (image,), answer in zip(requests, answers, strict=True):
            assert_close(answer, module(image), rtol=1e-4, atol=1e-5)
        async with runner.lease() as lease:
            assert_close(await lease.run(*requests[0]), module(*requests[0]), rtol=1e-4, atol=1e-5)
        with pytest.raises(
            aoti_sched.InputMismatchError, match="expected size 1 to 2 at dimension 0"
        ):
            await runner.run(torch.randn(3, 3, 8, 8))


async def test_a_model_compiled_for_two_rows_is_never_run_with_one_not_even_to_warm_it_up(
    monkeypatch,
):
    made = []
    example_inputs = warmup.example_inputs
    monkeypatch.setattr(
        warmup, "example_inputs", lambda specs: made.append(example_inputs(specs)) or made[-1]
    )
    async with Scheduler() as scheduler:
        await scheduler.load(build("conv").path, batching=Batching(dim=0))
    assert [[tuple(tensor.shape) for tensor in inputs] for inputs in made] == [
        [(2, 3, 8, 8)]
    ] * len(made)
    assert made


async def test_one_request_that_the_model_refuses_fails_alone(executor):
    built = build("failing")
    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path, batching=True, placement="lane")
        good = built.args[0][:1]
        bad = torch.full_like(good, 10**6)
        futures = [runner.submit(x) for x in [good, good, bad, good]]
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert [isinstance(answer, aoti_sched.RunError) for answer in answers] == [
            False,
            False,
            True,
            False,
        ]
        assert runner.stats().retried == 3
        assert_close(answers[1], answers[3])


async def test_results_are_views_of_one_output_unless_they_are_to_be_detached(executor):
    built = build("mlp")
    for detach in (False, True):
        async with Scheduler() as scheduler:
            runner = await scheduler.load(
                built.path, batching=Batching(detach_rows=detach), placement="lane"
            )
            answers, _ = await together(runner, [(torch.randn(1, 8),) for _ in range(9)])
            shared = {answer.untyped_storage().data_ptr() for answer in answers[2:]}
            assert (len(shared) == 7) is detach


async def test_many_clients_with_cancellations_lose_nothing(executor):
    built = build("mlp")
    module = built.module()
    rng = random.Random(1)
    async with Scheduler() as scheduler:
        runner = await scheduler.load(
            built.path, instances=2, batching=Batching(max_delay=0.001), overflow="wait"
        )

        async def client():
            for _ in range(60):
                x = torch.randn(rng.randint(1, 4), 8)
                future = runner.submit(x)
                if rng.random() < 0.2:
                    for _ in range(
                        rng.randrange(8)
                    ):  # turns of the loop: before, in and after its run
                        await asyncio.sleep(0)
                    future.cancel()
                if not future.cancelled():
                    assert_close(await future, module(x))

        with anyio.fail_after(120):
            await asyncio.gather(*(client() for _ in range(32)))
        stats = runner.stats()
        assert stats.submitted == stats.completed + stats.cancelled
        assert (stats.free_slots, stats.queued, stats.failed) == (2, 0, 0)
        assert stats.batches > 0
