"""Models that a torch before 2.13 compiled are updated through their C++ map of constants.

`older.py` plays their libraries.
"""

from __future__ import annotations

import re
import sys

import pytest
import torch

from aoti_sched.backends import cpu
from aoti_sched.backends.aoti.constant_map import misplaces
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.contracts import LoadRequest
from aoti_sched.backends.cpu import CpuDevice
from aoti_sched.errors import LoadError, MissingCapabilityError, MissingWeightsError
from tests.compiled.backends.conftest import heap_bytes, owners
from tests.compiled.backends.older import NATIVE, OlderLibrary, with_maps
from tests.compiled.backends.test_raw_container import canary_set, eager, seen
from tests.models import build


@pytest.fixture(params=["2.8", "2.12"])
def compiled_by(request, monkeypatch):
    """The torch that compiled the models: the first that lets constants be read, and the last
    that knows only maps.
    """
    monkeypatch.setattr(OlderLibrary, "compiled_by", request.param)
    return request.param


@pytest.fixture
def load_older():
    """`load_older("canary")`: a container of a model that an older torch compiled."""
    opened = []

    def load_older(name: str) -> RawContainer:
        opened.append(RawContainer(OlderLibrary(build(name).library())))
        return opened[-1]

    yield load_older
    for container in opened:
        container.close()


@pytest.fixture
def without_native(monkeypatch):
    """As after an install without a compiler: importing the compiled module fails."""
    monkeypatch.setitem(sys.modules, NATIVE, None)


# --- a container ----------------------------------------------------------------------------------


@with_maps
def test_each_way_to_write_and_read_does_what_it_does_with_pairs(load, load_older, compiled_by):
    new, older = load("canary"), load_older("canary")
    steps = [
        lambda one: one.update(canary_set(2), inactive=True),
        lambda one: one.swap(),
        lambda one: one.update(canary_set(3), inactive=True),
        lambda one: one.update({"last": torch.full((5, 7), 4.0)}, inactive=True),  # over a full set
        lambda one: one.swap(),
        lambda one: one.swap(),
        lambda one: one.update(canary_set(5), inactive=False),
        lambda one: one.free_inactive(),
        lambda one: one.update(canary_set(6), inactive=True),
        lambda one: one.fold(inactive=True),
        lambda one: one.swap(),
    ]
    shown = []
    for step in steps:
        for one in (new, older):
            step(one)
        assert seen(older) == seen(new)
        shown.append(seen(older))
        for inactive in (False, True):
            expected, extracted = new.extract(inactive=inactive), older.extract(inactive=inactive)
            assert list(extracted) == list(expected)
            for fqn, tensor in expected.items():
                assert torch.equal(extracted[fqn], tensor)
        assert older.constants == new.constants
        assert older.missing_constants(inactive=True) == new.missing_constants(inactive=True)
        assert len(older.constant_memory(inactive=True)) == len(new.constant_memory(inactive=True))
    assert shown == [
        {1.0},
        {2.0},
        {2.0},
        {2.0},
        {3.0, 4.0},
        {2.0},
        {5.0},
        {5.0},
        {5.0},
        {5.0},
        {6.0},
    ]


@with_maps
def test_folded_constants_follow_their_set(load_older, compiled_by):
    container, module, args = (
        load_older("folding"),
        build("folding").module(),
        build("folding").args,
    )
    with torch.no_grad():
        module.weight.mul_(2)
    container.update(dict(module.named_parameters()), inactive=True)
    container.fold(inactive=True)
    torch.testing.assert_close(container.run(args), [eager("folding")])
    container.swap()
    torch.testing.assert_close(container.run(args), [module(*args).detach()])
    container.swap()
    torch.testing.assert_close(container.run(args), [eager("folding")])


@with_maps
def test_any_layout_arrives_and_what_the_compiler_made_is_carried_over(load_older, compiled_by):
    container, module, args = (
        load_older("strided"),
        build("strided").module(),
        build("strided").args,
    )
    new = {
        **module.state_dict(),
        "transposed": torch.randn(3, 4),
        "window": torch.randn(30)[2:26:2],
    }
    module.load_state_dict(new)
    container.update(new, inactive=True)
    container.swap()
    torch.testing.assert_close(container.run(args), [module(*args).detach()])
    (made,) = [c.spec.fqn for c in container.constants if c.spec.type == "constant"]
    assert torch.equal(container.extract()[made], module.plain)


@with_maps
def test_a_model_without_weights_gets_them(load_older, compiled_by):
    container, weights = (
        load_older("weights_none"),
        dict(build("weights_none").module().named_parameters()),
    )
    assert container.missing_constants() == ("0.weight", "0.bias", "1.weight")
    with pytest.raises(MissingWeightsError):
        container.run(build("weights_none").args)
    full = {fqn: weights[fqn] for fqn in container.missing_constants()}
    with pytest.raises(LoadError, match=r"'0.weight' wants shape \(16, 4\), got \(4, 16\)"):
        container.update({**full, "0.weight": torch.zeros(4, 16)}, inactive=False)
    container.update(full, inactive=False)
    torch.testing.assert_close(container.run(build("weights_none").args), [eager("weights_none")])


@with_maps
def test_user_managed_constants_are_read_where_they_lie(load_older, compiled_by):
    container, weights = load_older("canary"), canary_set(2)
    container.update(weights, inactive=False, user_managed=True)
    for tensor in weights.values():
        tensor.fill_(3)
    assert seen(container) == {3.0}


