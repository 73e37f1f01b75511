"""A model gives what its eager module gives, whatever goes in and comes out, wherever its
weights lie.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

from aoti_sched import (
    Batching,
    InputMismatchError,
    MissingWeightsError,
    ModelNotFoundError,
    Priority,
    Scheduler,
    SpecSource,
    TensorSpec,
)
from tests.compiled.conftest import EXECUTORS
from tests.models import BuiltModel, build

# Three times over it adds up 960 products, and eager does so in another order.
TOLERANCES = {"heavy": {"atol": 1e-4, "rtol": 1e-3}}


async def load(scheduler, name, **settings):
    built = build(name)
    return built, await scheduler.load(built.path, name=name, **settings)


def fresh(example):
    """The same structure with other values."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.bool:
            return torch.rand(tensor.shape) < 0.5
        return torch.randn_like(tensor) if tensor.is_floating_point() else tensor.flip(-1)

    return tree_map_only(torch.Tensor, other, example)


@torch.no_grad()
def eager(built: BuiltModel, *args, **kwargs):
    return built.module()(*args, **kwargs)


# --- every kind of model --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "conv",
        "attention",
        "dtypes",
        "scalars",
        "zero_rows",
        "frozen",
        "folding",
        "strided",
        "weights_blob",
        "weights_pickle",
        "custom_op",
        "unbounded",
        "canary",
        "heavy",
        "failing",
        "parallel",
        "arrayref",
    ],
)
async def test_outputs_equal_the_eager_modules(scheduler, name):
    built, runner = await load(scheduler, name)
    for args in (built.args, fresh(built.args)):
        assert_close(await runner.run(*args), eager(built, *args), **TOLERANCES.get(name, {}))


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 63, 64])
async def test_a_dynamic_batch_may_have_any_size_up_to_the_compiled_maximum(scheduler, batch):
    built, runner = await load(scheduler, "mlp")
    x = torch.randn(batch, 8)
    assert_close(await runner.run(x), eager(built, x))


@pytest.mark.parametrize("batch", [0, 65])
async def test_a_batch_beyond_what_was_compiled_is_refused(scheduler, batch):
    _, runner = await load(scheduler, "mlp")
    with pytest.raises(InputMismatchError, match=rf"size 1 to 64 at dimension 0 .* got {batch}\."):
        await runner.run(torch.randn(batch, 8))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("length", [1, 5, 32])
async def test_two_dynamic_dimensions_vary_on_their_own(scheduler, batch, length):
    built, runner = await load(scheduler, "attention")
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    args = torch.randn(batch, length, 16), mask
    assert_close(await runner.run(*args), eager(built, *args))


@pytest.mark.parametrize("batch", [0, 1, 16])
async def test_an_empty_batch_gives_an_empty_result(scheduler, batch):
    built, runner = await load(scheduler, "zero_rows")
    x = torch.randn(batch, 3)
    result = await runner.run(x)
    assert result.shape == (batch, 2)
    assert_close(result, eager(built, x))


@pytest.mark.parametrize("batch", [1, 5, 1000])
async def test_each_dtype_comes_back_as_itself(scheduler, batch):
    built, runner = await load(scheduler, "dtypes")
    args = (
        torch.randint(-(1 << 40), 1 << 40, (batch,)),
        torch.rand(batch) < 0.5,
        torch.randn(batch, dtype=torch.bfloat16),
        torch.randn(batch, dtype=torch.float16),
        torch.randn(batch, dtype=torch.float64),
    )
    results = await runner.run(*args)
    assert [result.dtype for result in results] == [arg.dtype for arg in args]
    assert_close(results, eager(built, *args))


async def test_scalars_go_in_and_come_out_without_dimensions(scheduler):
    built, runner = await load(scheduler, "scalars")
    args = torch.tensor(-2.5), torch.tensor(7.0)
    product, total = await runner.run(*args)
    assert (product.shape, total.shape) == ((), ())
    assert_close((product, total), eager(built, *args))


# --- signatures -----------------------------------------------------------------------------------


