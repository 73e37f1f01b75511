"""Containers against compiled models: results, refusals in place of crashes, weights, and
nothing leaked.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils import _pytree

from aoti_sched.backends.aoti.c_abi import Library
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.errors import (
    InputMismatchError,
    LoadError,
    MissingCapabilityError,
    MissingWeightsError,
    RunError,
    RunnerClosedError,
)
from tests.compiled.backends.conftest import heap_bytes, owners
from tests.models import build


def flat_inputs(name):
    built = build(name)
    return [
        leaf
        for leaf in _pytree.tree_leaves((built.args, dict(built.kwargs)))
        if torch.is_tensor(leaf)
    ]


def eager(name, *args):
    built = build(name)
    with torch.no_grad():
        return built.module()(*(args or built.args), **built.kwargs)


def canary_set(number):
    """A full set of the canary's constants, by FQN, each full of one number."""
    return {
        "first": torch.full((16, 16), float(number)),
        "middle": torch.full((64,), float(number)),
        "count": torch.full((3, 3), number),
        "last": torch.full((5, 7), float(number)),
    }


def seen(container):
    """The numbers that the canary finds in its constants as it runs."""
    return set(container.run(build("canary").args)[0].flatten().tolist())


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "unbounded",
        "conv",
        "attention",
        "dtypes",
        "scalars",
        "aliasing",
        "heavy",
        "parallel",
        "arrayref",
    ],
)
def test_a_run_gives_what_the_eager_module_gives(name, load):
    expected = _pytree.tree_leaves(eager(name))
    for run in (load(name).run, load(name).run_single_threaded):
        torch.testing.assert_close(run(flat_inputs(name)), expected)


@pytest.mark.parametrize("part", ["double", "square"])
def test_each_model_of_a_package_is_a_library_of_its_own(part, built):
    container = RawContainer(Library(built("pair").library(part)))
    definition = built("pair").part(part)
    torch.testing.assert_close(
        container.run(definition.args), [definition.module()(*definition.args)]
    )
    container.close()


def test_none_and_integers_among_the_outputs_come_back_as_none_and_0_dim_tensors(load):
    outputs = load("signature").run(flat_inputs("signature"))
    expected = _pytree.tree_leaves(eager("signature"), is_leaf=lambda leaf: leaf is None)
    assert outputs[3] is None
    assert outputs[4].shape == ()
    torch.testing.assert_close(outputs[:3] + outputs[4:], [*expected[:3], torch.tensor(2)])


@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_a_batch_may_be_of_any_size_that_was_compiled_for(rows, load):
    x = torch.randn(rows, 3)
    torch.testing.assert_close(load("unbounded").run([x]), [eager("unbounded", x)])


def test_an_output_that_is_an_input_is_the_same_tensor(load):
    x = torch.ones(4, 4)[0]
    assert load("aliasing").run([x])[2] is x


def test_a_mutating_model_carries_its_buffer_from_run_to_run(load):
    container = load("mutating")
    counts = [container.run([torch.zeros(16)])[0][0].item() for _ in range(3)]
    assert counts == [1, 2, 3]


def test_instances_run_side_by_side_and_each_result_is_right(load):
    container = load("mlp", instances=2)
    inputs = [torch.randn(1 + i % 64, 8) for i in range(400)]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda x: container.run([x]), inputs))
    module = build("mlp").module()
    for x, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(output, [module(x).detach()])


def test_a_run_leaves_the_callers_grad_mode_and_gradients_alone(load):
    x = torch.randn(2, 8, requires_grad=True)
    (y,) = load("mlp").run([x])
    assert torch.is_grad_enabled()
    assert x.grad is None
    assert not y.requires_grad


# --- refusals where the runtime would end the process ---------------------------------------------


def test_the_stock_runtime_dies_of_a_wrong_number_of_inputs(in_own_process):
    died = in_own_process("""
        container = load("unbounded")
        run = container.library.function("AOTInductorModelContainerRun")
        slots = (ctypes.c_void_p * 2)(*handles_of([torch.zeros(4, 3)] * 2))
        run(container._handle, slots, 2, (ctypes.c_void_p * 1)(), 1, None, None)
    """)
    assert died.returncode == -signal.SIGABRT
    assert "expected inputs vector size to be 1, but got 2" in died.stderr


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_inputs_is_refused_and_the_process_lives(count, in_own_process):
    lived = in_own_process(f"""
        container = load("unbounded")
        try:
            container.run([torch.zeros(4, 3)] * {count})
        except InputMismatchError as error:
            print(error)
        print(container.run([torch.zeros(4, 3)])[0].sum().item())
    """)
    assert lived.returncode == 0, lived.stderr
    assert f"expected 1 tensors, got {count}" in lived.stdout
    assert lived.stdout.endswith("0.0\n")


