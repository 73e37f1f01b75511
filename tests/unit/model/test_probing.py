"""What running a model at load shows.

The models are functions of tensors that read memory as compiled code would.
"""

import ctypes
import os

import msgspec
import pytest
import torch

from aoti_sched.child import can_fork
from aoti_sched.engine.probe_values import Rows, Symbol, symbols_in, with_least
from aoti_sched.engine.probing import examine
from aoti_sched.errors import RunError
from aoti_sched.model.specs import DynamicDim, ExampleSpec, TensorSpec

pytestmark = pytest.mark.skipif(not can_fork(), reason="there are no child processes here")

X = TensorSpec("x", "float32", (DynamicDim("s", min=2), 3), order=(0, 1))


class Model:
    """A container whose code is a function."""

    def __init__(self, function):
        self.function = function

    def run_raw(self, inputs):
        outputs = self.function(*inputs)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]


def least(function, specs=(X,), **settings):
    found = examine(
        Model(function), specs, symbols=symbols_in(specs, stated_by_user=False), **settings
    )
    return found.least["s"]


def beyond(x, first, rows):
    """Rows of memory, as code reads them that never asks how many there are."""
    return x.as_strided((rows, 3), (3, 1), x.storage_offset() + 3 * first)


def crash(_):
    ctypes.string_at(0)


# --- the least sizes ------------------------------------------------------------------------------


def test_a_model_that_works_on_each_row_takes_none_at_all():
    assert least(lambda x: torch.relu(x) @ torch.ones(3, 2)) == (0, "")


@pytest.mark.parametrize("dtype", ["float32", "complex64", "int64"])
def test_an_output_of_one_element_with_a_stride_of_its_own_is_compared(dtype):
    x = msgspec.structs.replace(X, dtype=dtype)
    assert least(lambda x: (x * 2)[:, 0], (x,)) == (0, "")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: beyond(x, 0, 2) * 2,
        lambda x: beyond(x, 1, 1)[0] - x[0],
        lambda x: (x * 1, beyond(x, x.shape[0] - 2, 1) * 1),
        lambda x: x + beyond(x, 1, 1),
    ],
    ids=["x[:2]", "x[1] - x[0]", "x[-2]", "x + x[1]"],
)
def test_a_model_that_reads_beyond_one_row_takes_two(function):
    value, why = least(function)
    assert value == 2
    assert "1 is not taken: it reads beyond its input" in why


@pytest.mark.parametrize(
    "function",
    [lambda x: beyond(x, x.shape[0] - 1, 1)[0] * 1, lambda x: x.sum(0), lambda x: torch.zeros(3)],
    ids=["x[-1]", "x.sum(0)", "argmax"],
)
def test_a_model_that_answers_even_for_no_rows_takes_one(function):
    value, why = least(function)
    assert value == 1
    assert "0 is not taken" in why


def test_a_size_whose_output_has_another_shape_is_not_taken():
    value, why = least(lambda x: x if x.shape[0] > 1 else x.new_zeros(4, 3))
    assert value == 2
    assert "output 0 has shape (4, 3), and (1, 3) was expected" in why


def test_a_size_that_gives_other_values_than_the_same_rows_of_a_larger_request_is_not_taken():
    value, why = least(lambda x: x * 2 if x.shape[0] > 1 else x * 3)
    assert value == 2
    assert "output 0 is not that of the same rows in a larger request" in why


@pytest.mark.parametrize("size", [0, 1])
def test_a_size_that_ends_the_process_ends_a_child_alone(size):
    value, why = least(lambda x: crash(x) if x.shape[0] == size else x * 2)
    assert value == size + 1
    assert f"{size} is not taken" in why
    assert "SIGSEGV" in why


def test_an_error_of_the_examination_itself_is_reported_as_that(monkeypatch):
    def fail(self, todo, rows):
        raise ValueError("a mistake in it")

    monkeypatch.setattr("aoti_sched.engine.probe_runs.ProbeRuns.all", fail)
    found = examine(Model(torch.relu), [X], symbols=symbols_in([X], stated_by_user=False))
    assert found.failure == "trying it failed by itself: ValueError: a mistake in it"
    assert found.least == {"s": (2, found.failure)}


def test_a_size_that_fails_is_not_taken():
    def function(x):
        if not x.shape[0]:
            raise RunError("no rows")
        return x * 2

    value, why = least(function)
    assert value == 1
    assert "RunError: no rows" in why


def test_any_linear_expression_of_a_symbol_is_examined():
    spec = TensorSpec("x", "float32", (DynamicDim("s", min=5, scale=2, offset=1), 3), order=(0, 1))
    found = examine(Model(torch.relu), [spec], symbols=symbols_in([spec], stated_by_user=False))
    assert found.least["s"] == (0, "")
    (changed,) = with_least([spec], {"s": (0, "")})
    assert changed.shape[0].min == 1