async def test_keywords_nested_dicts_tuples_and_literals_are_passed_as_the_module_takes_them(
    scheduler,
):
    built, runner = await load(scheduler, "signature")
    args, kwargs = fresh((built.args, dict(built.kwargs)))
    result = await runner.run(*args, **kwargs)
    assert_close(result, eager(built, *args, **kwargs))
    assert list(result) == ["total", "parts", "nothing", "scale"]
    first, rest = result["parts"]
    assert (type(result["parts"]), type(rest), type(first)) == (tuple, list, torch.Tensor)
    assert (result["nothing"], result["scale"], type(result["scale"])) == (None, 2, int)


async def test_keywords_may_come_in_any_order(scheduler):
    built, runner = await load(scheduler, "signature")
    kwargs = dict(reversed(built.kwargs.items()))
    assert_close(await runner.run(*built.args, **kwargs), eager(built, *built.args, **built.kwargs))


async def test_dict_inputs_may_have_their_keys_in_any_order(scheduler):
    built, runner = await load(scheduler, "signature")
    x, pair, nested, nothing = fresh(built.args)
    turned = dict(reversed(nested.items()))
    assert_close(
        await runner.run(x, pair, turned, nothing, **built.kwargs),
        eager(built, x, pair, nested, nothing, **built.kwargs),
    )


async def test_positional_parameters_may_be_given_by_name(scheduler):
    built, runner = await load(scheduler, "signature")
    x, pair, nested, nothing = fresh(built.args)
    assert_close(
        await runner.run(x, nothing=nothing, nested=nested, pair=pair, **built.kwargs),
        eager(built, x, pair, nested, nothing, **built.kwargs),
    )


async def test_containers_that_only_torchs_pytree_knows_keep_their_type(scheduler):
    built, runner = await load(scheduler, "ordered")
    args = fresh(built.args)
    result = await runner.run(*args)
    assert type(result) is OrderedDict
    assert list(result) == ["sum", "difference"]
    assert_close(result, eager(built, *args))


# --- how it is called -----------------------------------------------------------------------------


async def test_requests_at_once_each_get_their_own_result(scheduler):
    built, runner = await load(scheduler, "mlp", instances=2)
    inputs = [torch.randn(size, 8) for size in range(1, 65)]
    results = await asyncio.gather(*(runner.run(x) for x in inputs))
    assert_close(results, [eager(built, x) for x in inputs])


async def test_views_with_other_options_and_leases_give_the_same_results(scheduler):
    built, runner = await load(scheduler, "mlp")
    x = torch.randn(3, 8)
    results = [
        await runner.options(priority=Priority.HIGH, timeout=60).run(x),
        await runner.options(priority=Priority.LOW).submit(x),
    ]
    async with runner.lease() as lease:
        results += [await lease.run(x), await lease.run(x)]
    assert_close(results, [eager(built, x)] * 4)


async def test_inputs_that_require_grad_or_come_from_inference_mode_give_plain_results(scheduler):
    built, runner = await load(scheduler, "mlp")
    learned = torch.nn.Parameter(torch.randn(2, 8))
    with torch.inference_mode():
        inferred = torch.randn(2, 8)
    for x in (learned, learned.detach().requires_grad_(), inferred):
        result = await runner.run(x)
        assert not result.requires_grad
        assert not result.is_inference()
        assert_close(result, eager(built, x))


async def test_the_inputs_are_left_as_they_were(scheduler):
    _, runner = await load(scheduler, "attention")
    args = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    before = [arg.clone() for arg in args]
    await runner.run(*args)
    assert all(map(torch.equal, args, before))


# --- where weights are, and what becomes of them --------------------------------------------------


async def test_a_package_without_weights_is_refused_at_load_by_their_names(scheduler):
    built = build("weights_none")
    with pytest.raises(
        MissingWeightsError, match=r"'none': the package brings no weights for 0\.weight, 0\.bias"
    ):
        await scheduler.load(built.path, name="none")
    assert "none" not in scheduler.runners


async def test_folded_constants_are_folded_and_said_to_be(scheduler):
    built, runner = await load(scheduler, "folding", instances=2)
    assert [constant.fqn for constant in runner.info.constants if constant.folded]
    results = await asyncio.gather(*(runner.run(*built.args) for _ in range(4)))
    assert_close(results, [eager(built, *built.args)] * 4)