def test_the_stock_runtime_dies_of_a_run_without_weights(in_own_process):
    died = in_own_process("""
        container = load("weights_none")
        container._complete[0] = True
        container.run(build("weights_none").args)
    """)
    assert died.returncode == -signal.SIGSEGV


def test_a_run_without_weights_is_refused_and_the_process_lives(in_own_process):
    lived = in_own_process("""
        container = load("weights_none")
        try:
            container.run(build("weights_none").args)
        except MissingWeightsError as error:
            print(error)
    """)
    assert lived.returncode == 0, lived.stderr
    assert "'0.weight'" in lived.stdout or "0.weight" in lived.stdout


def test_the_stock_runtime_dies_of_a_partial_set_that_is_swapped_in(in_own_process):
    died = in_own_process("""
        container = load("canary")
        (handle,) = handles_of([torch.zeros(16, 16)])
        pairs = (ConstantEntry * 1)(ConstantEntry(b"first", handle))
        container.library.call(
            "AOTInductorModelContainerUpdateConstantBufferPairs",
            container._handle,
            pairs,
            1,
            True,
            False,
        )
        container.library.call("AOTInductorModelContainerSwapConstantBuffer", container._handle)
        container.run(build("canary").args)
    """)
    assert died.returncode == -signal.SIGSEGV


def test_a_partial_set_is_refused_and_so_is_its_swap(in_own_process):
    lived = in_own_process("""
        container = load("canary")
        for refused in (
            lambda: container.update({"first": torch.zeros(16, 16)}, inactive=True),
            lambda: container.swap(),
            lambda: container.fold(inactive=True),
        ):
            try:
                refused()
            except MissingWeightsError as error:
                print(error)
        container.run(build("canary").args)
    """)
    assert lived.returncode == 0, lived.stderr
    assert "lacks 'middle', 'last', 'count'" in lived.stdout
    assert "no full set of constants. Stage one before the swap" in lived.stdout
    assert "the buffer to fold lacks constants" in lived.stdout


def test_a_bad_index_within_a_parallel_region_ends_the_process_whatever_we_do(in_own_process):
    # Why `compile_package` compiles for one thread unless it is told otherwise.
    died = in_own_process("""
        container = load("parallel")
        ids = torch.zeros(4096, dtype=torch.int64)
        ids[7] = 99
        container.run([torch.zeros(1 << 16), ids])
    """)
    assert died.returncode == -signal.SIGABRT
    assert "index out of bounds" in died.stderr


def test_no_instances_are_refused(built):
    library = Library(built("mlp").library())
    with pytest.raises(LoadError, match="expected at least one instance"):
        RawContainer(library, instances=0)


def test_a_device_that_is_none_is_refused_in_the_runtimes_words(built):
    with pytest.raises(LoadError, match="Invalid device: abacus"):
        RawContainer(Library(built("mlp").library()), device="abacus")


def test_an_older_model_is_created_by_the_flag_for_the_cpu(built, monkeypatch):
    library = Library(built("mlp").library())
    lacking = "AOTInductorModelContainerCreateWithDevice"
    monkeypatch.setattr(library, "has", lambda name: name != lacking)
    container = RawContainer(library)
    torch.testing.assert_close(container.run(build("mlp").args), [eager("mlp")])
    container.close()


def test_a_closed_container_refuses_every_call_and_closes_once(load):
    container = load("mlp")
    container.close()
    container.close()
    for refused in (
        lambda: container.run(build("mlp").args),
        container.call_spec,
        container.swap if container._complete[1] else container.free_inactive,
    ):
        with pytest.raises(RunnerClosedError, match="closed"):
            refused()


# --- nothing leaks --------------------------------------------------------------------------------


