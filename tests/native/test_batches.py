"""Batches on native lanes: the contract in every way there is; what is refused or goes wrong;
nothing lost in thousands.
"""

import contextlib
import gc
import sys
import time

import psutil
import pytest
import torch

from aoti_sched.backends.contracts import Work
from aoti_sched.backends.cpu import set_threads
from aoti_sched.backends.executors.batches import Batch
from aoti_sched.backends.executors.threads import ThreadsExecutor
from aoti_sched.backends.native import _native
from aoti_sched.backends.native import executor as native
from aoti_sched.backends.native.executor import NativeExecutor
from aoti_sched.model.batch_plan import BatchPlan, InputPlan, OutputPlan
from aoti_sched.queue.selection.placement import MOST_AHEAD
from tests.compiled.backends.batch_contract import (
    GatheringContract,
    StagingContract,
    batch_of,
    matrices,
    plan,
)
from tests.compiled.backends.executor_contract import FOREVER, collect
from tests.native.c_function import CFunction
from tests.native.c_model import CModel, Gated, handles
from tests.native.harness import collect as collect_native
from tests.native.harness import done, open_lanes
from tests.native.library import THROWS_STANDARD, Container, library
from tests.native.test_tensors import Tensor, directly, through_capsules


class OnNativeLanes:
    def open(self, lanes):
        return NativeExecutor("cpu", lanes, 2, set_threads)

    def container(self, function, *, inputs=1, outputs=1, own=lambda outputs: outputs):
        return CFunction(function, inputs, outputs, own)


class TestBatchesOnNativeLanes(OnNativeLanes, StagingContract):
    pass


class TestBatchesThroughCapsules(OnNativeLanes, StagingContract):
    """As with a torch that can't wrap a tensor for C++."""

    @pytest.fixture(autouse=True)
    def without(self, monkeypatch):
        monkeypatch.setattr(native, "WRAP", "a name that this torch has no function of")


class TestBatchesWithoutTheFunctionsOfTorch(OnNativeLanes, GatheringContract):
    """As with a torch that lacks one of the functions that lanes need for batches."""

    @pytest.fixture(autouse=True)
    def without(self, monkeypatch):
        monkeypatch.setattr(
            native, "SHIM", (*native.SHIM, "a_name_that_this_torch_has_no_function_of")
        )


class TestBatchesOnNativeStandIns(StagingContract):
    """Containers that C can't run."""

    def open(self, lanes):
        return NativeExecutor("cpu", lanes, 2, set_threads)


class TestBatchesOnThreadsOfCModels(OnNativeLanes, StagingContract):
    """Through ctypes where the native module is not built."""

    def open(self, lanes):
        return ThreadsExecutor("cpu", lanes, set_threads)


# --- real tensors, scripted models ----------------------------------------------------------------


@pytest.fixture
def executor():
    with contextlib.closing(NativeExecutor("cpu", 2, 2, set_threads)) as executor:
        yield executor


@pytest.fixture
def gated():
    gated = Gated()
    yield gated
    gated.open_gate()


def batch_work(model, *members, token=None):
    return Work(model, (), 1, token, batch_of(plan(), members))


def test_a_lane_puts_batches_together_and_takes_them_apart_while_python_holds_the_gil(executor):
    """Nothing here lets another thread have it before both works have run."""
    model = CModel()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(FOREVER)
    try:
        for _ in range(2):
            executor.submit(0, batch_work(model, *[[one] for one in matrices(1, 2)]))
        until = time.monotonic() + FOREVER
        while (model.script.runs < 2 or model.script.inside) and time.monotonic() < until:
            pass
        assert model.script.runs == 2
    finally:
        sys.setswitchinterval(interval)
    for completion in collect(executor, 2):
        assert [output.shape for (output,) in completion.outputs] == [(1, 3), (2, 3)]


def test_members_that_their_owner_forgets_meanwhile_are_kept_until_the_batch_is_over(
    executor, gated
):
    members = [[one] for one in matrices(1, 2)]
    values = [one.tolist() for (one,) in members]
    executor.submit(0, gated.work())
    gated.wait_until_inside()
    executor.submit(0, batch_work(CModel(), *members))
    for member in members:
        member.clear()
    members.clear()
    others = [torch.full((2, 3), -1.0) for _ in range(100)]  # where they would have been
    gated.open_gate()
    completion = collect(executor, 2)[1]
    assert [output.tolist() for (output,) in completion.outputs] == values
    del others


