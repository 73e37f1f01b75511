"""What loading finds out of really compiled packages, most of them torch's own."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch.testing import assert_close

from aoti_sched import Batching, ConfigError, DynamicDim, InputMismatchError, Scheduler, TensorSpec
from tests.models import build


@pytest.fixture
async def scheduler():
    async with Scheduler() as scheduler:
        yield scheduler


def notes(runner, words):
    return [note for note in runner.info.notes if words in note]


# --- state ----------------------------------------------------------------------------------------


async def test_first_answers_of_a_model_that_writes_to_a_buffer_are_right(scheduler):
    runner = await scheduler.load(build("foreign_counter").path, instances=3)
    answers = [float((await runner.run(torch.zeros(16)))[0]) for _ in range(3)]
    assert answers == [4, 8, 12]
    assert runner.info.instances == 1
    assert notes(runner, "writes to its buffers")


async def test_buffers_that_are_only_read_cost_no_instances(scheduler):
    runner = await scheduler.load(build("pairs_of_rows").path, instances=3)
    assert runner.info.instances == 3
    assert not notes(runner, "writes to its buffers")


# --- sizes ----------------------------------------------------------------------------------------


async def test_small_sizes_that_are_right_are_taken(scheduler):
    built = build("pairs_of_rows")
    module = built.module()
    runner = await scheduler.load(built.path)
    for rows in (0, 2, 4, 16):
        x = torch.randn(rows, 3)
        assert_close(await runner.run(x, 2.5, True), module(x, 2.5, True))
    for rows in (1, 18):
        with pytest.raises(InputMismatchError):
            await runner.run(torch.randn(rows, 3), 2.5, True)


async def test_small_sizes_that_end_the_process_or_read_beyond_the_input_are_refused(scheduler):
    built = build("last_rows")
    runner = await scheduler.load(built.path)
    x = torch.randn(2, 3)
    assert_close(await runner.run(x), built.module()(x))
    for rows in (0, 1):
        with pytest.raises(InputMismatchError, match="at least 2"):
            await runner.run(torch.randn(rows, 3))
    (note,) = notes(runner, "takes sizes from 2")
    assert "1 is not taken" in note
    assert "load(..., inputs=" in note


async def test_declared_inputs_override_what_was_found(scheduler):
    spec = TensorSpec("x", "float32", (DynamicDim("batch", min=1), 3), order=(0, 1))
    runner = await scheduler.load(build("last_rows").path, inputs=[spec])
    await runner.run(torch.randn(1, 3))


async def test_strides_that_were_compiled_in_are_read(scheduler):
    runner = await scheduler.load(build("steps").path)
    assert [spec.strides for spec in runner.info.inputs] == [(6, 2), (0, 1)]


# --- batching -------------------------------------------------------------------------------------


async def test_a_model_whose_rows_influence_each_other_is_not_batched(scheduler):
    path = build("centered").path
    with pytest.raises(ConfigError, match=r"Rows influence each other.*assume_independent=True"):
        await scheduler.load(path, batching=Batching(dim=0))
    runner = await scheduler.load(path, batching=Batching(dim=0, assume_independent=True))
    assert runner.info.max_batch > 1


async def test_a_model_that_writes_to_an_input_is_not_batched(scheduler):
    path = build("cache_input").path
    with pytest.raises(ConfigError, match="writes to its input"):
        await scheduler.load(path, batching=Batching(dim=0, assume_independent=True))
    runner = await scheduler.load(path)
    cache, x = torch.zeros(1, 3), torch.randn(1, 3)
    await runner.run(cache, x)
    assert_close(cache, x)


async def test_two_symbols_for_one_batch_are_one(scheduler):
    runner = await scheduler.load(
        build("two_symbols").path, batching=Batching(dim=0, max_delay=0.05)
    )
    requests = [(torch.randn(1, 3), torch.randn(1, 3)) for _ in range(5)]
    futures = [runner.submit(*request) for request in requests]
    for (x, y), answer in zip(requests, await asyncio.gather(*futures), strict=True):
        assert_close(answer, (torch.relu(x), y * 2))
    assert max(future.trace.batch_size for future in futures) > 1
    with pytest.raises(InputMismatchError):
        await runner.run(torch.randn(1, 3), torch.randn(2, 3))


# --- warming up -----------------------------------------------------------------------------------


async def test_a_model_that_can_not_take_zeros_prints_nothing_and_gets_one_line(scheduler, capfd):
    built = build("picky")
    capfd.readouterr()
    runner = await scheduler.load(built.path, instances=2)
    (note,) = notes(runner, "Not warmed up")
    assert "\n" not in note
    assert "warmup_inputs=" in note
    assert "Exception" not in capfd.readouterr().err
    results = await asyncio.gather(*(runner.run(*built.args) for _ in range(4)))
    assert_close(results, [built.module()(*built.args)] * 4)


@pytest.mark.parametrize(
    "form", [lambda args: args, lambda args: (args, {})], ids=["args", "args and kwargs"]
)
async def test_a_model_is_warmed_up_on_what_it_is_given(scheduler, form):
    built = build("picky")
    runner = await scheduler.load(built.path, warmup_inputs=form(built.args))
    assert not notes(runner, "arm")


async def test_warm_up_inputs_that_do_not_fit_are_refused(scheduler):
    with pytest.raises(ConfigError, match="warmup_inputs"):
        await scheduler.load(build("picky").path, warmup_inputs=[1])
    with pytest.raises(ConfigError, match="warmup_inputs"):
        await scheduler.load(build("picky").path, warmup_inputs=(torch.arange(20, 23),) * 2)


# --- literals -------------------------------------------------------------------------------------


async def test_literals_that_a_package_does_not_state_are_noted(scheduler):
    runner = await scheduler.load(build("pairs_of_rows").path)
    (note,) = notes(runner, "compiled in")
    assert note.startswith("2 of its 3 arguments are no tensors: their values were compiled in")