def test_ten_thousand_failed_runs_lose_neither_handles_nor_memory(load, capfd):
    container, x = load("custom_op"), torch.zeros(4)

    def fail(times):
        for _ in range(times):
            with pytest.raises(RunError):
                container.run([x])
        capfd.readouterr()  # what the runtime prints is kept in memory

    fail(100)
    before = heap_bytes()
    fail(10_000)
    assert owners(x) == owners(torch.zeros(4))
    assert heap_bytes() - before < 10_000  # not one byte a run


def test_ten_thousand_rejected_runs_make_no_handle(load):
    container, x = load("scalars"), torch.zeros(())
    before = heap_bytes()
    for _ in range(10_000):
        with pytest.raises(InputMismatchError):
            container.run([x])
    assert owners(x) == owners(torch.zeros(()))
    assert heap_bytes() - before < 10_000


def test_runs_lose_no_memory(load):
    container, inputs = load("signature"), flat_inputs("signature")
    for _ in range(100):
        container.run(inputs)
    before = heap_bytes()
    for _ in range(10_000):
        container.run(inputs)
    assert heap_bytes() - before < 10_000


def test_updates_accepted_and_refused_lose_no_handle(load):
    container, weights, wrong = load("canary"), canary_set(2), canary_set(3)
    wrong["last"] = torch.zeros(7, 5)
    for _ in range(1000):
        container.update(weights, inactive=True)
        with pytest.raises(LoadError):
            container.update(wrong, inactive=True)
    assert {owners(tensor) for tensor in weights.values()} == {owners(torch.zeros(1))}
    assert {owners(tensor) for tensor in wrong.values()} == {owners(torch.zeros(1))}


def test_containers_created_and_closed_lose_no_memory(built):
    library = Library(built("mlp").library())

    def open_and_close(times):
        for _ in range(times):
            container = RawContainer(library, instances=2)
            container.update(container.extract(), inactive=True)
            container.close()

    open_and_close(20)
    before = heap_bytes()
    open_and_close(500)
    assert heap_bytes() - before < 50_000  # a set of weights is a thousand bytes


# --- what constants are ---------------------------------------------------------------------------


def test_constants_are_described_with_what_the_module_calls_them(load):
    constants = {c.spec.fqn: c for c in load("strided").constants}
    assert constants["transposed"].spec.shape == (3, 4)
    assert constants["transposed"].stride == (1, 3)
    assert constants["transposed"].spec.bytes == 48
    assert constants["image"].stride == (24, 1, 8, 2)
    assert constants["window"].spec.type == "buffer"
    assert constants["window"].spec.bytes == 12 * 4
    assert constants["empty"].spec.bytes == 0
    assert [c.spec.type for c in constants.values()].count("constant") == 1


def test_folded_constants_are_described_as_such(load):
    folded = [c.spec for c in load("folding").constants if c.spec.folded]
    assert [spec.type for spec in folded] == ["folded"]


def test_shapes_are_unknown_until_a_model_without_weights_has_some(load):
    container = load("weights_none")
    assert {c.spec.shape for c in container.constants} == {None}
    assert container.missing_constants() == ("0.weight", "0.bias", "1.weight")
    weights = dict(build("weights_none").module().named_parameters())
    container.update({c.spec.fqn: weights[c.spec.fqn] for c in container.constants}, inactive=False)
    assert {c.spec.shape for c in container.constants} == {(16, 4), (16,), (2, 16)}
    assert container.missing_constants() == ()


def test_extracted_constants_are_copies_that_outlive_the_container(load):
    container = load("canary")
    extracted = container.extract()
    extracted["last"].fill_(9)
    assert seen(container) == {1.0}
    container.close()
    assert torch.equal(extracted["middle"], torch.ones(64))


def test_a_model_that_cannot_tell_its_constants_is_trusted_to_have_them(built, monkeypatch):
    library = Library(built("mlp").library())
    lacking = "AOTInductorModelContainerExtractConstantsMap"
    monkeypatch.setattr(library, "has", lambda name: not name.startswith(lacking))
    container = RawContainer(library)
    torch.testing.assert_close(container.run(build("mlp").args), [eager("mlp")])
    assert {c.spec.shape for c in container.constants} == {None}
    container.close()


