"""Inputs that are made up agree with those that are given."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cyclopts", reason="the command line needs the extra cli")

from aoti_sched.cli.failures import UsageError  # noqa: E402
from aoti_sched.cli.inputs import Inputs  # noqa: E402
from aoti_sched.model.specs import (  # noqa: E402
    DynamicDim,
    ExampleSpec,
    LiteralSpec,
    ModelSpec,
    SpecSource,
    TensorSpec,
    spec_to_metadata,
)

ROWS = DynamicDim("rows", 0, 64)
SPECS = (
    TensorSpec("ids", "int64", (ROWS, DynamicDim("tokens", 2, 128))),
    LiteralSpec("flag", True),
    TensorSpec("mask", "bool", (ROWS,)),
)


def inputs(given=(), sizes=(), specs=SPECS, examples=()):
    spec = ModelSpec(inputs=specs, outputs=(), parameters=(), examples=examples)
    source = SpecSource.PACKAGE if specs else SpecSource.ARITY
    metadata = spec_to_metadata(spec)
    info = SimpleNamespace(name="m", inputs=specs, metadata=metadata, spec_source=source)
    return Inputs(info, None, given, sizes)


def shapes(made):
    return [list(tensor.shape) for tensor in made.tensors(0)]


def test_sizes_are_the_least_then_the_examples_then_given_then_stated():
    examples = (ExampleSpec((4, 8), 0.0, 9.0), ExampleSpec((4,)))
    assert shapes(inputs()) == [[1, 2], [1]]
    assert shapes(inputs(examples=examples)) == [[4, 8], [4]]
    assert shapes(inputs(["mask=[true, false, true]"], examples=examples)) == [[3, 8], [3]]
    assert shapes(inputs(sizes=["rows=5"], examples=examples)) == [[5, 8], [5]]


def test_values_are_like_the_example_and_of_the_dtype():
    made = inputs(examples=(ExampleSpec((4, 8), 3.0, 5.0), ExampleSpec((4,))))
    ids, mask = made.tensors(0)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert 3 <= int(ids.min()) <= int(ids.max()) <= 5
    (given,) = inputs(["ids=[[1, 2]]"]).given.values()
    assert given.dtype == torch.int64


def test_literals_have_their_places_among_the_arguments():
    (ids, flag, mask), keywords = inputs().arguments(0)
    assert (flag, keywords) == (True, {})
    assert (ids.shape[0], mask.shape[0]) == (1, 1)


def test_without_specs_the_given_tensors_are_all():
    assert shapes(inputs(["0=[1.0]", "1=2"], specs=())) == [[1], []]


@pytest.mark.parametrize(
    ("given", "sizes", "specs", "says"),
    [
        (["flag=false"], (), SPECS, "is part of the compiled code, and always True"),
        (["2=[1]"], (), SPECS, "no input '2'. The inputs are 'ids', 'mask'."),
        (["=[1]"], (), SPECS, "no input ''"),
        (["ids=[[1], [2, 3]]"], (), SPECS, "neither @FILE nor a number or list in JSON"),
        (['ids="text"'], (), SPECS, "neither @FILE nor a number or list in JSON"),
        ([], ["tokens=many"], SPECS, "write SYMBOL=NUMBER"),
        ([], ["columns=2"], SPECS, "The model's sizes are rows, tokens."),
        ([], (), (), "none can be made up"),
        (["1=[1.0]"], (), (), "not numbered 0, 1 and so on"),
    ],
)
def test_what_can_not_be_made_is_explained(given, sizes, specs, says):
    with pytest.raises(UsageError) as raised:
        inputs(given, sizes, specs)
    assert says in str(raised.value)


def test_a_size_that_is_an_expression_can_not_be_made_up():
    specs = (TensorSpec("x", "float32", (DynamicDim("s0*s1"),)),)
    assert shapes(inputs(["x=[1, 2]"], specs=specs)) == [[2]]
