"""A request that does not fit is refused in words that name model and input, before native code
sees it.
"""

from __future__ import annotations

import asyncio
import gc
import warnings
import weakref
from collections import OrderedDict

import numpy as np
import psutil
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from aoti_sched import Batching, ConfigError, InputMismatchError
from tests.models import build


class Subclass(torch.Tensor):
    pass


class Doubled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return 2 * super().__torch_function__(function, types, args, kwargs or {})


def fake():
    with FakeTensorMode():
        return torch.empty(2, 8)


def csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the layout is in beta
        return torch.zeros(2, 8).to_sparse_csr()


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # and that nested tensors are a prototype
        return torch.nested.nested_tensor([torch.zeros(8), torch.zeros(8)])


@pytest.fixture
async def load(scheduler):
    async def load(name, **settings):
        return await scheduler.load(build(name).path, name=name, **settings)

    return load


async def refused(runner, *args, **kwargs) -> InputMismatchError:
    """The error of a bad call; afterwards nothing was queued, and a good call is answered
    rightly.
    """
    submitted = runner.stats().submitted
    with pytest.raises(InputMismatchError) as caught:
        runner.submit(*args, **kwargs)
    assert runner.stats().submitted == submitted
    built = build(runner.name)
    assert_close(
        await runner.run(*built.args, **built.kwargs), built.module()(*built.args, **built.kwargs)
    )
    assert caught.value.model == runner.name
    assert f"model {runner.name!r}" in str(caught.value)
    return caught.value


# --- one tensor, wrong in every way ---------------------------------------------------------------

FAULTS = {
    "another dtype": (lambda: torch.zeros(2, 8, dtype=torch.float64), "dtype float32", "float64"),
    "too few dimensions": (lambda: torch.zeros(8), "2 dimensions", "1: shape (8,)"),
    "too many dimensions": (lambda: torch.zeros(1, 2, 8), "2 dimensions", "3: shape (1, 2, 8)"),
    "a wrong static size": (lambda: torch.zeros(2, 9), "size 8 at dimension 1", "9"),
    "below the range": (lambda: torch.zeros(0, 8), "size 1 to 64 at dimension 0", "0"),
    "above the range": (lambda: torch.zeros(65, 8), "size 1 to 64 at dimension 0", "65"),
    "another device": (lambda: torch.zeros(2, 8, device="meta"), "device cpu", "meta"),
    "transposed": (lambda: torch.zeros(8, 2).t(), "strides (8, 1)", "(1, 2)"),
    "expanded": (lambda: torch.zeros(1, 8).expand(4, 8), "strides (8, 1)", "(0, 1)"),
    "every second row": (lambda: torch.zeros(4, 8)[::2], "strides (8, 1)", "(16, 1)"),
    "sparse": (
        lambda: torch.zeros(2, 8).to_sparse(),
        "a strided tensor",
        "layout torch.sparse_coo",
    ),
    "sparse by rows": (csr, "a strided tensor", "layout torch.sparse_csr"),
    "packed by oneDNN": (
        lambda: torch.zeros(2, 8).to_mkldnn(),
        "a strided tensor",
        "layout torch._mkldnn",
    ),
    "nested": (nested, "a tensor float32[batch:1..64, 8]", "a nested tensor"),
    "a subclass": (
        lambda: torch.zeros(2, 8).as_subclass(Doubled),
        "a plain torch.Tensor",
        "Doubled",
    ),
    "fake": (fake, "a plain torch.Tensor", "FakeTensor"),
    "lazily negated": (
        lambda: torch._neg_view(torch.zeros(2, 8)),
        "plain values",
        "negated or conjugated",
    ),
    "a numpy array of another dtype": (lambda: np.zeros((2, 8)), "dtype float32", "float64"),
    "a list": (lambda: [[0.0] * 8], "a tensor float32", "list"),
    "a number": (lambda: 3, "a tensor float32", "int 3"),
    "None": (lambda: None, "a tensor float32", "NoneType None"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_tensor_that_does_not_fit_is_refused_by_its_name(load, fault):
    make, expected, got = FAULTS[fault]
    error = await refused(await load("mlp"), make())
    assert error.input == "x"
    assert expected in error.expected
    assert got in error.got
    assert str(error).startswith(
        f"model 'mlp', input 'x': expected {error.expected}, got {error.got}."
    )


async def test_a_lazily_conjugated_view_is_refused(load):
    runner = await load("complex_numbers")
    error = await refused(runner, torch.zeros(4, dtype=torch.complex64).conj())
    assert (error.input, error.got) == ("z", "a lazily negated or conjugated view")
    assert "resolve_conj" in error.hint


async def test_every_input_is_checked_and_not_only_the_first(load):
    runner = await load("dtypes")
    for position, name in enumerate(["int64", "boolean", "bfloat16", "float16", "float64"]):
        args = list(build("dtypes").args)
        args[position] = args[position].to(torch.float32)
        error = await refused(runner, *args)
        assert (error.input, error.got) == (name, "float32")


@pytest.mark.parametrize(("shape", "dimension"), [((3, 5), 0), ((2, 6), 1)])
async def test_two_inputs_that_disagree_on_a_shared_size_are_refused_with_both_named(
    load, shape, dimension
):
    error = await refused(
        await load("attention"), torch.zeros(2, 5, 16), torch.ones(shape, dtype=torch.bool)
    )
    assert error.input == "mask"
    assert f"at dimension {dimension}, as 'tokens' dimension {dimension} has it" in error.expected
    assert error.got == str(shape[dimension])


async def test_channels_last_is_refused_where_contiguous_was_compiled(load):
    error = await refused(
        await load("conv"), torch.zeros(2, 3, 8, 8).to(memory_format=torch.channels_last)
    )
    assert (error.expected, error.got) == ("strides (192, 64, 8, 1)", "(192, 1, 24, 3)")


# --- the number of arguments, and their names -----------------------------------------------------

X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((X, X), {}), ((), {"y": X}), ((X,), {"y": X}), ((X,), {"x": X})],
    ids=["too few", "too many", "a wrong keyword", "one keyword more", "one argument twice"],
)
async def test_arguments_that_the_module_does_not_take_are_refused_with_its_signature(
    load, args, kwargs
):
    error = await refused(await load("mlp"), *args, **kwargs)
    assert error.expected == "the arguments (x)"
    assert all(f"{name}=" in error.got for name in kwargs)


