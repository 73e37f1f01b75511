"""What a model's specs and a user's wish make of batching: plans, keys, padding, and reasons
why not.
"""

from __future__ import annotations

import msgspec
import pytest
import torch

from aoti_sched import Batching, ConfigError, DynamicDim, ModelSpec, TensorSpec
from aoti_sched.model.batch_layout import MAX_SIZE, group, must_be_independent
from aoti_sched.model.specs import (
    BatchDim,
    BoolSpec,
    FloatSpec,
    IntegerSpec,
    LiteralSpec,
    RowEvidence,
)

BATCH = DynamicDim("batch", min=1, max=8)
LENGTH = DynamicDim("length", min=1, max=32)


def spec(*shape, name="x", order="contiguous"):
    return TensorSpec(
        name, "float32", shape, order=tuple(range(len(shape))) if order == "contiguous" else order
    )


def model(*inputs, outputs=(), **fields):
    return ModelSpec(
        inputs=inputs, outputs=outputs, parameters=(), batch=BatchDim(0, "batch", 8), **fields
    )


def grouped(*inputs, wanted=None, outputs=None, own=True, **fields):
    outputs = (spec(BATCH, 4, name="out"),) if outputs is None else outputs
    described = model(*inputs, outputs=outputs, **fields) if own else None
    return group("m", wanted or Batching(), inputs, described, 1)


def test_the_package_says_along_which_dimension_and_how_many():
    grouping, specs = grouped(spec(BATCH, 16))
    assert grouping.max_rows == 8
    assert specs == (spec(BATCH, 16),)
    (plan,) = grouping.plan.inputs
    assert (plan.dim, plan.ragged) == (0, ())


@pytest.mark.parametrize(("wanted", "rows"), [(4, 4), (100, 8), (None, 8)])
def test_no_more_rows_than_were_compiled_for(wanted, rows):
    assert grouped(spec(BATCH, 16), wanted=Batching(max_size=wanted))[0].max_rows == rows


def test_without_a_compiled_bound_there_is_ours():
    free = DynamicDim("batch", min=1)
    assert grouped(spec(free, 16))[0].max_rows == MAX_SIZE
    assert grouped(spec(free, 16), wanted=Batching(max_size=500))[0].max_rows == 500


def test_requests_measure_in_rows_and_go_with_those_whose_other_sizes_agree():
    grouping, _ = grouped(spec(BATCH, LENGTH), outputs=(spec(BATCH, LENGTH, name="out"),))
    assert grouping.measure([torch.zeros(3, 5)]) == (3, (5,))
    assert grouping.measure([torch.zeros(1, 7)]) == (1, (7,))
    assert grouping.measure([torch.zeros(9, 7)]) == (9, (7,))
    assert grouping.measure([torch.zeros(0, 7)]) == (0, None)


def test_ragged_dimensions_need_not_agree_and_outputs_are_cut_back():
    inputs = (spec(BATCH, LENGTH, name="ids"), spec(BATCH, LENGTH, name="mask"))
    grouping, _ = grouped(
        *inputs,
        wanted=Batching(ragged={"ids": 7, "mask": False}),
        outputs=(spec(BATCH, LENGTH, 4, name="out"), LiteralSpec("n", 1)),
    )
    assert grouping.measure([torch.zeros(1, 5), torch.zeros(1, 5)]) == (1, 0)
    assert [(plan.ragged, plan.pad) for plan in grouping.plan.inputs] == [((1,), 7), ((1,), False)]
    (back,) = grouping.plan.outputs[0].ragged
    assert (back.dim, back.input, back.input_dim) == (1, 0, 1)


def test_tokens_are_the_longest_of_the_dimensions_that_are_padded():
    inputs = (spec(BATCH, LENGTH, name="ids"), spec(BATCH, 300, name="flat"))
    grouping, _ = grouped(
        *inputs,
        wanted=Batching(ragged={"ids": 7}, max_tokens=1024, max_seconds=0.5),
        outputs=(spec(BATCH, 4, name="out"),),
    )
    assert (grouping.max_tokens, grouping.max_seconds) == (1024, 0.5)
    assert grouping.tokens([torch.zeros(2, 5), torch.zeros(2, 300)]) == 5
    assert grouping.tokens([torch.zeros(2, 0), torch.zeros(2, 300)]) == 1


