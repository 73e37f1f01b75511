"""The check of every request: each fault is found, told in a sentence, and nothing else is
refused.
"""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aoti_sched.errors import ConfigError, InputMismatchError
from aoti_sched.model.input_check import (
    ArityCheck,
    InputCheck,
    count_bytes,
    dense_strides,
    lies_in_order,
)
from aoti_sched.model.specs import DynamicDim, TensorSpec


def spec(*shape, name="x", dtype="float32", order=None, device="cpu"):
    return TensorSpec(
        name, dtype, shape, device, tuple(range(len(shape))) if order is None else order
    )


def batch(low=1, high=64, scale=1, offset=0):
    return DynamicDim("batch", low, high, scale, offset)


def refused(specs, *tensors):
    with pytest.raises(InputMismatchError) as caught:
        InputCheck("m", specs)(list(tensors))
    return caught.value


def accepted(specs, *tensors):
    InputCheck("m", specs)(list(tensors))
    return True


def parts(error):
    return error.input, error.expected, error.got


# --- every kind of fault --------------------------------------------------------------------------


def test_tensors_that_fit_are_accepted():
    assert accepted([spec(batch(), 8), spec(3, dtype="int64")], torch.zeros(5, 8), torch.arange(3))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_tensors_is_told_with_all_the_inputs(count):
    error = refused(
        [spec(batch(), 8), spec(3, name="y", dtype="int64")], *[torch.zeros(5, 8)] * count
    )
    assert parts(error) == ("", "2 tensor inputs", f"{count}")
    assert error.hint == "The inputs are x: float32[batch:1..64, 8], y: int64[3]."


def test_what_is_no_tensor_is_told_with_its_value():
    error = refused([spec(3)], [1.0, 2.0, 3.0])
    assert parts(error) == ("x", "a tensor float32[3]", "list [1.0, 2.0, 3.0]")
    assert error.hint == "Wrap it with torch.tensor(...)."


class Named(torch.Tensor):
    """Another name for a tensor, as datasets and image libraries have them."""


class OwnParameter(torch.nn.Parameter):
    pass


class Doubled(torch.Tensor):
    """Means something else than its storage holds."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return 2 * super().__torch_function__(function, types, args, kwargs or {})


class Wrapper(torch.Tensor):
    """Has no storage of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("the check runs no operator")


CHECKS = {
    "specs": lambda: InputCheck("m", [spec(3), spec(batch())]),
    "arity": lambda: ArityCheck("m", 2, "cpu"),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("kind", [Named, OwnParameter])
def test_a_subclass_without_a_behaviour_of_its_own_is_unwrapped(check, kind):
    plain = torch.arange(3.0)
    odd = OwnParameter(plain) if kind is OwnParameter else plain.as_subclass(kind)
    inputs = [plain, odd]
    assert check()(inputs) == 24
    assert inputs[0] is plain
    assert type(inputs[1]) is torch.Tensor
    assert inputs[1].data_ptr() == plain.data_ptr()
    assert inputs[1].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("odd", [torch.zeros(3).as_subclass(Doubled), Wrapper(torch.zeros(3))])
def test_a_subclass_that_means_something_else_than_it_holds_is_refused(check, odd):
    with pytest.raises(InputMismatchError) as caught:
        check()([torch.zeros(3), odd])
    assert caught.value.expected == "a plain torch.Tensor"
    assert caught.value.got == f"the subclass {type(odd).__name__}"


def test_what_is_unwrapped_is_checked_like_any_tensor():
    odd = torch.zeros(2, 3).T.as_subclass(Named)
    error = refused([spec(3, 2)], odd)
    assert parts(error) == ("x", "strides (2, 1)", "(1, 3)")
    odd = torch.zeros(3, dtype=torch.complex64).conj().as_subclass(Named)
    assert refused([spec(3, dtype="complex64")], odd).expected == "plain values"


def test_a_wrong_number_of_inputs_names_a_few_of_them():
    specs = [TensorSpec(f"x{number}", "float32", (3,)) for number in range(1500)]
    hint = refused(specs).hint
    assert hint.startswith("The inputs are x0: float32[3], ")
    assert hint.endswith("x9: float32[3], and 1490 more.")


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, torch.nn.Buffer])
def test_parameters_and_buffers_are_plain_enough(wrap):
    assert accepted([spec(3)], wrap(torch.zeros(3)))


def test_a_wrong_number_of_dimensions_is_told():
    error = refused([spec(batch(), 8)], torch.zeros(5, 8, 1))
    assert parts(error) == ("x", "2 dimensions, float32[batch:1..64, 8]", "3: shape (5, 8, 1)")