@pytest.mark.parametrize("missing", ["scale", "offset", "negate"])
async def test_a_missing_keyword_is_refused_even_where_the_module_has_a_default(load, missing):
    built = build("signature")
    kwargs = {key: value for key, value in built.kwargs.items() if key != missing}
    error = await refused(await load("signature"), *built.args, **kwargs)
    assert f"{missing}=" in error.expected
    assert f"{missing}=" not in error.got


async def test_a_missing_positional_argument_of_several_is_refused(load):
    built = build("signature")
    error = await refused(await load("signature"), *built.args[:3], **built.kwargs)
    assert "nothing" in error.expected
    assert error.got.startswith("3 positional")


# --- structure ------------------------------------------------------------------------------------


def changed(**changes):
    """The signature model's arguments, some of them replaced."""
    built = build("signature")
    x, pair, nested_, nothing = built.args
    args = {"x": x, "pair": pair, "nested": nested_, "nothing": nothing, **built.kwargs, **changes}
    return [args.pop(name) for name in ("x", "pair", "nested", "nothing")], args


T = torch.zeros(3)


async def test_containers_that_torchs_own_loader_takes_too_give_the_same_answer(load):
    runner = await load("signature")
    built = build("signature")
    x, (b, c), nested_, nothing = built.args
    expected = built.module()(*built.args, **built.kwargs)
    mixed = OrderedDict(
        deep=OrderedDict(nested_["deep"]), a=nested_["a"]
    )  # keys in another order, too
    keywords = dict(reversed(built.kwargs.items()))
    assert_close(await runner.run(x, [b, c], mixed, nothing, **keywords), expected)
    as_named = x.as_subclass(Subclass)
    assert_close(await runner.run(as_named, (b, c), nested_, nothing, **keywords), expected)


def test_a_class_that_the_serving_process_has_not_registered_is_named_at_load(python):
    program = """
        import asyncio, sys, torch, aoti_sched
        from dataclasses import dataclass

        @dataclass
        class Box:
            low: torch.Tensor
            high: torch.Tensor

        async def main():
            async with aoti_sched.Scheduler() as scheduler:
                try:
                    await scheduler.load(sys.argv[1], name="grow")
                except aoti_sched.LoadError as error:
                    print(error)
                torch.utils._pytree.register_dataclass(Box, serialized_type_name="tests.models.Box")
                grow = await scheduler.load(sys.argv[1], name="grow")
                print(await grow.run(Box(torch.zeros(3), torch.ones(3))))

        asyncio.run(main())
    """
    ran = python(program, build("registered").path)
    assert ran.returncode == 0, ran.stderr
    refused_, answer = ran.stdout.splitlines()
    assert refused_.startswith(
        "model 'grow': its inputs contain tests.models.Box, which is not registered"
    )
    assert answer == "Box(low=tensor([-1., -1., -1.]), high=tensor([2., 2., 2.]))"