@pytest.mark.parametrize(
    ("pad_to", "rows", "padded"),
    [
        (None, 3, 3),
        ("powers_of_two", 3, 4),
        ("powers_of_two", 5, 8),
        ("powers_of_two", 8, 8),
        ((2, 6), 1, 2),
        ((6, 2), 3, 6),
    ],
)
def test_rows_are_padded_to_the_next_size(pad_to, rows, padded):
    grouping, _ = grouped(spec(BATCH, 16), wanted=Batching(pad_to=pad_to))
    assert grouping.padded(rows) == padded


def test_the_largest_size_bounds_the_batch():
    assert grouped(spec(BATCH, 16), wanted=Batching(pad_to=(2, 6)))[0].max_rows == 6
    assert grouped(spec(BATCH, 16), wanted=Batching(pad_to="powers_of_two", max_size=6))[
        0
    ].sizes == (
        1,
        2,
        4,
        6,
    )
    assert grouped(spec(BATCH, 16), wanted=Batching(pad_to=(2, 4, 8), max_size=3))[0].sizes == (
        2,
        4,
    )


def test_nothing_is_padded_beyond_what_was_compiled_for():
    six = DynamicDim("batch", min=1, max=6)
    grouping, _ = grouped(spec(six, 2), wanted=Batching(pad_to="powers_of_two", max_size=100))
    assert grouping.sizes == (1, 2, 4, 6)
    assert grouping.max_rows == 6


def test_a_model_compiled_for_one_number_of_rows_takes_fewer_and_is_padded():
    grouping, specs = grouped(spec(4, 16), own=False, wanted=Batching(dim=0))
    assert (grouping.max_rows, grouping.padded(1), grouping.padded(4)) == (4, 4, 4)
    assert specs[0].shape == (DynamicDim("rows", min=1, max=4), 16)


def test_another_dimension_may_hold_the_rows():
    grouping, _ = grouped(
        spec(16, BATCH), wanted=Batching(dim=1), outputs=(spec(2, BATCH, name="out"),)
    )
    assert grouping.measure([torch.zeros(16, 3)]) == (3, 0)
    assert grouping.plan.outputs[0].dim == 1


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        ((), {}, "nothing is known of its inputs"),
        ((spec(4, 2),), {"own": False}, "its package does not say along which dimension"),
        ((spec(BATCH, BATCH),), {}, r"dimension 1 of 'x' .* depends on the number of rows"),
        (
            (spec(BATCH, 2),),
            {"outputs": (spec(BATCH, DynamicDim("2*batch"), name="out"),)},
            r"dimension 1 of 'out' .* depends on the number of rows",
        ),
        ((spec(BATCH, 2),), {"mutates_buffers": True}, "it writes to its buffers"),
        ((spec(BATCH, 2), spec(name="t")), {}, "input 't' .* has no dimension 0"),
        ((spec(BATCH, 2), spec(3, name="t")), {}, "different sizes in dimension 0"),
        ((spec(DynamicDim("n", scale=2)),), {}, "no number of rows"),
        ((spec(BATCH, 2, order=None),), {}, "how input 'x' lies in memory is not known"),
        (
            (spec(4, 2),),
            {"wanted": Batching(max_tokens=64)},
            "max_tokens counts the dimensions that ragged pads, and ragged pads none",
        ),
        (
            (spec(4, 2),),
            {"wanted": Batching(pad_to=(2,))},
            "compiled for 4 rows, so pad_to can only be",
        ),
        (
            (spec(BATCH, 2),),
            {"wanted": Batching(pad_to=(16,))},
            "asks for 16 rows, it was compiled for at most 8",
        ),
        (
            (spec(BATCH, 2),),
            {"wanted": Batching(ragged={"y": 0})},
            "ragged names .'y'.; its inputs are .'x'.",
        ),
        (
            (spec(BATCH, LENGTH), spec(BATCH, LENGTH, name="mask")),
            {"wanted": Batching(ragged={"x": 0})},
            "what input 'mask' has too",
        ),
        (
            (spec(BATCH, 2),),
            {"outputs": (IntegerSpec("n"),)},
            "output 'n' is computed from the whole batch",
        ),
        (
            (spec(BATCH, 2),),
            {"outputs": (FloatSpec("n"),)},
            "output 'n' is computed from the whole batch",
        ),
        (
            (spec(BATCH, 2),),
            {"outputs": (BoolSpec("n"),)},
            "output 'n' is computed from the whole batch",
        ),
        (
            (msgspec.structs.replace(spec(BATCH, 2), order=None, strides=(4, 1)),),
            {},
            "input 'x' was compiled for a view that is not dense",
        ),
        (
            (spec(BATCH, 2),),
            {"outputs": (spec(4, name="out"),)},
            "output 'out' .* has no rows in dimension 0",
        ),
        (
            (spec(BATCH, LENGTH),),
            {
                "wanted": Batching(ragged={"x": 0}),
                "outputs": (spec(BATCH, DynamicDim("length", scale=2), name="out"),),
            },
            "can't be cut back",
        ),
    ],
)
def test_what_cannot_be_batched_is_refused_with_the_reason(inputs, options, reason):
    with pytest.raises(ConfigError, match=rf"model 'm': its requests can't be batched: .*{reason}"):
        grouped(*inputs, **options)


