"""Specs: how they are stored in a package, and what is read out of the C++ that torch generates."""

import json
import math

import msgspec
import pytest

from aoti_sched.model.specs import (
    METADATA_KEY,
    BatchDim,
    BoolSpec,
    DynamicDim,
    ExampleSpec,
    FloatSpec,
    IntegerSpec,
    LiteralSpec,
    ModelSpec,
    RowEvidence,
    TensorSpec,
    spec_from_metadata,
    spec_to_metadata,
    specs_from_wrapper,
)

SPEC = ModelSpec(
    inputs=(
        TensorSpec("x", "float32", (DynamicDim("batch", 1, 64), 8), order=(0, 1)),
        TensorSpec(
            "y", "bfloat16", (DynamicDim("batch", 2, 129, scale=2, offset=1), 3, 4), order=(0, 2, 1)
        ),
        TensorSpec(
            "z", "float32", (DynamicDim("batch"), 4), strides=(DynamicDim("batch", scale=2), 1)
        ),
        LiteralSpec("negate", True),
        LiteralSpec("count", 2),
        LiteralSpec("scale", 2.0),
        LiteralSpec("mode", "nearest"),
        LiteralSpec("nothing", None),
    ),
    outputs=(
        TensorSpec("out", "float32", (DynamicDim("batch", reason="tried"),)),
        IntegerSpec("size"),
        FloatSpec("half"),
        BoolSpec("long"),
    ),
    parameters=("x", "y"),
    batch=BatchDim(0, "batch", 64),
    threads=2,
    frozen=True,
    mutates_buffers=True,
    torch_version="2.13.0",
    mutated_inputs=("x",),
    rows=RowEvidence(False, "tried"),
    examples=(
        ExampleSpec((3, 8), -1.0, 2.0),
        ExampleSpec((2,), 0.0, 1.0, (0, 1)),
        ExampleSpec((0,)),
    ),
    sizes_probed=True,
)


# --- metadata -------------------------------------------------------------------------------------


def test_a_spec_comes_back_from_metadata_as_it_went_in():
    metadata = spec_to_metadata(SPEC)
    assert spec_from_metadata({"owner": "somebody", **metadata}) == SPEC


def test_a_literal_comes_back_with_its_type():
    spec = spec_from_metadata(spec_to_metadata(SPEC))
    assert [type(leaf.value) for leaf in spec.inputs[3:]] == [bool, int, float, str, type(None)]


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_literal_comes_back(value):
    spec = msgspec.structs.replace(SPEC, inputs=(LiteralSpec("fill", value),))
    assert spec_from_metadata(spec_to_metadata(spec)) == spec


def test_a_literal_that_is_not_a_number_comes_back():
    spec = msgspec.structs.replace(SPEC, inputs=(LiteralSpec("fill", math.nan),))
    (leaf,) = spec_from_metadata(spec_to_metadata(spec)).inputs
    assert math.isnan(leaf.value)


def test_a_package_without_our_metadata_has_no_spec():
    assert spec_from_metadata({"AOTI_DEVICE_KEY": "cpu"}) is None


def test_a_spec_of_a_newer_version_is_not_read():
    newer = msgspec.structs.replace(SPEC, version=2)
    assert spec_from_metadata(spec_to_metadata(newer)) is None


def test_fields_that_a_later_release_adds_do_not_hide_the_spec():
    fields = json.loads(spec_to_metadata(SPEC)[METADATA_KEY])
    assert spec_from_metadata({METADATA_KEY: json.dumps({**fields, "colour": "blue"})}) == SPEC


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "{}", '{"version": 1}', '{"version": "1"}', "\x00", "[" * 100_000],
    ids=["empty", "broken", "null", "list", "object", "incomplete", "wrong type", "binary", "deep"],
)
def test_garbage_in_the_metadata_is_no_spec(text):
    assert spec_from_metadata({METADATA_KEY: text}) is None


# --- in words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "words"),
    [
        (DynamicDim("batch"), "batch:0.."),
        (DynamicDim("batch", 1, 64), "batch:1..64"),
        (DynamicDim("half", 0, 16, scale=2), "2*half:0..16"),
        (DynamicDim("n", 1, 9, offset=1), "n+1:1..9"),
        (DynamicDim("n", 0, None, scale=3, offset=-1), "3*n-1:0.."),
    ],
)
def test_a_dynamic_dimension_reads_as_its_size_and_range(dim, words):
    assert str(dim) == words


