"""Conditions on dynamic sizes: their text, and the check of a request's sizes."""

import pytest
import torch

from aoti_sched.errors import InputMismatchError, LoadError
from aoti_sched.model.input_check import InputCheck
from aoti_sched.model.size_conditions import SizeCondition, mentioning, with_symbol
from aoti_sched.model.specs import DynamicDim, TensorSpec


@pytest.mark.parametrize(
    ("text", "sizes", "holds"),
    [
        ("b <= a", {"a": 3, "b": 3}, True),
        ("b <= a", {"a": 3, "b": 4}, False),
        ("a < 2 or (a % 2) == 0", {"a": 1}, True),
        ("a < 2 or (a % 2) == 0", {"a": 5}, False),
        ("(a % b) == 0", {"a": 3, "b": 0}, False),
        ("trunc(0.5*float(a)) > 2", {"a": 5}, False),
        ("ceil(a / 3) + round(a / 3) == 4", {"a": 6}, True),
        ("max(a, 4) != 7 and not a == 2", {"a": 7}, False),
        ("a**2 == 49", {"a": 7}, True),
    ],
)
def test_a_condition_holds_for_some_sizes(text, sizes, holds):
    condition = SizeCondition(text)
    assert condition.symbols == set(sizes)
    assert condition.holds(sizes) is holds


@pytest.mark.parametrize(
    "text",
    [
        *("", "a <", "open('x')", "a.real == 1", "(lambda: 1)()", "a == 'x'", "[a] == 1", "b()"),
        *("9**9**9 > a", "a**b > 2", "a**9 > 2", "a\0 > 2", "(" * 5_000),
    ],
    ids=range(13),
)
def test_a_text_that_is_no_condition_is_refused(text):
    with pytest.raises(ValueError, match="condition"):
        SizeCondition(text)


def test_a_condition_without_its_sizes_does_not_hold():
    assert not SizeCondition("a < 3 or b < 3").holds({"b": 5})


@pytest.mark.parametrize(
    ("text", "says"), [("a <", "can't be read"), ("a < c", "is on c, which no input has as a size")]
)
def test_a_package_with_a_damaged_condition_is_not_loaded(text, says):
    specs = [TensorSpec("x", "float32", (DynamicDim("a"),))]
    with pytest.raises(LoadError, match=rf"model 'm': the condition '{text}' {says}.*damaged"):
        InputCheck("m", specs, conditions=[text])


def test_a_symbol_is_found_and_replaced_as_a_whole():
    assert with_symbol(["s1 <= s11"], "s1", "rows") == ("rows <= s11",)
    assert mentioning(["s11 < 4", "s1 < 3"], "s1") == "s1 < 3"
    assert mentioning(["s11 < 4"], "s1") == mentioning(["s11 < 4"], "") == ""


def test_a_request_whose_sizes_do_not_meet_a_condition_is_refused_with_the_condition():
    specs = [TensorSpec(n, "float32", (DynamicDim(s),)) for n, s in (("x", "a"), ("y", "b"))]
    check = InputCheck("m", specs, conditions=["b <= a"])
    assert check([torch.zeros(3), torch.zeros(2)]) == 20
    with pytest.raises(
        InputMismatchError,
        match=r"model 'm': expected sizes with b <= a, got a=3, b=4\. The model was compiled for "
        r"such sizes only\. The inputs are x: float32\[a:0\.\.\], y: float32\[b:0\.\.\]\.",
    ):
        check([torch.zeros(3), torch.zeros(4)])