def test_extracting_from_a_model_that_cannot_is_a_missing_capability(load, monkeypatch):
    container = load("canary")

    def lacking(name):
        raise MissingCapabilityError(name)

    with monkeypatch.context() as patch:
        patch.setattr(container.library, "function", lacking)
        with pytest.raises(MissingCapabilityError, match="ExtractConstantsMapEntries"):
            container.extract()


# --- updates --------------------------------------------------------------------------------------


def test_what_is_staged_shows_after_the_swap_and_swapping_back_undoes_it(load):
    container = load("canary")
    container.update(canary_set(2), inactive=True)
    container.fold(inactive=True)
    assert seen(container) == {1.0}
    container.swap()
    assert seen(container) == {2.0}
    container.swap()
    assert seen(container) == {1.0}


def test_the_active_buffer_can_be_written_and_folded_in_place(load):
    container = load("canary")
    container.update(canary_set(2), inactive=False)
    container.fold(inactive=False)
    assert seen(container) == {2.0}


def test_part_of_a_set_may_be_written_over_a_full_one(load):
    container = load("canary")
    container.update(canary_set(2), inactive=True)
    container.update({"last": torch.full((5, 7), 3.0)}, inactive=True)
    container.swap()
    assert seen(container) == {2.0, 3.0}


def test_a_freed_buffer_is_empty_and_needs_a_full_set_again(load):
    container = load("canary")
    container.update(canary_set(2), inactive=True)
    container.free_inactive()
    assert container.extract(inactive=True) == {}
    assert set(container.missing_constants(inactive=True)) == set(canary_set(2))
    with pytest.raises(MissingWeightsError):
        container.update({"last": torch.zeros(5, 7)}, inactive=True)
    container.update(canary_set(3), inactive=True)
    container.swap()
    assert seen(container) == {3.0}


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("last", torch.zeros(5, 7, dtype=torch.float64), "wants float32, got float64"),
        ("last", torch.zeros(7, 5), r"wants shape \(5, 7\), got \(7, 5\)"),
        ("last", torch.zeros(5, 8), r"wants shape \(5, 7\), got \(5, 8\)"),
        ("last", torch.zeros(5, 7).to_sparse(), "wants a dense tensor, got torch.sparse_coo"),
        ("last", torch.zeros(5, 7, device="meta"), "wants a tensor on cpu, got one on meta"),
        ("count", torch.zeros(3, 3), "wants int64, got float32"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_before_anything_is_written(
    name, tensor, words, load
):
    container = load("canary")
    with pytest.raises(LoadError, match=f"constant {name!r} {words}"):
        container.update({**canary_set(2), name: tensor}, inactive=False)
    assert seen(container) == {1.0}


def test_an_unknown_constant_is_refused_with_the_ones_there_are(load):
    with pytest.raises(LoadError, match=r"no constant 'lost'\. It has: 'first', 'middle'"):
        load("canary").update({"lost": torch.zeros(1)}, inactive=False)


def test_a_folded_constant_cannot_be_written(load):
    container = load("folding")
    (folded,) = [c.spec.fqn for c in container.constants if c.spec.folded]
    with pytest.raises(LoadError, match="computed from other constants"):
        container.update({folded: torch.zeros(4, 4)}, inactive=False)


def test_folded_constants_follow_the_set_they_are_folded_from(load):
    container, module = load("folding"), build("folding").module()
    with torch.no_grad():
        module.weight.mul_(2)
    args = build("folding").args
    container.update(dict(module.named_parameters()), inactive=True)
    container.fold(inactive=True)
    torch.testing.assert_close(container.run(args), [eager("folding")])
    container.swap()
    torch.testing.assert_close(container.run(args), [module(*args).detach()])


def test_constants_given_in_any_layout_arrive_in_the_compiled_one(load):
    container, module = load("strided"), build("strided").module()
    big = torch.randn(100)
    new = {
        "transposed": torch.randn(3, 4),  # compiled as a transpose
        "image": torch.randn(1, 2, 3, 4),  # compiled channels-last
        "window": big[10:34:2],  # strided, at an offset
        "empty": torch.zeros(0, 3),
    }
    module.load_state_dict(new)
    container.update(new, inactive=True)
    container.swap()
    args = build("strided").args
    torch.testing.assert_close(container.run(args), [module(*args).detach()])
    assert container.extract()["transposed"].stride() == (1, 3)


def test_what_the_compiler_made_is_carried_over_to_a_new_set(load):
    container = load("strided")
    (made,) = [c.spec.fqn for c in container.constants if c.spec.type == "constant"]
    container.update(build("strided").module().state_dict(), inactive=True)
    container.swap()
    assert torch.equal(container.extract()[made], build("strided").module().plain)


def test_user_managed_constants_are_read_where_they_lie(load):
    container, weights = load("canary"), canary_set(2)
    container.update(weights, inactive=False, user_managed=True)
    assert seen(container) == {2.0}
    for tensor in weights.values():
        tensor.fill_(3)
    assert seen(container) == {3.0}


def test_user_managed_constants_live_as_long_as_their_container(load):
    container = load("canary")
    container.update(canary_set(2), inactive=False, user_managed=True)
    torch.full((16, 16), 9.0)  # would take the freed memory
    assert seen(container) == {2.0}


def test_a_user_managed_constant_must_lie_as_it_was_compiled(load):
    container, module = load("strided"), build("strided").module()
    weights = {**module.state_dict(), "transposed": torch.randn(3, 4)}
    with pytest.raises(
        LoadError, match=r"'transposed' can only be user managed as a tensor of strides \(1, 3\)"
    ):
        container.update(weights, inactive=False, user_managed=True)


def test_constants_may_come_from_the_cpu_whatever_the_device(load):
    container = load("canary")
    container.update(canary_set(2), inactive=True, from_cpu=True)
    container.swap()
    assert seen(container) == {2.0}


# --- weights that are not in the library ----------------------------------------------------------


@pytest.mark.parametrize("name", ["weights_none", "weights_pickle"])
def test_a_model_compiled_without_weights_runs_once_it_has_a_full_set(name, load):
    container = load(name, instances=2)
    weights = dict(build(name).module().named_parameters())
    container.update({fqn: weights[fqn] for fqn in container.missing_constants()}, inactive=False)
    for _ in range(3):
        torch.testing.assert_close(container.run(build(name).args), [eager(name)])


def test_a_wrong_shape_for_an_unknown_one_is_found_out_and_the_buffer_stays_unused(load):
    container, weights = (
        load("weights_none"),
        dict(build("weights_none").module().named_parameters()),
    )
    full = {fqn: weights[fqn] for fqn in container.missing_constants()}
    with pytest.raises(LoadError, match=r"'0.weight' wants shape \(16, 4\), got \(4, 16\)"):
        container.update({**full, "0.weight": torch.zeros(4, 16)}, inactive=False)
    with pytest.raises(MissingWeightsError):
        container.run(build("weights_none").args)
    container.update(full, inactive=False)
    torch.testing.assert_close(container.run(build("weights_none").args), [eager("weights_none")])


def test_a_tensor_too_large_for_an_unknown_shape_is_refused_before_it_is_written(load):
    container, weights = (
        load("weights_none"),
        dict(build("weights_none").module().named_parameters()),
    )
    full = {fqn: weights[fqn] for fqn in container.missing_constants()}
    with pytest.raises(LoadError, match=r"'0.weight' wants at most 256 bytes, got 4096"):
        container.update({**full, "0.weight": torch.zeros(32, 32)}, inactive=False)


def weights_file():
    (blob,) = build("weights_blob").library().parent.glob("*_weights.blob")
    return blob


def test_weights_in_a_file_are_loaded_once_for_all_instances(load):
    container = load("weights_blob", instances=2)
    container.update_from_blob(weights_file())
    for _ in range(3):
        torch.testing.assert_close(
            container.run(build("weights_blob").args), [eager("weights_blob")]
        )
    with pytest.raises(LoadError, match="has its weights already"):
        container.update_from_blob(weights_file())


def test_a_weights_file_of_another_size_is_refused(load, tmp_path):
    short = tmp_path / "short.blob"
    short.write_bytes(weights_file().read_bytes()[:-64])
    container = load("weights_blob")
    with pytest.raises(
        LoadError, match=r"expected a weights file of \d+ bytes, but .*short.blob has \d+"
    ):
        container.update_from_blob(short)


def test_a_model_with_weights_of_its_own_takes_no_weights_file(load):
    with pytest.raises(LoadError, match="not compiled to have its weights in a file"):
        load("mlp").update_from_blob(weights_file())