def test_two_batches_of_a_slot_may_be_given_to_one_lane_before_either_has_run(executor, gated):
    model = CModel(own=lambda outputs: [output.clone() for output in outputs])
    executor.submit(1, gated.work())
    executor.submit(0, batch_work(model, [torch.ones(2, 3)]))
    executor.submit(0, batch_work(model, [torch.zeros(2, 3)]))
    first, second = collect(executor, 2)
    assert first.outputs[0][0].tolist() == torch.ones(2, 3).tolist()
    assert second.outputs[0][0].tolist() == torch.zeros(2, 3).tolist()


def test_a_batch_that_a_lane_does_not_take_is_let_go(executor, gated):
    (one,) = matrices(2)
    executor.submit(0, gated.work())
    gated.wait_until_inside()
    for _ in range(MOST_AHEAD):
        executor.submit(0, batch_work(CModel(), [torch.ones(1, 3)]))
    with pytest.raises(
        RuntimeError, match=r"^device cpu: lane 0 is full or closed; nothing was submitted$"
    ):
        executor.submit(0, batch_work(CModel(), [one]))
    assert (handles(one), sys.getrefcount(one)) == (0, 2)
    gated.open_gate()
    assert len(collect(executor, 1 + MOST_AHEAD)) == 1 + MOST_AHEAD


@pytest.mark.parametrize("fault", [{"status": 1}, {"throws": THROWS_STANDARD}], ids=str)
@pytest.mark.parametrize("stolen", [0, 1])
def test_a_failed_batch_leaves_no_handle_behind(executor, fault, stolen):
    (one,) = matrices(2)
    work = batch_work(CModel(error=b"the kernel said no", stolen=stolen, **fault), [one])
    executor.submit(0, work)
    for completion in (*collect(executor, 1), executor.run_here(work)):
        assert str(completion.error) == "model 'scripted': the run failed: the kernel said no"
    assert handles(one) == 0