def test_a_wrong_static_size_beside_dynamic_ones_is_told():
    error = refused([spec(batch(), 8)], torch.zeros(5, 7))
    assert parts(error) == ("x", "size 8 at dimension 1 of float32[batch:1..64, 8]", "7")


def test_a_wrong_size_of_a_static_shape_is_told():
    assert parts(refused([spec(2, 8)], torch.zeros(2, 7))) == (
        "x",
        "size 8 at dimension 1 of float32[2, 8]",
        "7",
    )


@pytest.mark.parametrize("size", [1, 65])
def test_a_size_out_of_range_is_told_with_the_range(size):
    error = refused([spec(batch(2, 64), 8)], torch.zeros(size, 8))
    assert parts(error) == (
        "x",
        "size 2 to 64 at dimension 0 of float32[batch:2..64, 8]",
        str(size),
    )
    assert error.hint.startswith("The range was fixed when the model was compiled")


def test_a_size_below_an_open_range_is_told():
    assert (
        refused([spec(batch(2, None))], torch.zeros(1)).expected
        == "size at least 2 at dimension 0 of float32[batch:2..]"
    )


@pytest.mark.parametrize("size", [2, 64])
def test_the_bounds_of_a_range_belong_to_it(size):
    assert accepted([spec(batch(2, 64))], torch.zeros(size))


def test_zero_rows_are_accepted_where_the_range_has_them():
    assert accepted([spec(batch(0), 8)], torch.zeros(0, 8))


def test_a_size_without_an_upper_bound_may_be_huge():
    assert accepted([spec(batch(0, None), 0)], torch.zeros(1 << 40, 0))


def test_another_dtype_is_told_with_how_to_convert():
    error = refused([spec(3)], torch.zeros(3, dtype=torch.float64))
    assert parts(error) == ("x", "dtype float32", "float64")
    assert error.hint == "Convert it with .to(torch.float32)."


def test_a_sparse_tensor_is_refused():
    error = refused([spec(3, 3)], torch.eye(3).to_sparse())
    assert parts(error) == ("x", "a strided tensor", "layout torch.sparse_coo")


def test_a_tensor_on_another_device_is_refused():
    error = refused([spec(3)], torch.zeros(3, device="meta"))
    assert parts(error) == ("x", "device cpu", "meta")
    assert error.hint == "Move it with .to('cpu')."


def test_a_tensor_on_the_processor_is_no_input_of_another_device():
    assert parts(refused([spec(3, device="cuda:1")], torch.zeros(3))) == (
        "x",
        "device cuda:1",
        "cpu",
    )


def test_a_device_without_an_index_means_any_of_its_kind():
    assert accepted([spec(3, device="meta")], torch.zeros(3, device="meta"))


def test_a_tensor_that_is_not_contiguous_is_told_with_both_strides():
    error = refused([spec(batch(), 8)], torch.zeros(8, 5).t())
    assert parts(error) == ("x", "strides (8, 1)", "(1, 5)")
    assert error.hint == "Pass .contiguous()."


def test_every_second_row_is_not_contiguous():
    assert refused([spec(2, 8)], torch.zeros(4, 8)[::2]).got == "(16, 1)"


def test_an_expanded_tensor_is_not_contiguous():
    assert refused([spec(2, 8)], torch.zeros(8).expand(2, 8)).got == "(0, 1)"


def test_a_view_with_an_offset_is_as_good_as_any():
    assert accepted([spec(2, 8)], torch.zeros(4, 8)[1:3])


def test_a_lazily_conjugated_view_is_refused():
    error = refused([spec(3, dtype="complex64")], torch.zeros(3, dtype=torch.complex64).conj())
    assert parts(error) == ("x", "plain values", "a lazily negated or conjugated view")


def test_a_lazily_negated_view_is_refused():
    view = torch.zeros(3, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    strided = TensorSpec("x", "float32", (3,))
    assert refused([strided], view).expected == "plain values"


def test_the_first_input_that_does_not_fit_is_named():
    error = refused(
        [spec(3, name=name) for name in "abc"], torch.zeros(3), torch.zeros(4), torch.zeros(5)
    )
    assert error.input == "b"


def test_the_message_is_one_sentence_with_all_of_it():
    error = refused([spec(batch(), 8)], torch.zeros(5, 7))
    assert str(error) == (
        "model 'm', input 'x': expected size 8 at dimension 1 of float32[batch:1..64, 8], got 7."
    )


def test_an_error_comes_through_a_process_boundary_whole():
    error = refused([spec(3)], torch.zeros(4))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), parts(copy)) == (str(error), parts(error))