async def test_a_frozen_model_says_that_its_weights_are_fixed(scheduler):
    built, runner = await load(scheduler, "frozen")
    assert runner.info.frozen is True
    assert any("freeze=True" in note for note in runner.info.notes)
    for batch in (1, 2, 32):
        x = torch.randn(batch, 32)
        assert_close(await runner.run(x), eager(built, x))


@pytest.mark.parametrize("name", ["mutating", "counter"])
async def test_a_model_that_writes_to_its_buffers_advances_as_the_eager_one_does(scheduler, name):
    built, runner = await load(scheduler, name, instances=4)
    module = built.module()
    results = await asyncio.gather(*(runner.run(*built.args) for _ in range(10)))
    with torch.no_grad():
        assert_close(results, [module(*built.args) for _ in range(10)])


async def test_a_model_that_writes_to_its_buffers_gets_one_instance_and_says_so(scheduler):
    _, runner = await load(scheduler, "mutating", instances=4)
    assert runner.info.instances == 1
    assert any("one at a time" in note for note in runner.info.notes)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("name", ["aliasing", "folded_output"])
async def test_changing_a_result_in_place_does_not_change_the_model(scheduler, name, warmup):
    built, runner = await load(scheduler, name, warmup=warmup)
    args = fresh(built.args)
    expected = eager(built, *args)
    for _ in range(3):
        results = await runner.run(*(arg.clone() for arg in args))
        assert_close(results, expected)
        for result in results:
            result.fill_(7)


# --- foreign packages, bare libraries -------------------------------------------------------------


async def test_a_foreign_package_is_checked_by_what_its_source_states(scheduler):
    built, runner = await load(scheduler, "conv")
    assert runner.info.spec_source is SpecSource.WRAPPER
    assert [str(spec) for spec in runner.info.inputs] == ["float32[2, 3, 8, 8]"]
    with pytest.raises(InputMismatchError, match="size 2 at dimension 0"):
        await runner.run(torch.randn(3, 3, 8, 8))
    assert_close(await runner.run(*built.args), eager(built, *built.args))


@pytest.mark.parametrize("batch", [1, 2, 1000])
async def test_a_foreign_package_with_a_dynamic_size_takes_any_in_its_range(scheduler, batch):
    built, runner = await load(scheduler, "unbounded")
    x = torch.randn(batch, 3)
    assert_close(await runner.run(x), eager(built, x))


async def test_what_the_user_declares_is_checked_where_the_package_says_nothing(
    scheduler, tmp_path
):
    built = build("conv")
    library = tmp_path / "conv.so"
    library.write_bytes(built.library().read_bytes())
    declared = TensorSpec(name="image", dtype="float32", shape=(2, 3, 8, 8), order=(0, 1, 2, 3))
    runner = await scheduler.load(library, inputs=[declared])
    assert runner.info.spec_source is SpecSource.DECLARED
    with pytest.raises(InputMismatchError, match="input 'image': expected size 8 at dimension 3"):
        await runner.run(torch.randn(2, 3, 8, 7))
    assert_close(await runner.run(*built.args), eager(built, *built.args))


async def test_a_bare_library_runs_and_says_that_only_the_number_of_inputs_is_checked(
    scheduler, tmp_path
):
    built = build("mlp")
    library = tmp_path / "mlp.so"
    library.write_bytes(built.library().read_bytes())
    runner = await scheduler.load(library)
    assert runner.info.spec_source is SpecSource.ARITY
    assert any("Only the number of inputs is checked" in note for note in runner.info.notes)
    with pytest.raises(InputMismatchError):
        await runner.run(*built.args, *built.args)
    assert_close(await runner.run(*built.args), eager(built, *built.args))


async def test_a_bare_library_beside_its_sources_is_checked_by_our_own_metadata(scheduler):
    built = build("mlp")
    runner = await scheduler.load(built.library(), name="mlp")
    assert runner.info.spec_source is SpecSource.PACKAGE
    x = torch.randn(64, 8)
    assert_close(await runner.run(x), eager(built, x))


async def test_two_models_of_one_package_run_side_by_side(scheduler):
    built = build("pair")
    double = await scheduler.load(built.path, name="double", model_name="double")
    square = await scheduler.load(built.path, name="square", model_name="square")
    x = torch.randn(4)
    doubled, squared = await asyncio.gather(double.run(x), square.run(x))
    assert_close((doubled, squared), (x * 2, x * x))


