"""Arrays in the place of tensors, copies of inputs, and missing arguments."""

import json

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from aoti_sched.errors import InputMismatchError  # noqa: E402
from aoti_sched.model.call_spec import ExportedCallSpec  # noqa: E402
from aoti_sched.model.copies import copied  # noqa: E402
from aoti_sched.model.input_check import ArityCheck, InputCheck  # noqa: E402
from aoti_sched.model.specs import DynamicDim, TensorSpec  # noqa: E402


@pytest.fixture
def check():
    return InputCheck("m", [TensorSpec("x", "float32", (DynamicDim("rows", min=0, max=8), 2))])


class Foreign:
    """An array of another library."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


class Broken:
    def __dlpack__(self, **options):
        raise BufferError("no")


def test_an_array_becomes_a_tensor_of_the_same_memory(check):
    array = np.ones((3, 2), np.float32)
    inputs = [array]
    assert check(inputs) == 24
    assert type(inputs[0]) is torch.Tensor
    array[0, 0] = 7.0
    assert inputs[0][0, 0] == 7.0


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_that_must_not_be_written_to_is_copied_without_a_warning(check, order):
    array = np.ones((3, 2), np.float32, order=order)
    array.setflags(write=False)
    inputs = [array]
    check(inputs)  # warnings are errors here
    assert inputs[0].stride() == torch.from_numpy(array.copy("K")).stride()
    inputs[0].zero_()
    assert array.all()


def test_whatever_has_dlpack_becomes_a_tensor_of_the_same_memory(check):
    tensor = torch.ones(3, 2)
    inputs = [Foreign(tensor)]
    check(inputs)
    assert inputs[0].data_ptr() == tensor.data_ptr()


def test_where_only_the_number_of_inputs_is_known_arrays_are_taken_too():
    inputs = [np.ones(3), torch.ones(2)]
    assert ArityCheck("m", 2, "cpu")(inputs) == 32
    assert all(type(one) is torch.Tensor for one in inputs)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((3, 2)), "dtype float32, got float64"),
        (np.ones((3, 3), np.float32), "size 2 at dimension 1"),
        (np.ones((3, 2), "datetime64[s]"), "a tensor float32"),
        (np.ones((3, 2), np.float32)[::-1], "a tensor float32"),
        (np.ones((2, 3), np.float32).T, "strides"),
        (np.float32(1.0), "a tensor float32"),
        (Broken(), "a tensor float32"),
    ],
    ids=["dtype", "size", "no tensor", "backwards", "transposed", "scalar", "broken"],
)
def test_an_array_that_does_not_fit_is_refused_as_a_tensor_is(array, words):
    spec = TensorSpec("x", "float32", (DynamicDim("rows", min=0, max=8), 2), order=(0, 1))
    with pytest.raises(InputMismatchError, match=words):
        InputCheck("m", [spec])([array])


# --- arguments ------------------------------------------------------------------------------------


def leaf():
    return {"type": None, "context": None, "children_spec": []}


def call_spec(positional, named=(), parameters=("x", "mask")):
    args = {
        "type": "builtins.tuple",
        "context": "null",
        "children_spec": [leaf() for _ in range(positional)],
    }
    kwargs = {
        "type": "builtins.dict",
        "context": json.dumps(list(named)),
        "children_spec": [leaf() for _ in named],
    }
    root = {"type": "builtins.tuple", "context": "null", "children_spec": [args, kwargs]}
    return ExportedCallSpec(
        "m", json.dumps([1, root]), json.dumps([1, leaf()]), parameters=parameters
    )


def test_an_array_counts_where_other_leaves_than_tensors_are_left_out():
    inputs = call_spec(2).flatten((np.ones(2), 3), {})
    assert [type(one) for one in inputs] == [np.ndarray]


@pytest.mark.parametrize(
    ("args", "kwargs", "hint"),
    [
        ((), {}, "Missing: x, mask."),
        ((1,), {}, "Missing: mask."),
        ((), {"mask": 2}, "Missing: x."),
        ((1,), {"masks": 2}, "Missing: mask. Unknown: 'masks'."),
        ((1, 2), {"more": 3}, "Unknown: 'more'."),
        ((1, 2), {"x": 3}, "Given twice: x."),
        ((1, 2, 3), {}, "It takes 2 positional arguments."),
    ],
)
def test_an_error_names_the_arguments_that_are_missing_or_too_many(args, kwargs, hint):
    with pytest.raises(InputMismatchError) as caught:
        call_spec(2).flatten(args, kwargs)
    assert caught.value.hint == hint
    assert str(caught.value).endswith(hint)


def test_a_missing_keyword_is_named():
    with pytest.raises(InputMismatchError, match="Missing: scale"):
        call_spec(1, ["scale"], parameters=("x",)).flatten((1,), {})


def test_an_argument_without_a_name_is_named_by_its_place():
    with pytest.raises(InputMismatchError, match=r"Missing: args\[1\]"):
        call_spec(2, parameters=()).flatten((1,), {})


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(12.0)[::2],
        torch.arange(3.0).expand(4, 3),
        torch.arange(9.0)[2:].unfold(0, 3, 1),
        torch.zeros(0, 3),
        torch.tensor(1.0),
        torch.arange(4.0, requires_grad=True),
    ],
    ids=["dense", "transposed", "sliced", "expanded", "overlapping", "empty", "scalar", "grad"],
)
def test_a_copy_has_the_values_and_the_layout_and_other_memory(tensor):
    (copy,) = copied([tensor])
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert not copy.requires_grad
    if tensor.numel():
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_inputs_that_are_one_tensor_stay_one():
    x = torch.ones(2)
    first, second, other = copied([x, x, torch.ones(2)])
    assert first is second
    assert first is not other