# --- what running the model showed ----------------------------------------------------------------

DEPENDENT = RowEvidence(
    False, "Rows influence each other: row 0 of 4 run alone, output 0 has other values."
)


def test_rows_that_influence_each_other_are_refused_with_the_reason_that_the_package_gives():
    with pytest.raises(ConfigError, match=r"row 0 of 4 run alone.*assume_independent=True"):
        grouped(spec(BATCH, 2), rows=DEPENDENT)


def test_a_users_word_overrides_what_the_package_says_of_rows():
    grouped(spec(BATCH, 2), rows=DEPENDENT, wanted=Batching(assume_independent=True))


def test_a_model_that_writes_to_an_input_is_refused_whatever_the_user_says():
    with pytest.raises(ConfigError, match="writes to its input 'cache'"):
        grouped(spec(BATCH, 2), mutated_inputs=("cache",), wanted=Batching(assume_independent=True))


def test_rows_of_which_nothing_is_known_are_refused():
    with pytest.raises(ConfigError, match=r"nothing shows .* \(it failed\).*warmup_inputs="):
        must_be_independent("m", RowEvidence(None, "it failed"))


def two(low=1, high=8, other_low=2, other_high=5):
    return (
        spec(DynamicDim("s0", low, high), 2, name="x"),
        spec(DynamicDim("s1", other_low, other_high), 2, name="y"),
    )


def test_several_symbols_in_the_row_dimension_that_the_user_names_are_one():
    _, specs = grouped(*two(), wanted=Batching(dim=0), own=False)
    assert [one.shape[0] for one in specs] == [DynamicDim("s0", 2, 5)] * 2


def test_several_symbols_stay_apart_where_nothing_names_the_dimension():
    with pytest.raises(ConfigError, match="does not say along which dimension"):
        grouped(*two(), own=False)


def test_outputs_of_either_symbol_have_the_common_rows():
    outputs = (spec(DynamicDim("s1"), 4, name="out"), spec(DynamicDim("s0"), 4, name="other"))
    grouping, _ = grouped(*two(), wanted=Batching(dim=0), outputs=outputs)
    assert [plan.dim for plan in grouping.plan.outputs] == [0, 0]
    square = spec(DynamicDim("s0"), DynamicDim("s1"), name="out")
    with pytest.raises(ConfigError, match="depends on the number of rows"):
        grouped(*two(), wanted=Batching(dim=0), outputs=(square,))
