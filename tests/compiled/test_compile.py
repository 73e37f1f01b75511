"""`compile_package` and the specs that it writes.

One package comes from the cache; all other modules are exported only.
"""

from collections import OrderedDict

import msgspec
import pytest
import torch
from torch import nn
from torch.export import Dim, export

from aoti_sched.compile import compile_package, describe
from aoti_sched.errors import CompileError
from aoti_sched.model.input_check import InputCheck
from aoti_sched.model.specs import (
    BatchDim,
    BoolSpec,
    DynamicDim,
    FloatSpec,
    IntegerSpec,
    LiteralSpec,
    TensorSpec,
    spec_from_metadata,
)
from aoti_sched.package import open_package

# torch's exporter copies call specs through a class that torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


def module(function):
    """A module whose forward is this function, with its signature."""

    class Module(nn.Module):
        forward = staticmethod(function)

    return Module().eval()


def described(function, *args, kwargs=None, dynamic=None, **options):
    return describe(export(module(function), args, kwargs, dynamic_shapes=dynamic), **options)


def double(x):
    return x * 2


# --- dimensions -----------------------------------------------------------------------------------


def test_static_sizes_are_numbers():
    spec = described(double, torch.zeros(3, 4))
    assert spec.inputs == (TensorSpec("x", "float32", (3, 4), "cpu", (0, 1)),)


def test_a_dynamic_size_has_its_dims_name_and_range():
    batch = Dim("batch", min=1, max=64)
    spec = described(double, torch.zeros(3, 4), dynamic={"x": {0: batch}})
    assert spec.inputs[0].shape == (DynamicDim("batch", 1, 64), 4)
    assert spec.outputs[0].shape == (DynamicDim("batch", 1, 64), 4)


def test_a_dim_without_bounds_admits_no_rows_and_any_number():
    spec = described(double, torch.zeros(3), dynamic={"x": {0: Dim("batch")}})
    assert spec.inputs[0].shape == (DynamicDim("batch", 0, None),)


def test_a_size_that_torch_names_keeps_torchs_name():
    spec = described(double, torch.zeros(3), dynamic={"x": {0: Dim.DYNAMIC(min=2, max=9)}})
    (dim,) = spec.inputs[0].shape
    assert (dim.min, dim.max) == (2, 9)
    assert dim == spec.outputs[0].shape[0]


def test_a_derived_dim_is_told_by_its_scale_and_offset():
    half = Dim("half", min=1, max=8)
    spec = described(
        lambda x, y: (x + 1, y + 1),
        torch.zeros(7),
        torch.zeros(3),
        dynamic=({0: 2 * half + 1}, {0: half}),
    )
    assert [leaf.shape for leaf in spec.inputs] == [
        (DynamicDim("half", 3, 17, scale=2, offset=1),),
        (DynamicDim("half", 1, 8),),
    ]


def test_an_output_size_that_is_computed_is_told_by_its_scale():
    spec = described(lambda x: x.reshape(-1), torch.zeros(3, 4), dynamic=({0: Dim("batch")},))
    (dim,) = spec.outputs[0].shape
    assert (dim.symbol, dim.scale, dim.offset) == ("batch", 4, 0)


def test_a_size_of_several_dims_is_told_in_their_names():
    spec = described(
        lambda x: x.reshape(-1), torch.zeros(3, 4), dynamic=({0: Dim("rows"), 1: Dim("columns")},)
    )
    (dim,) = spec.outputs[0].shape
    assert set(dim.symbol.split("*")) == {"rows", "columns"}


def test_an_output_whose_size_depends_on_the_data_is_bounded():
    spec = described(lambda x: x.nonzero(), torch.zeros(3, 4))
    rows, width = spec.outputs[0].shape
    assert (rows.min, rows.max, width) == (0, 12, 2)


A, B = {0: Dim("a")}, {0: Dim("b")}
AUTO = {0: Dim.AUTO}
CONDITIONS = {
    "slice": (lambda x, y: x[: y.shape[0]], (6, 3), (A, B), "b <= a"),
    "product": (
        lambda x, y: x * y.sum() if x.shape[0] * y.shape[0] < 99 else x,
        (6, 3),
        (A, B),
        "a*b < 99",
    ),
    "even": (lambda x: x if x.shape[0] % 2 else x * 2, (6,), (AUTO,), "{0} < 2 or ({0} % 2) == 0"),
    "rounded": (
        lambda x: x if int(x.shape[0] * 0.5) > 2 else x * 2,
        (6,),
        (AUTO,),
        "{0} < 2 or trunc(0.50000000000000000*float({0})) == 3",
    ),
    "range": (lambda x: x if x.shape[0] > 7 else x * 2, (6,), (AUTO,), None),
    "equal": (lambda x, y: x + y, (6, 6), (AUTO, AUTO), None),
}