async def test_of_several_models_one_must_be_named(scheduler):
    built = build("pair")
    with pytest.raises(ModelNotFoundError, match=r"double.*square"):
        await scheduler.load(built.path)
    with pytest.raises(ModelNotFoundError, match=r"double.*square"):
        await scheduler.load(built.path, model_name="cube")


# --- a real model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """The demo's package of the sentence encoder, from its cache or compiled now, and the eager
    encoder.
    """
    from rich.console import Console

    from examples.semantic_search.minilm import load_encoder
    from examples.semantic_search.packages import ensure_packages

    return ensure_packages(Console(quiet=True))["encoder"], load_encoder()


async def test_minilm_encodes_as_its_eager_module_at_every_size(scheduler, minilm):
    path, module = minilm
    runner = await scheduler.load(path, name="minilm", instances=2)
    rng = random.Random(0)
    for batch, tokens in [(1, 2), (1, 17), (2, 256), (7, 33), (64, 9)]:
        ids = torch.tensor([[rng.randrange(30522) for _ in range(tokens)] for _ in range(batch)])
        mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (batch, 1))).long()
        assert_close(await runner.run(ids, mask), module(ids, mask), atol=2e-6, rtol=1e-4)


async def test_minilm_refuses_sizes_beyond_its_range(scheduler, minilm):
    path, _ = minilm
    runner = await scheduler.load(path, name="minilm")
    for batch, tokens in [(65, 4), (1, 257), (0, 4)]:
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        with pytest.raises(InputMismatchError, match="input 'input_ids'"):
            await runner.run(ids, torch.ones_like(ids))


# --- one tensor at several outputs ----------------------------------------------------------------


def same_tensors(result):
    """For each output the first one that is the same tensor."""
    leaves = tree_leaves(result)
    return [next(place for place, other in enumerate(leaves) if other is leaf) for leaf in leaves]


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)


@pytest.mark.parametrize("placement", ["lane", "inline"])
@pytest.mark.parametrize("name", ["one_tensor_twice", "one_constant_twice"])
async def test_one_tensor_at_several_outputs_comes_as_torchs_own_loader_gives_it(
    executor, placement, name
):
    async with Scheduler() as scheduler:
        built, runner = await load(scheduler, name, placement=placement)
        stock = torch._inductor.aoti_load_package(str(built.path))
        for _ in range(3):
            (x,) = fresh(built.args)
            result = await runner.run(x)
            assert_close(result, eager(built, x))
            if name == "one_tensor_twice":
                assert same_tensors(result) == same_tensors(stock(x)) == [0, 1, 0, 0, 4, 4, 6]
                assert result[1]["inputs"][0] is x


@pytest.mark.parametrize("placement", ["lane", "inline"])
async def test_one_tensor_at_several_outputs_comes_right_from_a_batch(executor, placement):
    async with Scheduler() as scheduler:
        built, runner = await load(
            scheduler, "one_tensor_twice", placement=placement, batching=Batching(dim=0)
        )
        requests = [torch.randn(1 + row % 3, 3) for row in range(20)]
        futures = [runner.submit(x) for x in requests]
        results = await asyncio.gather(*futures)
        assert max(future.trace.batch_size for future in futures) > 1
        for x, result in zip(requests, results, strict=True):
            assert_close(result, eager(built, x))


async def test_one_tensor_at_several_outputs_is_freed_once_when_its_request_is_cancelled(executor):
    async with Scheduler() as scheduler:
        built, runner = await load(scheduler, "one_tensor_twice", placement="lane")
        for turns in range(40):
            futures = [runner.submit(torch.randn(4, 3)) for _ in range(4)]
            for _ in range(turns % 8):
                await asyncio.sleep(0)
            for future in futures:
                future.cancel()
            await asyncio.gather(*futures, return_exceptions=True)
        (x,) = built.args
        assert_close(await runner.run(x), eager(built, x))


async def test_one_tensor_may_be_given_as_several_inputs(executor):
    async with Scheduler() as scheduler:
        built, runner = await load(scheduler, "scalars")
        x = torch.tensor(2.5)
        for _ in range(3):
            assert_close(await runner.run(x, x), eager(built, x, x))
