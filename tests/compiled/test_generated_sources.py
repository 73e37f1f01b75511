"""What is read out of the C++ that torch really generates: specs, and writes to buffers."""

import pytest

from aoti_sched.model.specs import DynamicDim, TensorSpec, spec_from_metadata, specs_from_wrapper
from aoti_sched.model.wrapper_source import WRITES, writes_to_buffers
from aoti_sched.package import open_package


def stated(package):
    return specs_from_wrapper(open_package(package.path).wrapper_source())


def shapes(specs):
    return [spec.shape for spec in specs]


def test_a_generated_wrapper_states_a_dynamic_range(built):
    (spec,) = stated(built("mlp"))
    batch, width = spec.shape
    assert (spec.dtype, spec.device, spec.order) == ("float32", "cpu", (0, 1))
    assert (batch.min, batch.max, width) == (
        2,
        64,
        8,
    )  # as torch states it; loading runs it on fewer


def test_a_generated_wrapper_states_static_sizes(built):
    (spec,) = stated(built("conv"))
    assert (spec.shape, spec.order) == ((2, 3, 8, 8), (0, 1, 2, 3))


def test_a_generated_wrapper_without_an_upper_bound_leaves_it_open(built):
    (spec,) = stated(built("unbounded"))
    assert (spec.shape[0].max, spec.shape[1]) == (None, 3)


def test_a_generated_wrapper_states_every_dtype(built):
    specs = stated(built("dtypes"))
    assert [spec.dtype for spec in specs] == ["int64", "bool", "bfloat16", "float16", "float64"]


def test_inputs_of_a_generated_wrapper_share_their_symbols(built):
    tokens, mask = stated(built("attention"))
    assert tokens.shape[:2] == mask.shape
    assert tokens.shape[0].symbol != tokens.shape[1].symbol


def test_scalars_in_a_generated_wrapper_have_no_dimensions(built):
    specs = stated(built("scalars"))
    assert [(spec.shape, spec.order) for spec in specs] == [((), ()), ((), ())]


@pytest.mark.parametrize("model", ["mlp", "attention", "dtypes", "scalars", "canary", "failing"])
def test_a_generated_wrapper_and_our_metadata_tell_the_same(built, model):
    """Except the symbols' names, and a lower bound of 0 or 1, which generated code does not
    state.
    """
    own = spec_from_metadata(open_package(built(model).path).model().metadata)

    def plain(spec):
        shape = [(d.max, d.scale, d.offset) if isinstance(d, DynamicDim) else d for d in spec.shape]
        return spec.dtype, shape, spec.device, spec.order

    assert [plain(spec) for spec in stated(built(model))] == [plain(spec) for spec in own.inputs]


def test_literals_take_no_place_in_a_generated_wrapper(built):
    own = spec_from_metadata(open_package(built("signature").path).model().metadata)
    tensors = [leaf for leaf in own.inputs if isinstance(leaf, TensorSpec)]
    assert shapes(stated(built("signature"))) == shapes(tensors)


@pytest.mark.parametrize(
    ("model", "answer"),
    [("conv", ""), ("mlp", ""), ("aliasing", ""), ("mutating", WRITES), ("counter", WRITES)],
)
def test_really_generated_sources_show_it(built, model, answer):
    assert writes_to_buffers(None, open_package(built(model).path).wrapper_source()) == answer