@pytest.mark.parametrize(
    ("function", "sizes", "dynamic", "text"), CONDITIONS.values(), ids=CONDITIONS
)
def test_what_a_module_requires_of_sizes_is_a_condition_unless_a_range_says_it(
    function, sizes, dynamic, text
):
    spec = described(function, *map(torch.ones, sizes), dynamic=dynamic)
    symbol = spec.inputs[0].shape[0].symbol
    assert spec.conditions == (() if text is None else (text.format(symbol),))
    if text is not None:
        with pytest.raises(CompileError, match="batch_dim=0: "):
            described(function, *map(torch.ones, sizes), dynamic=dynamic, batch_dim=0)


# --- leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
def test_a_dtype_is_told_by_torchs_name(dtype):
    spec = described(lambda x: x.clone(), torch.zeros(3, dtype=dtype))
    assert f"torch.{spec.inputs[0].dtype}" == str(dtype)


def test_a_scalar_tensor_has_no_dimensions():
    spec = described(double, torch.tensor(1.0))
    assert (spec.inputs[0].shape, spec.inputs[0].order) == ((), ())


def test_arguments_that_are_no_tensors_are_literals_in_their_places():
    spec = described(
        lambda x, scale, mode, nothing: x * scale + len(mode), torch.zeros(3), 2.5, "ab", None
    )
    assert spec.inputs[1:] == (
        LiteralSpec("scale", 2.5),
        LiteralSpec("mode", "ab"),
        LiteralSpec("nothing", None),
    )


def test_a_flag_and_a_number_keep_their_types():
    spec = described(lambda x, flag, count: x * count if flag else x, torch.zeros(3), True, 1)
    assert [type(leaf.value) for leaf in spec.inputs[1:]] == [bool, int]


def test_outputs_that_are_no_tensors_are_literals():
    spec = described(lambda x: (x + 1, None, 3), torch.zeros(3))
    assert [leaf.value for leaf in spec.outputs[1:]] == [None, 3]


def test_an_output_computed_from_sizes_is_an_integer():
    spec = described(
        lambda x: (x + 1, x.shape[0] * 2), torch.zeros(3), dynamic=({0: Dim("batch")},)
    )
    assert isinstance(spec.outputs[1], IntegerSpec)


def test_outputs_that_are_computed_numbers_and_conditions_have_kinds_of_their_own():
    spec = described(
        lambda x, y: (x + 1, x.shape[0] / 2, x.shape[0] > 5, y.item()),
        torch.zeros(3),
        torch.tensor(2.5),
        dynamic=({0: Dim("batch")}, None),
    )
    assert [type(leaf) for leaf in spec.outputs] == [TensorSpec, FloatSpec, BoolSpec, FloatSpec]


@pytest.mark.parametrize("value", [2.5, "text"])
def test_a_constant_output_that_can_not_be_passed_is_refused_with_what_to_do(value):
    with pytest.raises(
        CompileError, match=rf"an output is the constant {value!r}.*return torch.tensor"
    ):
        described(lambda x: (x + 1, value), torch.zeros(3))


def test_a_dynamic_integer_input_is_refused_with_what_to_do():
    with pytest.raises(CompileError, match=r"input 'n' is a SymInt.*Make it a 0-dim tensor"):
        described(lambda x, n: x * n, torch.zeros(3), 4, dynamic=(None, Dim.DYNAMIC))


def test_leaves_of_nested_arguments_come_in_flattening_order():
    args = torch.zeros(1), [torch.zeros(2), {"a": torch.zeros(3)}]
    spec = described(
        lambda x, rest, *, k: (x + k, rest[0] + k, rest[1]["a"] + k),
        *args,
        kwargs={"k": torch.zeros(1)},
    )
    assert [leaf.shape for leaf in spec.inputs] == [(1,), (2,), (3,), (1,)]


def test_positional_parameters_are_named_and_keyword_ones_are_not_among_them():
    spec = described(
        lambda first, second, *, third: first + second + third,
        torch.zeros(3),
        torch.zeros(3),
        kwargs={"third": torch.zeros(3)},
    )
    assert spec.parameters == ("first", "second")


# --- order in memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "order"),
    [
        (torch.zeros(2, 3, 4, 5), (0, 1, 2, 3)),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), (0, 2, 3, 1)),
        (torch.zeros(4, 3).t(), (1, 0)),
        (torch.zeros(2, 3, 4).permute(1, 2, 0), (2, 0, 1)),
        (torch.zeros(2, 1, 3).transpose(0, 1), (0, 1, 2)),
        (torch.zeros(0, 3), (0, 1)),
        (torch.zeros(6, 4)[2:], (0, 1)),
    ],
    ids=[
        "contiguous",
        "channels last",
        "transposed",
        "permuted",
        "of size one",
        "empty",
        "with an offset",
    ],
)
def test_the_order_in_memory_is_the_examples(example, order):
    assert described(lambda x: x + 1, example).inputs[0].order == order