def test_a_tensor_reads_as_its_dtype_and_shape():
    assert str(TensorSpec("x", "int64", (DynamicDim("batch", 1, 8), 3))) == "int64[batch:1..8, 3]"


# --- edited wrapper sources -----------------------------------------------------------------------

CHECK = """
AOTI_NOINLINE static void check_input_{index}(
    AtenTensorHandle* input_handles
) {{
    ConstantHandle {name} = ConstantHandle(input_handles[{index}]);
    if ({name}_expected_dtype != {name}_dtype) {{
        ss << "input_handles[{index}]: unmatched dtype, "
           << "expected: " << {name}_expected_dtype << "(at::k{dtype}), "
           << "but got: " << {name}_dtype << "\\n";
    }}
    auto {name}_size = {name}.sizes();
{bounds}
    if ({name}_expected_device_type != {name}_device_type) {{
        << "expected: " << {name}_expected_device_type << "{device}, "
    }}
}}
"""
SIZES = '    if (_check()) {{ assert_size_stride({name}, {{{sizes}}}, {{{strides}}}, "input"); }}\n'


def wrapper(sizes, strides, *, index=0, dtype="Float", bounds=(), device="0(cpu)"):
    """What torch prints of one input; `bounds` are conditions on its sizes, such as "size[0] >
    8".
    """
    name = f"arg{index}_1"
    lines = "\n".join(
        f"    if ({bound.replace('size', name + '_size')}) {{\n    }}" for bound in bounds
    )
    check = CHECK.format(index=index, name=name, dtype=dtype, bounds=lines, device=device)
    return check + SIZES.format(name=name, sizes=sizes, strides=strides)


def only(source):
    (spec,) = specs_from_wrapper(source)
    return spec


def test_the_sizes_and_bounds_of_a_wrapper_are_read():
    spec = only(
        wrapper("s77, 8L", "8L, 1L", bounds=["size[0] < 3", "size[0] > 64", "8 != size[1]"])
    )
    assert spec == TensorSpec("arg0_1", "float32", (DynamicDim("s77", 3, 64), 8), "cpu", (0, 1))


def test_a_lower_bound_is_read_as_it_is_stated():
    assert only(wrapper("s77", "1L", bounds=["size[0] < 2"])).shape == (DynamicDim("s77", min=2),)


def test_without_a_lower_bound_nothing_may_come():
    assert only(wrapper("s77", "1L")).shape == (DynamicDim("s77", min=0),)


@pytest.mark.parametrize(
    ("expression", "scale", "offset"),
    [
        ("2L*s77", 2, 0),
        ("s77 + 1L", 1, 1),
        ("3L*s77 + 2L", 3, 2),
        ("2*s77", 2, 0),
        ("1L + 2L*s77", 2, 1),
        ("4L + s77", 1, 4),
        ("(-1L) + s77", 1, -1),
    ],
)
def test_a_linear_size_is_bound_to_its_symbol(expression, scale, offset):
    (dim,) = only(wrapper(expression, "1L")).shape
    assert (dim.symbol, dim.scale, dim.offset) == ("s77", scale, offset)


def test_a_size_of_several_symbols_is_a_symbol_of_its_own():
    assert only(wrapper("s31*s77", "1L", bounds=["size[0] > 9"])).shape == (
        DynamicDim("s31*s77", max=9),
    )


@pytest.mark.parametrize(
    ("sizes", "strides", "order"),
    [
        # The first is torch 2.13's text for an input [batch, n, n].
        ("s77, s27, s27", "static_cast<int64_t>(s27*s27), s27, 1L", (0, 1, 2)),
        ("s77, s27, s27", "1L, s27*s77, s77", (1, 2, 0)),
        (
            "s77, s27, s27, s27",
            "static_cast<int64_t>(s27*s27*s27), static_cast<int64_t>(s27*s27), s27, 1L",
            (0, 1, 2, 3),
        ),
        (
            "s77, 4L, s27, s27",
            "4L*(static_cast<int64_t>(s27*s27)), static_cast<int64_t>(s27*s27), s27, 1L",
            (0, 1, 2, 3),
        ),
        ("s77, s27, s27", "static_cast<int64_t>(s27*s27) + 1L, s27, 1L", None),
        ("s77, s27, s27", "s27*(s27 + 1L), s27, 1L", None),
        ("s77, s27, s27", "s27, s27, 1L", None),
    ],
)
def test_the_memory_order_is_read_where_two_sizes_are_one_symbol(sizes, strides, order):
    assert only(wrapper(sizes, strides)).order == order