# --- dynamic sizes --------------------------------------------------------------------------------


def test_inputs_that_share_a_symbol_agree():
    specs = [spec(batch(), 2), spec(3, batch(), name="y")]
    assert accepted(specs, torch.zeros(5, 2), torch.zeros(3, 5))
    error = refused(specs, torch.zeros(5, 2), torch.zeros(3, 6))
    assert parts(error) == ("y", "size 5 at dimension 1, as 'x' dimension 0 has it", "6")


def test_one_input_may_have_a_symbol_twice():
    assert accepted([spec(batch(), batch())], torch.zeros(5, 5))
    assert refused([spec(batch(), batch())], torch.zeros(5, 6)).expected == (
        "size 5 at dimension 1, as 'x' dimension 0 has it"
    )


def test_symbols_are_bound_anew_in_every_request():
    check = InputCheck("m", [spec(batch()), spec(batch(), name="y")])
    for size in (5, 6):
        check([torch.zeros(size), torch.zeros(size)])
    with pytest.raises(InputMismatchError):
        check([torch.zeros(5), torch.zeros(6)])


def test_a_derived_size_agrees_with_what_it_is_derived_from():
    specs = [spec(batch()), spec(batch(0, None, scale=2, offset=1), name="y")]
    assert accepted(specs, torch.zeros(5), torch.zeros(11))
    error = refused(specs, torch.zeros(5), torch.zeros(13))
    assert parts(error) == ("y", "size 11 at dimension 0, as 'x' dimension 0 has it", "13")


def test_a_size_that_no_symbol_gives_is_refused():
    error = refused([spec(batch(0, None, scale=2, offset=1))], torch.zeros(8))
    assert parts(error) == ("x", "a size of the form 2*batch+1:0.. at dimension 0", "8")


def test_a_size_whose_symbol_would_be_negative_is_refused():
    specs = [spec(batch(0, None, offset=5)), spec(batch(0, None), name="y")]
    error = refused(specs, torch.zeros(3), torch.zeros(7))
    assert parts(error) == ("x", "a size of the form batch+5:0.. at dimension 0", "3")


# --- layout ---------------------------------------------------------------------------------------

CHANNELS_LAST = (0, 2, 3, 1)


def image(*shape):
    return torch.zeros(shape).to(memory_format=torch.channels_last)


def test_channels_last_is_accepted_where_it_was_compiled():
    assert accepted([spec(batch(), 3, 4, 5, order=CHANNELS_LAST)], image(2, 3, 4, 5))


def test_contiguous_is_refused_where_channels_last_was_compiled():
    error = refused([spec(batch(), 3, 4, 5, order=CHANNELS_LAST)], torch.zeros(2, 3, 4, 5))
    assert parts(error) == ("x", "strides (60, 1, 15, 3)", "(60, 20, 5, 1)")
    assert error.hint == "Its dimensions must lie in the order (0, 2, 3, 1)."


def test_channels_last_is_refused_where_contiguous_was_compiled():
    assert refused([spec(batch(), 3, 4, 5)], image(2, 3, 4, 5)).expected == "strides (60, 20, 5, 1)"


COLUMNS = TensorSpec("x", "float32", (batch(0), 4), strides=(8, 1))
WIDE = TensorSpec("x", "float32", (3, batch()), strides=(0, 1))
STEPS = TensorSpec("x", "float32", (2, batch(), 4), strides=(DynamicDim("batch", scale=8), 8, 1))


@pytest.mark.parametrize(
    ("spec", "tensor"),
    [
        (COLUMNS, torch.zeros(5, 8)[:, 2:6]),
        (COLUMNS, torch.zeros(1, 4)),
        (COLUMNS, torch.zeros(0, 4)),
        (WIDE, torch.zeros(6).expand(3, 6)),
        (STEPS, torch.zeros(2, 5, 8)[..., :4]),
    ],
    ids=["as compiled", "one row", "no rows", "expanded", "of a size"],
)
def test_strides_that_were_compiled_in_are_accepted(spec, tensor):
    assert accepted([spec], tensor)