@with_maps
def test_a_thousand_updates_and_extractions_lose_neither_handles_nor_memory(
    load_older, compiled_by
):
    container, weights, wrong = load_older("canary"), canary_set(2), canary_set(3)
    wrong["last"] = torch.zeros(7, 5)

    def work(times):
        for _ in range(times):
            container.update(weights, inactive=True)
            container.swap()
            container.extract(inactive=True)
            with pytest.raises(LoadError):
                container.update(wrong, inactive=True)

    work(100)
    before = heap_bytes()
    work(1000)
    assert {owners(tensor) for tensor in (*weights.values(), *wrong.values())} == {
        owners(torch.zeros(1))
    }
    assert heap_bytes() - before < 10_000  # a set is 2,000 bytes
    assert seen(container) == {2.0}


@with_maps
def test_a_set_that_the_runtime_refuses_leaves_its_handles_with_us(load_older, compiled_by, capfd):
    container, weights = load_older("canary"), canary_set(2)
    del weights["first"]
    ready = container.prepared(weights, full=False)
    before = [owners(tensor) for _, tensor in ready]
    with pytest.raises(LoadError, match="UpdateConstantBuffer failed"):
        container._write("UpdateConstantBufferPairs", ready, inactive=True, full=True)
    assert "Cannot find constants first" in capfd.readouterr().err
    assert [owners(tensor) for _, tensor in ready] == before
    assert seen(container) == {1.0}


@with_maps
def test_code_that_would_write_constants_to_the_wrong_place_is_not_called(load_older, compiled_by):
    container = load_older("folding")
    container._constants = tuple(reversed(container.constants))  # as if the folded one came first
    with pytest.raises(
        MissingCapabilityError, match=r"after a folded constant to the wrong place .*#179225"
    ):
        container.update(dict(build("folding").module().named_parameters()), inactive=True)
    assert not container.ready(inactive=True)


def test_newer_code_may_have_its_constants_in_any_order(load):
    container = load("folding")
    assert not misplaces(container.constants)
    container._constants = tuple(reversed(container.constants))
    assert misplaces(container.constants)
    assert container.why_not_updatable == ""


# --- without the native module --------------------------------------------------------------------


def test_newer_models_need_no_map(without_native, load):
    container = load("canary")
    container.update(canary_set(2), inactive=True)
    container.swap()
    assert (seen(container), container.why_not_updatable) == ({2.0}, "")


def test_without_maps_an_older_model_runs_and_says_what_its_updates_need(
    without_native, load_older, compiled_by
):
    container = load_older("canary")
    assert seen(container) == {1.0}
    for refused in (
        lambda: container.update(canary_set(2), inactive=True),
        lambda: container.update(canary_set(2), inactive=False),
    ):
        with pytest.raises(
            MissingCapabilityError, match=r"C\+\+ map, .* install a compiler \(g\+\+\)"
        ):
            refused()
    with pytest.raises(MissingCapabilityError):
        container.extract()
    assert seen(container) == {1.0}


@pytest.mark.parametrize("compiler", ["2.2", "2.7"])
def test_a_model_whose_constants_can_not_be_read_is_not_updated(compiler, load_older, monkeypatch):
    monkeypatch.setattr(OlderLibrary, "compiled_by", compiler)
    container = load_older("canary")
    assert seen(container) == {1.0}
    with pytest.raises(LoadError):
        container.update(canary_set(2), inactive=True)
    lacking = (
        r"\w+UpdateConstantBufferPairs \(torch 2\.13\), \w+ExtractConstantsMapEntries \(torch "
        r"2\.13\); "
    )
    assert re.match(
        f"an older torch compiled it, and its library lacks {lacking}", container.why_not_updatable
    )


# --- a device's container -------------------------------------------------------------------------


@pytest.fixture
def older_models(monkeypatch, compiled_by):
    """All models that are loaded were compiled by an older torch."""
    monkeypatch.setattr(cpu, "Library", OlderLibrary)


@pytest.fixture
def load_device(tmp_path):
    opened = []

    def load_device(name: str):
        request = LoadRequest(
            name=name,
            path=build(name).path,
            model_name=None,
            instances=2,
            sha256=None,
            cache_dir=tmp_path,
        )
        device = CpuDevice()
        opened.append(device.load(device.inspect(request)))
        return opened[-1]

    yield load_device
    for container in opened:
        container.close()


@with_maps
def test_a_part_is_merged_and_a_failed_fold_is_undone(older_models, load_device):
    container, module = load_device("folding"), build("folding").module()
    args = build("folding").args
    assert container.updatable == ""
    weight = module.weight.detach() * 3
    container.stage({"weight": weight}, partial=True)
    container.rebuild()  # as after a fold that failed
    torch.testing.assert_close(container.run_raw(args), [eager("folding")])
    container.stage({"weight": weight}, partial=True)
    container.fold()
    container.swap()
    with torch.no_grad():
        module.weight.copy_(weight)
    torch.testing.assert_close(container.run_raw(args), [module(*args).detach()])


@with_maps
def test_outputs_that_are_weights_are_copies(older_models, load_device):
    container, module = load_device("aliasing"), build("aliasing").module()
    for output in container.run_raw([torch.zeros(4)]):
        output.add_(1)
    torch.testing.assert_close(container.run_raw([torch.zeros(4)]), list(module(torch.zeros(4))))


@with_maps
@pytest.mark.parametrize("name", ["weights_pickle", "weights_blob"])
def test_weights_beside_the_library_are_loaded(name, monkeypatch, load_device):
    monkeypatch.setattr(cpu, "Library", OlderLibrary)  # of torch 2.12: blobs came after 2.8
    torch.testing.assert_close(load_device(name).run_raw(build(name).args), [eager(name)])