STRUCTURES = {
    "a set for a tuple": ({"pair": {T}}, "pair", "a tuple of 2", "set"),
    "a tensor for a tuple": ({"pair": T}, "pair", "a tuple of 2", "Tensor"),
    "three for two": ({"pair": (T, T, T)}, "pair", "2 elements", "3"),
    "a missing key": ({"nested": {"a": T}}, "nested", "the keys ['a', 'deep']", "['a']"),
    "a key more": ({"nested": {"a": T, "deep": {"b": T}, "c": T}}, "nested", "the keys", "'c'"),
    "a wrong key below": (
        {"nested": {"a": T, "deep": {"c": T}}},
        "nested['deep']",
        "['b']",
        "['c']",
    ),
    "a tuple for a dict": ({"nested": (T, T)}, "nested", "a dict of 2", "tuple of 2"),
    "another literal": ({"scale": 3}, "scale", "2, the value", "3"),
    "a literal of another type": ({"scale": 2.0}, "scale", "2, the value", "2.0"),
    "a number for a flag": ({"negate": 1}, "negate", "True, the value", "1"),
    "a tensor for a literal": ({"scale": torch.tensor(2)}, "scale", "2, the value", "tensor(2)"),
    "a tensor for None": ({"nothing": T}, "nothing", "None, the value", "tensor("),
    "None for a tensor": ({"x": None}, "x", "a tensor float32[3]", "NoneType None"),
    "a number for a tensor in a tuple": (
        {"pair": (T, 3)},
        "pair_1",
        "a tensor float32[3]",
        "int 3",
    ),
    "a wrong dtype below": (
        {"nested": {"a": T, "deep": {"b": T.double()}}},
        "nested_deep_b",
        "dtype float32",
        "float64",
    ),
    "a wrong size in a keyword": (
        {"offset": torch.zeros(4)},
        "offset",
        "size 3 at dimension 0",
        "4",
    ),
}


@pytest.mark.parametrize("fault", STRUCTURES)
async def test_a_structure_that_the_module_does_not_take_is_refused_at_its_place(load, fault):
    changes, place, expected, got = STRUCTURES[fault]
    args, kwargs = changed(**changes)
    error = await refused(await load("signature"), *args, **kwargs)
    assert error.input == place
    assert expected in error.expected
    assert got in error.got


async def test_containers_that_only_torchs_pytree_knows_are_checked_too(load):
    runner = await load("ordered")
    assert "'c'" in str(await refused(runner, OrderedDict(b=T, c=T)))
    assert (await refused(runner, OrderedDict(b=T, a=3))).input == "pairs_a"
    await refused(runner, (T, T))


async def test_where_specs_come_from_the_source_what_is_no_tensor_is_refused_too(load):
    runner = await load("conv")
    for value in (None, np.zeros((2, 3, 8, 8)), [T]):
        await refused(runner, value)


# --- what a refusal costs -------------------------------------------------------------------------


async def test_ten_thousand_refusals_leave_nothing_behind(load):
    runner = await load("mlp")
    kept = []

    def refuse(times):
        for _ in range(times):
            bad = torch.zeros(65, 8)
            with pytest.raises(InputMismatchError):
                runner.submit(bad)
            kept.append(weakref.ref(bad))
            bad = torch.zeros(3, 8, dtype=torch.float64)
            with pytest.raises(InputMismatchError):
                runner.submit(bad)

    refuse(500)
    kept.clear()
    gc.collect()
    growth = []
    for _ in range(3):
        objects, memory = len(gc.get_objects()), psutil.Process().memory_info().rss
        refuse(5_000)
        assert not any(reference() is not None for reference in kept)
        kept.clear()
        gc.collect()
        assert len(gc.get_objects()) - objects < 10
        growth.append(psutil.Process().memory_info().rss - memory)
    # 5,000 tensors of 65 rows are 10 MB, in each round; in one, the allocator may keep some pages.
    assert min(growth) < 2 << 20
    stats = runner.stats()
    assert (stats.submitted, stats.queued, stats.queued_bytes, stats.running) == (0, 0, 0, 0)
    assert_close(await runner.run(*build("mlp").args), build("mlp").module()(*build("mlp").args))


# --- what running the model showed when it was compiled -------------------------------------------


async def test_views_and_computed_outputs_are_what_the_module_takes_and_gives(load):
    runner, model = await load("views"), build("views").module()
    for rows in (2, 7):
        args = (
            torch.randn(rows, 3),
            torch.randn(1, 6).expand(5, 6),
            torch.randn(5, 12)[:, ::2],
            torch.tensor(7.25),
        )
        out, wanted = await runner.run(*args), model(*args)
        assert_close(out, wanted)
        assert [type(value) for value in out.values()] == [type(value) for value in wanted.values()]


async def test_a_size_that_the_code_can_not_do_is_refused_with_what_was_found(load):
    runner, args = await load("views"), build("views").args
    for rows in (0, 1):
        error = await refused(runner, torch.zeros(rows, 3), *args[1:])
        assert error.expected.startswith("size at least 2 at dimension 0")
        assert "With 1 for 'rows'" in error.hint