def test_sizes_that_do_alone_but_not_together_are_raised():
    specs = [
        TensorSpec("x", "float32", (DynamicDim("a", min=2), DynamicDim("b", min=2)), order=(0, 1))
    ]

    def function(x):
        if x.shape[0] < 2 and x.shape[1] < 2:
            raise RunError("too small")
        return x * 2

    found = examine(Model(function), specs, symbols=symbols_in(specs, stated_by_user=False))
    assert {name: value for name, (value, _) in found.least.items()} == {"a": 2, "b": 2}


def test_a_larger_least_size_is_the_codes_own_need():
    spec = TensorSpec("x", "float32", (DynamicDim("s", min=3, max=9),))
    assert symbols_in([spec], stated_by_user=False) == {"s": Symbol("s", 3, 3, 9)}


def test_what_a_user_states_is_not_extended():
    spec = TensorSpec("x", "float32", (DynamicDim("s", min=1, max=9),))
    assert symbols_in([spec], stated_by_user=True) == {"s": Symbol("s", 1, 2, 9)}


def test_a_model_that_takes_zeros_only_is_examined_on_them():
    def function(x):
        if x.any():
            raise RunError("zeros, please")
        return x * 2

    found = examine(Model(function), [X], symbols=symbols_in([X], stated_by_user=False))
    assert (found.zeros, found.least["s"][0]) == (True, 0)


def test_a_model_that_can_not_be_run_keeps_what_is_stated():
    def function(x):
        raise RunError("index out of range\nand a long trace")

    found = examine(Model(function), [X], symbols=symbols_in([X], stated_by_user=False))
    assert found.failure == "RunError: index out of range"
    assert found.least["s"] == (2, "RunError: index out of range")


def test_values_are_like_the_example():
    def function(x):
        if not bool(((x >= 20) & (x < 30)).all()):
            raise RunError("from 20 to 29")
        return x * 2

    spec = TensorSpec("x", "int64", (DynamicDim("s", min=2),), order=(0,))
    examples = [ExampleSpec((3,), 20.0, 29.0, (20, 21, 29))]
    found = examine(
        Model(function), [spec], examples=examples, symbols=symbols_in([spec], stated_by_user=False)
    )
    assert (found.failure, found.least["s"]) == ("", (0, ""))


def test_without_a_child_process_no_empty_size_is_run():
    sizes = []
    here = os.getpid()

    def function(x):
        sizes.append((os.getpid(), x.shape[0]))
        return x * 2

    assert least(function, apart=False) == (1, "")
    assert {pid for pid, _ in sizes} == {here}
    assert min(size for _, size in sizes) == 1


def test_the_state_of_a_model_is_what_it_was():
    runs = [0]

    def function(x):
        runs[0] += 1
        return x * 2

    least(function)
    assert runs == [0]


# --- writes ---------------------------------------------------------------------------------------


def test_an_input_that_a_run_writes_to_is_found():
    y = TensorSpec("y", "float32", (DynamicDim("s", min=2), 3), order=(0, 1))
    assert examine(Model(lambda x, y: y.add_(x) * 1), [X, y]).mutated == (1,)


# --- rows -----------------------------------------------------------------------------------------

ROWS = Rows(0, "s")


def rows(function, specs=(X,), asked=ROWS):
    return examine(Model(function), specs, rows=asked).rows


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: x.cumsum(0),
        lambda x: x.flip(0),
        lambda x: torch.softmax(x @ x.T, 1) @ x,
        lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
    ],
    ids=["mean", "cumsum", "flip", "attention", "batch norm"],
)
def test_rows_that_influence_each_other_are_found(function):
    found = rows(function)
    assert found.independent is False
    assert "Rows influence each other" in found.reason


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: torch.softmax(x, 1) @ torch.ones(3, 4),
    ],
    ids=["relu", "layer norm", "softmax"],
)
def test_rows_that_do_not_influence_each_other_are_found(function):
    assert rows(function).independent is True


def test_rows_of_a_size_that_was_compiled_in_are_examined_with_padding():
    spec = TensorSpec("x", "float32", (8, 3), order=(0, 1))
    asked = Rows(0, "", (8,))
    assert rows(lambda x: x * 2, [spec], asked).independent is True
    assert rows(lambda x: x - x.mean(0), [spec], asked).independent is False


def test_an_output_without_rows_is_said():
    assert rows(lambda x: x.sum()).reason == "output 0 has no rows in dimension 0"


def test_a_model_that_answers_at_random_shows_nothing():
    found = rows(lambda x: x + torch.rand(1))
    assert (found.independent, found.reason) == (None, "its answers differ from run to run")
