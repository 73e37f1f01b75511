"""From tensors to handles and back: directly, and through torch's functions for lists of
capsules.
"""

import ctypes
import gc

import pytest

from aoti_sched.backends.native import _native
from tests.native.harness import collect, drain, model, open_lanes, run_here, submit
from tests.native.library import Container, capsule, library, pointer


class Tensor:
    """A tensor as Python has it: one reference to a tensor of the C library."""

    def __init__(self, handle=None):
        self.handle = handle or library().new_tensor()

    @property
    def _cdata(self):
        return self.handle

    def __del__(self):
        library().delete(self.handle)


def reference(handle):
    """Another owner of a handle's tensor."""
    made = ctypes.c_void_p()
    new_handle = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(
        library().address("torch_new_tensor_handle")
    )
    assert new_handle(ctypes.byref(ctypes.c_void_p(handle)), ctypes.byref(made)) == 0
    return made.value


@ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p)
def wrap(handle):
    return Tensor(reference(handle))


def directly(function=None):
    wrapper = library().address(function) if function else ctypes.cast(wrap, ctypes.c_void_p).value
    return _native.Tensors(
        Tensor, list, list, new_handle=library().address("torch_new_tensor_handle"), wrap=wrapper
    )


def through_capsules(from_capsules=lambda capsules: [Tensor(pointer(one)) for one in capsules]):
    return _native.Tensors(
        Tensor,
        lambda tensors: [capsule(reference(tensor.handle)) for tensor in tensors],
        from_capsules,
    )


def open_with(tensors):
    return open_lanes(tensors=tensors)


@pytest.fixture(autouse=True)
def c():
    """The C library. Whatever a test does, no tensor of its may be left over."""
    gc.collect()
    before = library().live()
    yield library()
    gc.collect()
    assert library().live() == before


@pytest.fixture(params=[directly, through_capsules], ids=lambda way: way.__name__)
def lanes(request):
    lanes = open_with(request.param())
    yield lanes
    lanes.close()


def taken(inputs, outputs, **script):
    """A model that takes all its inputs."""
    return model(Container(stolen=2**inputs - 1, **script), inputs, outputs)


@pytest.mark.parametrize("kind", [list, tuple])
def test_tensors_go_in_and_come_out(lanes, kind):
    inputs = kind([Tensor(), Tensor()])
    done = run_here(lanes, taken(2, 2, passes_on=1), inputs)
    assert [output.handle for output in done.outputs] == [tensor.handle for tensor in inputs]


def test_a_lane_takes_and_gives_the_same_as_a_run_here(lanes):
    tensor = Tensor()
    submit(lanes, taken(1, 1, passes_on=1), [tensor])
    (done,) = collect(lanes, 1)
    assert [output.handle for output in done.outputs] == [tensor.handle]


@pytest.mark.parametrize("made", [0b000, 0b010, 0b101, 0b111])
def test_outputs_that_are_left_out_are_none_and_the_others_stay_in_their_places(lanes, made):
    done = run_here(lanes, taken(0, 3, made=made))
    assert [output is not None for output in done.outputs] == [
        bool(made >> i & 1) for i in range(3)
    ]


def test_tensors_of_a_subclass_are_tensors(lanes):
    tensor = type("Parameter", (Tensor,), {})()
    assert run_here(lanes, taken(1, 1, passes_on=1), [tensor]).outputs[0].handle == tensor.handle


def test_what_is_no_sequence_is_refused(lanes):
    with pytest.raises(TypeError, match="the inputs are no sequence"):
        lanes.run_here(taken(1, 0), 7, 1)


# --- directly -------------------------------------------------------------------------------------


class Storage:
    """No tensor, though it has an address."""

    _cdata = 8


class Broken(Tensor):
    @property
    def _cdata(self):
        raise LookupError("no address today")


class Empty(Tensor):
    _cdata = 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (Storage, TypeError, "an input is no tensor"),
        (Broken, LookupError, "no address today"),
        (Empty, TypeError, "an input has no memory of a tensor"),
    ],
)
def test_an_input_that_is_no_tensor_is_refused_before_a_handle_is_made(c, make, error, words):
    inputs = [Tensor(), make()]
    before = c.live()
    lanes = open_with(directly())
    with pytest.raises(error, match=words):
        submit(lanes, taken(2, 0), inputs)
    assert c.live() == before


def test_an_input_of_which_torch_makes_no_handle_is_refused_and_the_handles_before_it_are_freed(c):
    inputs = [Tensor(), Tensor(), Tensor()]
    c.break_tensor(inputs[2].handle)
    before = c.live()
    lanes = open_with(directly())
    with pytest.raises(RuntimeError, match="torch made no handle for an input"):
        submit(lanes, taken(3, 0), inputs)
    assert c.live() == before


@pytest.mark.parametrize("function", ["torch_wrap_nothing", "torch_wrap_throws"])
def test_an_output_of_which_torch_makes_no_tensor_fails_its_run_and_all_its_outputs_are_freed(
    c, function
):
    before = c.live()
    lanes = open_with(directly(function))
    done = run_here(lanes, taken(0, 3, made=0b101))
    assert (done.outputs, done.error) == (None, ("torch made no tensor of an output", ""))
    assert c.live() == before


def test_there_are_both_functions_to_do_without_capsules_or_none():
    with pytest.raises(ValueError, match="both or none"):
        _native.Tensors(Tensor, list, list, new_handle=library().address("torch_new_tensor_handle"))


# --- through capsules -----------------------------------------------------------------------------


def test_outputs_that_can_not_be_taken_fail_their_run_and_not_those_drained_with_it():
    def take(capsules):
        tensors = [Tensor(pointer(one)) for one in capsules]
        if len(tensors) == 2:
            raise MemoryError("no room for two")
        return tensors

    lanes = open_with(through_capsules(take))
    submit(lanes, taken(0, 2, made=0b11), token=1)
    submit(lanes, taken(0, 1, made=0b1), token=2)
    lanes.close()
    first, second = drain(lanes)
    assert (first.token, first.outputs, second.token) == (1, None, 2)
    assert "no room for two" in first.error[0]
    assert len(second.outputs) == 1