async def test_a_view_that_is_laid_out_otherwise_is_refused(load):
    runner, (x, wide, columns, scale) = await load("views"), build("views").args
    assert (
        await refused(runner, x, wide.contiguous(), columns, scale)
    ).expected == "strides (0, 1)"
    assert (
        await refused(runner, x, wide, columns.contiguous(), scale)
    ).expected == "strides (12, 2)"


async def test_one_tensor_as_two_examples_and_sizes_that_torch_tells_apart(load):
    runner, model = await load("towers"), build("towers").module()
    for left, right in ((4, 4), (1, 1), (0, 3), (1, 2), (5, 0)):
        args = torch.randn(left, 3), torch.randn(right, 3)
        assert_close(await runner.run(*args), model(*args))


@pytest.mark.parametrize("batching", [True, Batching(dim=0)], ids=["True", "dim=0"])
async def test_two_inputs_with_rows_of_their_own_are_batched_in_pairs(load, batching):
    runner, model = await load("towers", batching=batching), build("towers").module()
    requests = [(torch.randn(rows, 3), torch.randn(rows, 3)) for rows in (1, 2, 3, 1)]
    answers = await asyncio.gather(*(runner.run(*request) for request in requests))
    for answer, request in zip(answers, requests, strict=True):
        assert_close(answer, model(*request))
    with pytest.raises(InputMismatchError, match="size 2 at dimension 0"):
        await runner.run(torch.zeros(2, 3), torch.zeros(3, 3))


async def test_sizes_that_do_not_meet_what_the_module_requires_of_both_are_refused(scheduler, load):
    runner, model = await load("shorter"), build("shorter").module()
    for a, b in ((6, 6), (5, 2), (100, 99)):
        args = torch.randn(a), torch.randn(b)
        assert_close(await runner.run(*args), model(*args))
    for a, b in ((6, 7), (3, 90_000)):
        with pytest.raises(
            InputMismatchError, match=f"expected sizes with b <= a, got a={a}, b={b}"
        ):
            await runner.run(torch.randn(a), torch.randn(b))
    with pytest.raises(ConfigError, match="compiled for numbers of rows with b <= a only"):
        await scheduler.load(
            build("shorter").path, batching=Batching(assume_independent=True, dim=0)
        )


async def test_sizes_are_refused_for_which_inductor_chose_other_code(load):
    runner, model = await load("chosen_by_size"), build("chosen_by_size").module()
    for rows, height in ((4, 8), (1, 8), (6, 8)):
        args = torch.randn(rows, 6), torch.randn(1, 2, height, 6)
        assert_close(await runner.run(*args), model(*args))
    for rows, height in ((7, 8), (3000, 8), (4, 9), (4, 32)):
        with pytest.raises(InputMismatchError, match="expected sizes with "):
            await runner.run(torch.randn(rows, 6), torch.randn(1, 2, height, 6))


# --- arrays and copies ----------------------------------------------------------------------------


async def test_a_numpy_array_is_run_as_the_tensor_that_shares_its_memory(load):
    model = await load("mlp")
    array = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    assert torch.equal(await model.run(array), await model.run(torch.from_numpy(array)))
    array.setflags(write=False)
    assert torch.equal(await model.run(array), await model.run(torch.tensor(array)))


async def test_a_model_that_writes_to_its_inputs_does_not_write_to_bytes(load):
    model = await load("cache_input")
    data = bytes(48)
    cache, x = np.frombuffer(data, np.float32).reshape(4, 3), np.ones((4, 3), np.float32)
    assert torch.equal(await model.run(cache, x), torch.ones(4, 3))
    assert data == bytes(48)


async def test_an_input_that_the_model_writes_to_must_not_share_memory_with_another(load):
    model = await load("cache_input")
    rows = torch.ones(6, 3)
    for cache, x in ((rows, rows), (rows[:4], rows[2:]), (rows[2:5], rows[:3])):
        with pytest.raises(
            InputMismatchError, match=r"expected memory of its own.*shares\. Pass one.*\.clone\(\)"
        ):
            await model.run(cache, x)
    assert torch.equal(rows, torch.ones(6, 3))
    assert torch.equal(await model.run(rows[:3], rows[3:]), torch.full((3, 3), 2.0))
    assert torch.equal(await model.run(rows[3:3], rows[3:3]), torch.ones(0, 3))


async def test_a_copied_input_may_be_written_to_at_once(load):
    model = await load("mlp")
    x = torch.ones(2, 8)
    expected = await model.run(x.clone())
    futures = []
    for _ in range(50):
        futures.append(model.options(copy=True).submit(x))
        x.fill_(7.0)
        x.fill_(1.0)
    assert all([torch.equal(await future, expected) for future in futures])


async def test_an_error_names_the_missing_argument(load):
    model = await load("signature")
    with pytest.raises(InputMismatchError, match="Missing: "):
        model.submit()
