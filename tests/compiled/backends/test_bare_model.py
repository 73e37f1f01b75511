"""The bare model beside a container: its own constants, and refusals where it would crash."""

from __future__ import annotations

import pytest
import torch

from aoti_sched.backends.aoti.bare_model import BareModel
from aoti_sched.errors import (
    InputMismatchError,
    LoadError,
    MissingWeightsError,
    RunError,
    RunnerClosedError,
)
from tests.compiled.backends.conftest import owners
from tests.models import build


def canary_set(number):
    return {
        "first": torch.full((16, 16), float(number)),
        "middle": torch.full((64,), float(number)),
        "count": torch.full((3, 3), number),
        "last": torch.full((5, 7), float(number)),
    }


def seen(model):
    return set(model.run(build("canary").args)[0].flatten().tolist())


def test_a_bare_model_computes_what_its_container_computes(load):
    container = load("mlp")
    model = BareModel(container)
    torch.testing.assert_close(model.run(build("mlp").args), container.run(build("mlp").args))
    model.close()


def test_its_constants_are_its_own(load):
    container = load("canary")
    model = BareModel(container, canary_set(2))
    other = BareModel(container)
    container.update(canary_set(3), inactive=False)
    assert (seen(model), seen(other), seen(container)) == ({2.0}, {1.0}, {3.0})
    model.update(canary_set(4))
    assert seen(model) == {4.0}
    model.close()
    other.close()


def test_it_keeps_its_constants_and_gives_them_back_when_it_is_closed(load):
    weights = canary_set(2)
    model = BareModel(load("canary"), weights)
    kept = owners(weights["first"])
    model.update(canary_set(3))
    released = owners(weights["first"])
    model.close()
    assert kept == owners(torch.zeros(1)) + 1
    assert released == owners(torch.zeros(1))


def test_a_partial_set_is_refused(load):
    with pytest.raises(MissingWeightsError, match="lacks 'middle'"):
        BareModel(load("canary"), {"first": torch.zeros(16, 16)})


def test_a_model_that_folds_is_refused_since_nothing_would_fold_it(load):
    with pytest.raises(LoadError, match="a bare model never folds"):
        BareModel(load("folding"))


def test_a_container_without_weights_cannot_vouch_for_shapes(load):
    with pytest.raises(MissingWeightsError, match="give the container its weights first"):
        BareModel(load("weights_none"))


def test_a_failed_run_tells_the_root_cause_and_returns_the_inputs(load):
    model, ids = BareModel(load("failing")), torch.tensor([99])
    with pytest.raises(RunError, match="index out of bounds"):
        model.run([ids])
    assert owners(ids) == owners(torch.zeros(1))
    model.close()


def test_a_wrong_number_of_inputs_is_refused(load):
    model = BareModel(load("mlp"))
    with pytest.raises(InputMismatchError, match="expected 1 tensors, got 2"):
        model.run([torch.zeros(1, 8)] * 2)
    model.close()


def test_a_closed_model_refuses_and_closes_once(load):
    model = BareModel(load("mlp"))
    model.close()
    model.close()
    with pytest.raises(RunnerClosedError):
        model.run(build("mlp").args)