def test_inputs_come_in_their_own_order_whatever_the_order_of_the_text():
    source = "".join(
        wrapper(f"{size}L", "1L", index=i, bounds=[f"{size} != size[0]"])
        for i, size in [(2, 30), (0, 10), (1, 20)]
    )
    assert [spec.shape for spec in specs_from_wrapper(source)] == [(10,), (20,), (30,)]


def test_a_tensor_without_dimensions_is_read():
    assert only(wrapper("", "", dtype="Long")) == TensorSpec("arg0_1", "int64", (), "cpu", ())


def test_the_device_is_read():
    assert only(wrapper("s77", "1L", device="1(cuda)")).device == "cuda"


def test_a_dtype_that_is_not_known_makes_the_whole_source_not_understood():
    source = wrapper("4L", "1L") + wrapper("4L", "1L", index=1, dtype="QInt8")
    assert specs_from_wrapper(source) is None


def test_an_input_that_is_not_checked_makes_the_whole_source_not_understood():
    assert specs_from_wrapper(wrapper("4L", "1L") + wrapper("4L", "1L", index=2)) is None


def test_an_input_without_sizes_makes_the_whole_source_not_understood():
    assert specs_from_wrapper(wrapper("4L", "1L").replace("assert_size_stride", "guard")) is None


@pytest.mark.parametrize("source", ["", "// generated", "static void check_input_0(", "\x00"])
def test_a_source_that_states_nothing_gives_no_specs(source):
    assert specs_from_wrapper(source) is None


@pytest.mark.parametrize(
    ("sizes", "strides", "order"),
    [
        ("2L, 3L, 8L, 8L", "192L, 64L, 8L, 1L", (0, 1, 2, 3)),
        ("2L, 3L, 8L, 8L", "192L, 1L, 24L, 3L", (0, 2, 3, 1)),
        ("s77, 3L, 8L, 8L", "192L, 1L, 24L, 3L", (0, 2, 3, 1)),
        ("s77, s31, 16L", "16L*s31, 16L, 1L", (0, 1, 2)),
        ("s77, s31, 16L", "16L, 16L*s77, 1L", (1, 0, 2)),
        ("s77, s31, s9", "s9, s77*s9, 1L", (1, 0, 2)),
        ("s77, s77", "1L, s77", (1, 0)),
        ("1L, 3L", "10L, 1L", (0, 1)),
        ("4L, 1L, 3L", "3L, 77L, 1L", (0, 1, 2)),
        ("s77 + 1L, 4L", "4L, 1L", (0, 1)),
    ],
)
def test_the_strides_tell_the_order_in_memory(sizes, strides, order):
    assert only(wrapper(sizes, strides)).order == order


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ("4L, 3L", "6L, 1L"),
        ("4L, 3L", "0L, 1L"),
        ("4L, 3L", "6L, 2L"),
        ("s77, s31", "2L*s31, 1L"),
        ("4L, s77 + 1L", "1L + s77, 1L"),
    ],
    ids=["a gap between rows", "expanded", "every second", "a dynamic gap", "a sum"],
)
def test_strides_that_are_not_dense_or_not_understood_leave_the_order_open(sizes, strides):
    assert only(wrapper(sizes, strides)).order is None


@pytest.mark.parametrize(
    ("sizes", "strides", "stated"),
    [
        ("4L, 3L", "6L, 2L", (6, 2)),
        ("4L, 3L", "0L, 1L", (0, 1)),
        ("4L, 3L", "3L, 1L", None),
        ("s77, 3L", "6L, 2L", (6, 2)),
        ("s77, s31", "2L*s31, 1L", None),
    ],
    ids=["every second", "expanded", "dense", "dynamic rows", "a dynamic gap"],
)
def test_the_strides_of_what_is_not_dense_are_read_where_they_are_numbers(sizes, strides, stated):
    assert only(wrapper(sizes, strides)).strides == stated