def test_memory_that_torch_does_not_have_fails_the_batch_with_torchs_words(executor):
    batch = Batch(plan(), [[torch.ones(1, 1 << 20)]], [1], 1 << 40, 0)
    completion = executor.run_here(Work(CModel(), (), 1, None, batch))
    assert "can't allocate memory" in str(completion.error) or "allocate" in str(completion.error)
    batch = Batch(plan(), [[torch.ones(1, 1 << 20)]], [1], 1 << 62, 0)
    completion = executor.run_here(Work(CModel(), (), 1, None, batch))
    assert str(completion.error).endswith("the run failed: a batch is larger than memory can be")


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ([InputPlan(2, (0, 1))], [OutputPlan(0)], "no such dimension as its rows'"),
        ([InputPlan(0, (0, 0))], [OutputPlan(0)], "must name each of its dimensions once"),
        ([InputPlan(0, (0, 1), (0,))], [OutputPlan(0)], "must be another than its rows'"),
        ([InputPlan(0, (0, 1), (2,))], [OutputPlan(0)], "must be another than its rows'"),
        ([InputPlan(0, tuple(range(65)))], [OutputPlan(0)], "too many dimensions"),
        ([InputPlan(0, (0, 1))], [], "not this model's"),
        ([InputPlan(0, (0, 1))] * 2, [OutputPlan(0)], "not this model's"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(executor, inputs, outputs, words):
    how = BatchPlan(tuple(inputs), tuple(outputs))
    batch = Batch(how, [[torch.ones(1, 3)] * len(inputs)], [1], 1, 0)
    with pytest.raises(ValueError, match=words):
        executor.submit(0, Work(CModel(), (), 1, None, batch))


def test_one_model_may_have_batches_of_several_plans_and_dtypes(executor):
    model = CModel(own=lambda outputs: [output.clone() for output in outputs])
    ragged = BatchPlan((InputPlan(0, (0, 1), (1,), 9),), (OutputPlan(0),))
    for dtype in (torch.float32, torch.int64, torch.float32):
        for how, widths in ((plan(), (3, 3)), (ragged, (1, 3))):
            members = [[torch.ones(1, width, dtype=dtype)] for width in widths]
            completion = executor.run_here(Work(model, (), 1, None, batch_of(how, members)))
            assert completion.error is None
            (first,), _ = completion.outputs
            assert first.tolist() == [[1] * widths[0] + [9] * (3 - widths[0])]
            assert first.dtype == dtype


def test_nothing_is_lost_in_ten_thousand_batches(executor):
    def use():
        process = psutil.Process()
        gc.collect()
        return process.memory_info().rss

    model = CModel(2, 2)
    failing = CModel(2, 2, status=1, stolen=1)
    how = BatchPlan((InputPlan(0, (0, 1)),) * 2, (OutputPlan(0),) * 2)
    detached = BatchPlan(how.inputs, how.outputs, detach_rows=True)
    inputs = [torch.ones(rows, 100) for rows in (1, 2, 5, 3)]
    members = [[one, one] for one in inputs]
    before = 0
    for n in range(10_000):
        batch = batch_of(how if n % 2 else detached, members)
        work = Work(failing if n % 5 == 0 else model, (), 1, n, batch)
        if n % 3:
            executor.run_here(work)
        else:
            executor.submit(n % 2, work)
            collect(executor, 1)
        if n == 3000:
            before = use()
    assert [handles(one) for one in inputs] == [0] * 4
    assert (executor._works, executor._members) == ({}, {})
    assert use() - before < 2 << 20


# --- a torch that refuses -------------------------------------------------------------------------


class TestRefusals:
    """The C library in torch's place, each of whose functions fails in turn."""

    @pytest.fixture(autouse=True)
    def c(self):
        gc.collect()
        before = library().live(), library().live_storages()
        yield library()
        library().refuse_torch_call(0)
        gc.collect()
        assert (library().live(), library().live_storages()) == before

    @pytest.fixture(params=[directly, through_capsules], ids=lambda way: way.__name__)
    def lanes(self, request):
        with contextlib.closing(open_lanes(tensors=request.param())) as lanes:
            yield lanes

    def plan(self, *, detach=False):
        names = (
            *(
                "get_data_ptr",
                "get_dim",
                "get_sizes",
                "get_strides",
                "get_dtype",
                "dtype_element_size",
            ),
            *("empty_strided", "reinterpret_tensor", "clone", "delete_tensor"),
        )
        shim = _native.Shim(**{name: library().address(f"torch_{name}") for name in names}, cpu=0)
        return _native.Plan(
            shim, [(0, (0, 1), (1,), {4: b"\x07" * 4})] * 2, [(0, [(1, 0, 1)])] * 2, detach
        )

    def model(self, **script):
        container = Container(**{"stolen": 3, "made": 3, **script})
        model = _native.Model(
            run=library().address("row_model_run"),
            container=container.address,
            num_inputs=2,
            num_outputs=2,
        )
        return model, container

    def members(self):
        return [
            [Tensor(library().new_matrix(rows, columns, 4, 5)) for _ in range(2)]
            for rows, columns in ((1, 2), (2, 3))
        ]

    @pytest.mark.parametrize("here", [True, False])
    @pytest.mark.parametrize("detach", [True, False])
    def test_each_call_that_is_refused_fails_its_batch_alone_and_nothing_is_lost(
        self, c, lanes, here, detach
    ):
        model, script = self.model()
        how, members = self.plan(detach=detach), self.members()
        refusals = 0
        while True:
            c.refuse_torch_call(refusals + 1)
            if here:
                one = done(lanes.run_batch_here(model, how, members, [1, 2], 4, refusals, 1))
            else:
                kept = lanes.submit_batch(0, 7, model, how, members, [1, 2], 4, refusals, 1)
                (one,) = collect_native(lanes, 1)
                del kept
            if one.error is None and all(
                output is not None for member in one.outputs[1] for output in member
            ):
                break
            refusals += 1
        assert refusals > 40
        whole, parts = one.outputs
        assert (whole == [None, None]) == detach
        for (rows, columns), outputs in zip(((1, 2), (2, 3)), parts, strict=True):
            assert all(c.is_matrix_of(output.handle, rows, columns, 6) for output in outputs)
        del script

    def test_the_words_name_the_function_and_torchs_own_reason(self, c, lanes):
        model, script = self.model()
        members = self.members()
        c.refuse_torch_call(1)
        one = done(lanes.run_batch_here(model, self.plan(), members, [1, 2], 3, 0, 1))
        assert one.error == ("aoti_torch_get_dtype() API call failed", "torch refused")
        assert script.runs == 0

    def test_a_function_of_torch_that_is_not_given_is_refused(self):
        with pytest.raises(ValueError, match="each function must be given"):
            _native.Shim(
                get_data_ptr=1,
                get_dim=1,
                get_sizes=1,
                get_strides=1,
                get_dtype=1,
                dtype_element_size=1,
                empty_strided=1,
                reinterpret_tensor=1,
                clone=0,
                delete_tensor=1,
                cpu=0,
            )