@pytest.mark.parametrize(
    ("spec", "tensor", "expected", "hint"),
    [
        (COLUMNS, torch.zeros(5, 4), (8, 1), "torch.empty_strided((5, 4), (8, 1)).copy_(tensor)"),
        (
            COLUMNS,
            torch.zeros(5, 6)[:, :4],
            (8, 1),
            "torch.empty_strided((5, 4), (8, 1)).copy_(tensor)",
        ),
        (WIDE, torch.zeros(3, 6), (0, 1), "tensor[:1, :].expand((3, 6))"),
        (
            STEPS,
            torch.zeros(2, 5, 4),
            (40, 8, 1),
            "torch.empty_strided((2, 5, 4), (40, 8, 1)).copy_(tensor)",
        ),
    ],
    ids=["dense", "of other columns", "not expanded", "of a size"],
)
def test_other_strides_than_those_compiled_in_are_refused_and_the_hint_makes_the_right_ones(
    spec, tensor, expected, hint
):
    error = refused([spec], tensor)
    assert parts(error) == ("x", f"strides {expected}", f"{tensor.stride()}")
    assert hint in error.hint
    assert accepted([spec], eval(hint, {"torch": torch, "tensor": tensor}))


@pytest.mark.parametrize("strides", [(1,), (DynamicDim("other"), 1)])
def test_declared_strides_must_be_those_of_the_shape(strides):
    with pytest.raises(ConfigError, match="stride"):
        InputCheck("m", [TensorSpec("x", "float32", (3, 4), strides=strides)])


def test_a_size_that_running_the_model_ruled_out_is_refused_with_the_reason():
    rows = DynamicDim("rows", 2, None, reason="With 1 for 'rows', the compiled code is wrong.")
    error = refused([spec(rows, 4)], torch.zeros(1, 4))
    assert error.hint == rows.reason
    rows = DynamicDim("rows", 2, None, reason="it writes to its buffers")
    assert refused([spec(rows, 4)], torch.zeros(1, 4)).hint == "It writes to its buffers."


def test_where_the_order_is_unknown_any_will_do():
    loose = TensorSpec("x", "float32", (batch(), 3, 4, 5))
    assert accepted([loose], image(2, 3, 4, 5))
    assert accepted([loose], torch.zeros(2, 3, 4, 5))


def test_strides_of_sizes_of_one_do_not_matter():
    strange = torch.zeros(100).as_strided((1, 3, 1, 5), (77, 1, 13, 3))
    assert accepted([spec(batch(), 3, 1, 5, order=CHANNELS_LAST)], strange)
    assert accepted([spec(1, 4)], torch.zeros(100).as_strided((1, 4), (7, 1)))


def test_strides_of_an_empty_tensor_do_not_matter():
    assert accepted([spec(batch(0), 3, 4, 5, order=CHANNELS_LAST)], torch.zeros(0, 3, 4, 5))
    assert accepted([spec(batch(0), 3)], torch.zeros(3, 0).t())


def test_a_scalar_fits_a_spec_without_dimensions():
    assert accepted([spec()], torch.tensor(1.0))


@pytest.mark.parametrize(
    ("shape", "order", "strides"),
    [
        ((), (), ()),
        ((2, 3, 4), (0, 1, 2), (12, 4, 1)),
        ((2, 3, 4), (2, 1, 0), (1, 2, 6)),
        ((2, 3, 4, 5), CHANNELS_LAST, (60, 1, 15, 3)),
    ],
)
def test_dense_strides_follow_the_order(shape, order, strides):
    assert dense_strides(shape, order) == strides


@given(
    st.lists(st.integers(0, 3), max_size=4).flatmap(
        lambda s: st.tuples(st.just(s), st.permutations(range(len(s))))
    )
)
def test_a_permuted_dense_tensor_lies_in_its_own_order(case):
    shape, order = case
    inverse = sorted(range(len(order)), key=order.__getitem__)
    tensor = torch.zeros([shape[dim] for dim in order]).permute(inverse)
    assert lies_in_order(tensor.shape, tensor.stride(), order)


# --- specs that mean nothing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (spec(3, dtype="floaty"), "'floaty' is no dtype"),
        (spec(3, dtype="zeros"), "'zeros' is no dtype"),
        (spec(3, device="toaster"), "'toaster' is no device"),
        (spec(3, 4, order=(0, 2)), r"the order \(0, 2\) is not one of 2 dimensions"),
        (spec(batch(scale=0)), "scale is at least 1"),
    ],
)
def test_a_spec_that_means_nothing_is_refused_with_the_inputs_name(bad, words):
    with pytest.raises(ConfigError, match=f"model 'm', input 'x': .*{words}"):
        InputCheck("m", [bad])


# --- against an oracle ----------------------------------------------------------------------------


def fits(specs, tensors):
    """The rules again, as slow and plain as they can be said."""
    bound = {}
    for one, tensor in zip(specs, tensors, strict=True):
        if f"torch.{one.dtype}" != str(tensor.dtype) or len(one.shape) != tensor.dim():
            return False
        for size, wanted in zip(tensor.shape, one.shape, strict=True):
            if isinstance(wanted, int):
                if size != wanted:
                    return False
                continue
            roots = [n for n in range(size + 1) if wanted.scale * n + wanted.offset == size]
            if not roots or size < wanted.min or (wanted.max is not None and size > wanted.max):
                return False
            if bound.setdefault(wanted.symbol, roots[0]) != roots[0]:
                return False
        if one.order is not None and not tensor.permute(one.order).is_contiguous():
            return False
    return True