def test_the_order_in_memory_is_told_of_dynamic_examples_too():
    example = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    spec = described(lambda x: x + 1, example, dynamic=({0: Dim("batch", min=1, max=8)},))
    assert spec.inputs[0].order == (0, 2, 3, 1)


@pytest.mark.parametrize(
    ("example", "strides"),
    [
        (torch.zeros(4).expand(3, 4), (0, 1)),
        (torch.zeros(6, 4)[::2], (8, 1)),
        (torch.zeros(3, 8)[:, :4], (8, 1)),
    ],
)
def test_an_example_that_is_not_dense_has_strides_and_no_order(example, strides):
    spec = described(double, example).inputs[0]
    assert (spec.order, spec.strides) == (None, strides)


def test_outputs_that_a_package_can_not_store_are_refused_before_anything_is_compiled(tmp_path):
    with pytest.raises(CompileError, match=r"torch.return_types.topk.*Return a tuple or a dict"):
        compile_package(module(lambda x: x.topk(2)), (torch.zeros(3),), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


# --- the batch ------------------------------------------------------------------------------------

BATCH = Dim("batch", min=1, max=8)


def test_a_dimension_that_every_tensor_shares_is_the_batch():
    spec = described(
        lambda x, y: (x + y, x.sum(1)),
        torch.zeros(3, 4),
        torch.zeros(3, 1),
        dynamic=({0: BATCH}, {0: BATCH}),
    )
    assert spec.batch == BatchDim(0, "batch", 8)


def test_another_dimension_may_be_asked_for():
    options = {"dynamic": ({1: BATCH},)}
    assert described(double, torch.zeros(4, 3), **options).batch is None
    assert described(double, torch.zeros(4, 3), **options, batch_dim=1).batch == BatchDim(
        1, "batch", 8
    )


def test_literals_do_not_stand_in_the_way_of_a_batch():
    spec = described(
        lambda x, scale: (x * scale, None), torch.zeros(3), 2, dynamic=({0: BATCH}, None)
    )
    assert spec.batch == BatchDim(0, "batch", 8)


NO_BATCH = {
    "a static size": (double, (torch.zeros(3),), None),
    "an input without it": (
        lambda x, w: x @ w,
        (torch.zeros(3, 4), torch.zeros(4, 2)),
        ({0: BATCH}, None),
    ),
    "a scalar input": (lambda x, s: x * s, (torch.zeros(3), torch.tensor(1.0)), ({0: BATCH}, None)),
    "an output without it": (lambda x: x.sum(0), (torch.zeros(3, 4),), ({0: BATCH},)),
    "a scalar output": (lambda x: x.sum(), (torch.zeros(3, 4),), ({0: BATCH},)),
    "an output that has it twice": (lambda x: x @ x.T, (torch.zeros(3, 4),), ({0: BATCH},)),
    "an output with a multiple of it": (
        lambda x: x.reshape(-1),
        (torch.zeros(3, 4),),
        ({0: BATCH},),
    ),
    "an output that mixes it with another": (
        lambda x: (x, x.reshape(1, -1).expand(x.shape[0], -1)),
        (torch.zeros(3, 5),),
        ({0: BATCH, 1: Dim("length", min=1, max=8)},),
    ),
    "another dim at its place": (
        lambda x, y: (x + 1, y + 1),
        (torch.zeros(3), torch.zeros(4)),
        ({0: BATCH}, {0: Dim("other", min=1, max=8)}),
    ),
    "a size that is one more": (double, (torch.zeros(4),), ({0: Dim("n", min=1, max=8) + 1},)),
    "its size as an output": (lambda x: (x + 1, x.shape[0]), (torch.zeros(3),), ({0: BATCH},)),
    "no input at all": (lambda: torch.zeros(3), (), None),
}


@pytest.mark.parametrize(("function", "args", "dynamic"), NO_BATCH.values(), ids=NO_BATCH)
def test_requests_can_not_be_batched_with(function, args, dynamic):
    program = export(module(function), args, dynamic_shapes=dynamic)
    assert describe(program).batch is None
    with pytest.raises(
        CompileError, match="batch_dim=0: not every tensor input and output has the same"
    ):
        describe(program, batch_dim=0)


@pytest.mark.parametrize("dim", [-1, 1, 7])
def test_a_batch_dimension_that_is_not_there_is_refused(dim):
    with pytest.raises(CompileError, match=f"batch_dim={dim}"):
        described(double, torch.zeros(3), dynamic=({0: BATCH},), batch_dim=dim)


def test_a_scalar_has_no_batch_dimension_from_either_end():
    for dim in (0, -1):
        with pytest.raises(CompileError, match=f"batch_dim={dim}"):
            described(double, torch.tensor(1.0), batch_dim=dim)


# --- the module -----------------------------------------------------------------------------------


def test_a_module_that_writes_to_its_buffers_is_told():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(1))

        def forward(self, x):
            self.runs.add_(1)
            return x + self.runs

    assert describe(export(Counter(), (torch.zeros(3),))).mutates_buffers