dims = st.one_of(
    st.sampled_from([0, 1, 2, 2, 3]),
    st.builds(
        DynamicDim,
        st.sampled_from(["a", "b"]),
        st.integers(0, 2),
        st.one_of(st.none(), st.integers(2, 6)),
        st.sampled_from([1, 1, 1, 2, 3]),
        st.sampled_from([0, 0, 0, 1, 2]),
    ),
)


@st.composite
def tensor_specs(draw):
    shape = tuple(draw(dims) for _ in range(draw(st.sampled_from([0, 1, 2, 3, 3]))))
    order = draw(
        st.one_of(
            st.none(),
            st.just(tuple(range(len(shape)))),
            st.permutations(range(len(shape))).map(tuple),
        )
    )
    return TensorSpec(
        "x", draw(st.sampled_from(["float32", "float32", "int64"])), shape, "cpu", order
    )


@st.composite
def requests(draw):
    """Specs, and tensors that fit them but for one change at most."""
    specs = draw(st.lists(tensor_specs(), min_size=1, max_size=3))
    symbols = {"a": draw(st.integers(0, 4)), "b": draw(st.integers(0, 4))}
    odd, fault = (
        draw(st.integers(0, len(specs) - 1)),
        draw(st.sampled_from(["", "size", "order", "rank", "dtype"])),
    )
    tensors = []
    for place, one in enumerate(specs):
        shape = [
            d if isinstance(d, int) else d.scale * symbols[d.symbol] + d.offset for d in one.shape
        ]
        order, dtype = one.order or tuple(range(len(shape))), getattr(torch, one.dtype)
        if place == odd:
            if fault == "size" and shape:
                shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 7))
            elif fault == "order":
                order = draw(st.permutations(order))
            elif fault == "rank":
                shape, order = [*shape, 1], [*order, len(order)]
            elif fault == "dtype":
                dtype = torch.float64
        inverse = sorted(range(len(order)), key=order.__getitem__)
        tensors.append(torch.zeros([shape[dim] for dim in order], dtype=dtype).permute(inverse))
    return specs, tensors


@settings(max_examples=400)
@given(requests())
def test_the_fast_check_agrees_with_the_plain_rules(request):
    specs, tensors = request
    try:
        InputCheck("m", specs)(tensors)
    except InputMismatchError:
        assert not fits(specs, tensors)
    else:
        assert fits(specs, tensors)


# --- only the number is known ---------------------------------------------------------------------


def refused_by_arity(*tensors):
    with pytest.raises(InputMismatchError) as caught:
        ArityCheck("m", 2, "cpu")(list(tensors))
    return parts(caught.value)


def test_without_specs_any_plain_tensors_are_accepted_if_their_number_is_right():
    ArityCheck("m", 2, "cpu")([torch.zeros(3), torch.arange(4)])
    assert refused_by_arity(torch.zeros(3)) == ("", "2 tensor inputs", "1")


@pytest.mark.parametrize(
    ("odd", "expected", "got"),
    [
        (torch.zeros(3).as_subclass(Doubled), "a plain torch.Tensor", "the subclass Doubled"),
        (torch.eye(3).to_sparse(), "a strided tensor", "layout torch.sparse_coo"),
        (torch.zeros(3, device="meta"), "device cpu", "meta"),
        (
            torch.zeros(3, dtype=torch.complex64).conj(),
            "plain values",
            "a lazily negated or conjugated view",
        ),
    ],
    ids=["subclass", "sparse", "device", "conjugated"],
)
def test_without_specs_a_tensor_that_native_code_would_misread_is_refused(odd, expected, got):
    assert refused_by_arity(torch.zeros(3), odd) == ("input 1", expected, got)


@pytest.mark.parametrize(
    "check",
    [
        lambda: InputCheck("m", [spec(2, 3), spec(4, dtype="int64")]),
        lambda: InputCheck("m", [spec(batch(), 3), spec(4, dtype="int64")]),
        lambda: ArityCheck("m", 2, "cpu"),
        lambda: count_bytes,
    ],
    ids=["fixed sizes", "dynamic sizes", "arity", "nothing"],
)
def test_every_check_counts_the_bytes(check):
    assert check()([torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)]) == 2 * 3 * 4 + 4 * 8