def test_a_module_that_only_reads_its_buffers_is_told():
    norm = nn.BatchNorm1d(4).eval()
    assert not describe(export(norm, (torch.zeros(3, 4),))).mutates_buffers


def test_how_it_is_compiled_is_stored():
    spec = described(double, torch.zeros(3), threads=4, freeze=True)
    assert (spec.threads, spec.frozen, spec.torch_version) == (4, True, torch.__version__)


# --- what can't be compiled -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "model.so", "model.pt", "model.pt2.zip"])
def test_a_package_must_be_named_pt2(tmp_path, name):
    with pytest.raises(CompileError, match=f"{name}: a package's name must end in .pt2"):
        compile_package(module(double), (torch.zeros(3),), tmp_path / name)


@pytest.mark.parametrize("threads", [0, -1])
def test_at_least_one_thread_is_needed(tmp_path, threads):
    with pytest.raises(CompileError, match=f"threads={threads}"):
        compile_package(module(double), (torch.zeros(3),), tmp_path / "m.pt2", threads=threads)


def test_a_module_that_can_not_be_exported_is_named_with_torchs_reason(tmp_path):
    class Stubborn(nn.Module):
        def forward(self, x):
            raise KeyError("no such thing")

    with pytest.raises(
        CompileError, match=r"Stubborn could not be exported: .*no such thing"
    ) as caught:
        compile_package(Stubborn(), (torch.zeros(3),), tmp_path / "m.pt2")
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Sequential(OrderedDict({"class": nn.Linear(3, 3)})), torch.zeros(3)),
        (module(lambda x: x['it\'s "quoted"'] * 2), {'it\'s "quoted"': torch.zeros(3)}),
    ],
    ids=["a keyword", "quotes"],
)
def test_a_name_that_torch_can_not_write_into_code_is_refused_with_what_to_do(
    tmp_path, model, example
):
    with pytest.raises(CompileError, match=r"could not be exported: (.|\n)*Rename those that are"):
        compile_package(model, (example,), tmp_path / "m.pt2")


def test_dynamic_shapes_that_do_not_match_the_arguments_are_an_export_error(tmp_path):
    with pytest.raises(CompileError, match="could not be exported"):
        compile_package(
            module(double), (torch.zeros(3),), tmp_path / "m.pt2", dynamic={"nothing": {0: BATCH}}
        )


@pytest.mark.filterwarnings("ignore")  # what inductor imports has warnings of its own
def test_options_that_inductor_does_not_know_are_a_compile_error(tmp_path):
    with pytest.raises(CompileError, match=r"could not be compiled: .*no_such_option") as caught:
        compile_package(
            module(double), (torch.zeros(3),), tmp_path / "m.pt2", options={"no_such_option": 1}
        )
    assert caught.value.__cause__ is not None


def test_a_module_that_writes_to_its_buffers_can_not_be_frozen(tmp_path):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(1))

        def forward(self, x):
            self.runs.add_(1)
            return x + self.runs

    with pytest.raises(
        CompileError, match="Counter writes to its own buffers, and freeze=True would fix"
    ):
        compile_package(Counter(), (torch.zeros(3),), tmp_path / "m.pt2", freeze=True)


# --- a package ------------------------------------------------------------------------------------


def test_a_compiled_package_carries_what_describe_tells(built):
    model = built("attention")
    definition = model.definition
    program = export(
        model.module(), model.args, dict(model.kwargs), dynamic_shapes=definition.dynamic
    )
    stored = spec_from_metadata(open_package(model.path).model().metadata)
    # What running the model adds is tested where it is found out.
    plain = msgspec.structs.replace(stored, rows=None, examples=(), sizes_probed=False, weights=())
    assert plain == describe(program, threads=definition.threads)
    assert stored.rows.independent
    assert stored.sizes_probed
    assert [example.shape for example in stored.examples] == [
        tuple(arg.shape) for arg in model.args
    ]


@pytest.mark.parametrize(
    "name", ["mlp", "attention", "dtypes", "signature", "scalars", "mutating", "ordered"]
)
def test_a_compiled_packages_own_examples_pass_its_check(built, name):
    model = built(name)
    spec = spec_from_metadata(open_package(model.path).model().metadata)
    tensors = [
        leaf
        for leaf in torch.utils._pytree.tree_leaves((model.args, dict(model.kwargs)))
        if isinstance(leaf, torch.Tensor)
    ]
    InputCheck(name, [leaf for leaf in spec.inputs if isinstance(leaf, TensorSpec)])(tensors)
