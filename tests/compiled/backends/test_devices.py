"""Devices whose runs go on streams, over the simulated one: the contracts, and in what order
things happen.

After every test the device is asked whether a rule was broken (`tests/native/simulated_cuda.h`
lists them).
"""

import gc
import importlib
import json
import pickle
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import msgspec
import pytest
import torch

from aoti_sched.backends import devices
from aoti_sched.backends.accelerators import cuda_driver
from aoti_sched.backends.accelerators.pinned import MOST_BYTES, pinned_bytes
from aoti_sched.backends.accelerators.slot import Slot
from aoti_sched.backends.accelerators.xpu import POOL
from aoti_sched.backends.aoti import proxy_executor
from aoti_sched.backends.aoti import stock_runner as stock
from aoti_sched.backends.aoti.container import CAbiContainer
from aoti_sched.backends.aoti.handles import capsule_of
from aoti_sched.backends.aoti.opened_files import OpenFiles
from aoti_sched.backends.aoti.packaged_weights import load_weights
from aoti_sched.backends.aoti.raw_constants import _groups
from aoti_sched.backends.contracts import LoadRequest, Work
from aoti_sched.backends.cpu import CpuDevice
from aoti_sched.backends.executors.batches import Batch
from aoti_sched.errors import (
    ConfigError,
    DeviceLostError,
    LoadError,
    MissingCapabilityError,
    PlatformMismatchError,
    RunError,
    RunnerClosedError,
)
from aoti_sched.model.batch_plan import BatchPlan, InputPlan, OutputPlan
from aoti_sched.model.specs import DynamicDim, ModelSpec, TensorSpec
from aoti_sched.package import Extracted, StoredWeight
from tests.compiled.backends.batch_contract import GatheringContract
from tests.compiled.backends.executor_contract import ExecutorContract, Function, collect
from tests.compiled.backends.simulation import (
    HOW,
    KINDS,
    OnDevice,
    Slots,
    lanes_of,
    launch,
    load,
    needs_native,
    on_device,
    open_device,
    open_executor,
    work,
)
from tests.native.simulated import model_path, simulator


@pytest.fixture(autouse=True)
def on_the_simulated_device(sim):
    """Before all else of a test, and after it."""


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def device(kind):
    return open_device(kind)


@pytest.fixture
def cuda():
    return open_device("cuda")


# --- the contracts --------------------------------------------------------------------------------


class OnSimulatedDevice:
    kind: str

    @pytest.fixture(autouse=True)
    def slots(self, monkeypatch):
        self.device = open_device(self.kind)
        slots = Slots(self.device, 1, 4, copy_inputs=True, copy_outputs="cpu")

        def run_work(function, work):
            with slots.slots[0].run(work):
                return function.run_raw(work.inputs)

        monkeypatch.setattr(Function, "run_work", run_work)
        self.slots = slots
        yield
        slots.close()
        del self.device, self.slots  # pytest keeps this object

    @property
    def lanes(self):
        return lanes_of(self.kind)

    def open(self, lanes):
        return self.device.open_executor(lanes)

    def container(self, function, *, inputs=1, outputs=1, own=lambda outputs: outputs):
        return OnDevice(self.device, self.slots.slots, function, inputs, outputs, own)


class TestCudasExecutor(OnSimulatedDevice, ExecutorContract):
    kind = "cuda"


@needs_native
class TestCudasLaunchers(OnSimulatedDevice, ExecutorContract):
    """One thread for all lanes."""

    kind = "cuda"

    def open(self, lanes):
        return self.device.open_executor(lanes, launchers=1)


class TestXpusExecutor(OnSimulatedDevice, ExecutorContract):
    kind = "xpu"


class TestMpssExecutor(OnSimulatedDevice, ExecutorContract):
    kind = "mps"


class Batches(OnSimulatedDevice, GatheringContract):
    """Members lie on the host, are put together there and brought as one; what comes back is at
    home again.
    """

    test_an_error_fails_the_whole_batch_and_is_followed_by_the_next = (
        None  # `4 in x` reads what is on the device
    )
    test_outputs_are_let_go_with_the_completion = (
        None  # what the function made is on the device, and its members' parts are not
    )
    test_memory_that_an_output_shares_is_given_up_and_never_written_again = (
        None  # what comes home shares nothing
    )
    test_views_of_different_members_share_one_output = None
    test_detached_rows_are_copies_and_free_the_whole = None
    test_outputs_are_what_the_container_makes_its_own = None  # its weights lie on the host


class TestBatchesOnCuda(Batches):
    kind = "cuda"


@needs_native
class TestBatchesOfALauncher(Batches):
    kind = "cuda"

    def open(self, lanes):
        return self.device.open_executor(lanes, launchers=1)


class TestBatchesOnXpu(Batches):
    kind = "xpu"


class TestBatchesOnMps(Batches):
    kind = "mps"


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", [None, "cpu"])
@pytest.mark.parametrize("inputs", ["host", "device"])
def test_a_run_gives_its_outputs_where_they_are_wanted(device, executors, loaded, inputs, home):
    container = loaded(device, copy_inputs=True, copy_outputs=home)
    executor = executors(device)
    x = torch.arange(12.0).reshape(3, 4)
    executor.submit(0, work(container, x if inputs == "host" else x.to("sim"), token="mine"))
    (completion,) = collect(executor, 1)
    assert (completion.token, completion.error) == ("mine", None)
    (y,) = completion.outputs
    assert y.device.type == ("cpu" if home else "sim")
    assert torch.equal(y.cpu(), x)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (3000, 4)], ids=str)
def test_inputs_of_any_size_are_brought_and_taken_home(device, executors, loaded, shape):
    container = loaded(device, copy_inputs=True, copy_outputs="cpu")
    executor = executors(device)
    for _ in range(2):
        x = torch.rand(shape)
        executor.submit(0, work(container, x))
        (completion,) = collect(executor, 1)
        assert torch.equal(completion.outputs[0], x)


def test_a_run_here_waits_for_the_device(device, executors, loaded):
    container = loaded(device, copy_inputs=True, copy_outputs="cpu")
    completion = executors(device).run_here(work(container, torch.ones(2, 4)))
    assert completion.outputs[0].tolist() == [[1.0] * 4] * 2


def test_a_model_that_fails_says_why_and_the_next_run_goes_on(device, executors, loaded):
    container = loaded(device)  # without copy_inputs, and nobody checked the input
    executor = executors(device)
    executor.submit(0, work(container, torch.ones(2, 4)))
    (failed,) = collect(executor, 1)
    assert isinstance(failed.error, RunError)
    assert "an input is not on the device" in str(failed.error)
    executor.submit(0, work(container, on_device(2, 4)))
    (completion,) = collect(executor, 1)
    assert completion.outputs[0].cpu().tolist() == [[1.0] * 4] * 2


def test_memory_that_the_device_does_not_have_fails_its_run_alone(cuda, executors, loaded, sim):
    container = loaded(cuda, copy_inputs=True)
    executor = executors(cuda)
    sim.empty_cache()
    sim.memory_limit(sim.reserved() + 1024)
    executor.submit(0, work(container, torch.ones(1000, 4)))
    (failed,) = collect(executor, 1)
    assert isinstance(failed.error, (RunError, torch.OutOfMemoryError))
    assert "out of memory" in str(failed.error)
    assert cuda.lost() == ""
    sim.memory_limit(0)
    executor.submit(0, work(container, torch.ones(1000, 4)))
    assert collect(executor, 1)[0].error is None


@pytest.mark.parametrize("where", ["host", "device", "both"])
def test_batches_are_put_together_wherever_their_members_lie(device, executors, loaded, where):
    container = loaded(device, copy_inputs=True)
    executor = executors(device)
    plan = BatchPlan((InputPlan(0, (0, 1)),), (OutputPlan(0),))
    members = [torch.full((rows, 4), float(rows)) for rows in (1, 2, 3)]
    there = [
        m.to("sim") if where == "device" or (where == "both" and m.shape[0] == 2) else m
        for m in members
    ]
    batch = Batch(plan, [container.capture_stream([member]) for member in there], [1, 2, 3], 8, 0)
    for _ in range(2):
        executor.submit(0, Work(container, (), 1, None, batch))
        (completion,) = collect(executor, 1)
        assert completion.error is None
        for (output,), member in zip(completion.outputs, members, strict=True):
            assert torch.equal(output.cpu(), member)


@needs_native
def test_a_launcher_gives_the_device_the_work_of_several_lanes_and_waits_for_none(
    cuda, loaded, sim
):
    container = loaded(cuda, instances=3, copy_inputs=True, copy_outputs="cpu")
    executor = cuda.open_executor(3, launchers=1)
    sim.hold()
    for slot in range(3):
        executor.submit(
            slot, work(container, torch.full((2, 4), float(slot)), slot=slot, token=slot)
        )
    sim.wait_until_pending(9)  # each copies, runs, and copies back
    assert (sim.waiting(), executor.drain()) == (0, [])
    sim.go()
    for completion in collect(executor, 3):
        assert completion.outputs[0].unique().tolist() == [float(completion.token)]
    executor.submit(0, work(container, torch.ones(2, 4), slot=0))
    assert len(collect(executor, 1)) == 1
    sim.hold()
    for slot in range(3):
        executor.submit(slot, work(container, torch.ones(2, 4), slot=slot))
    sim.wait_until_pending(9)
    sim.go()
    executor.close()  # waits for them
    assert len(executor.drain()) == 3


@needs_native
def test_a_launcher_tells_of_failures_and_of_a_device_that_breaks(cuda, loaded, sim):
    container = loaded(cuda, instances=2)
    executor = cuda.open_executor(2, launchers=1)
    executor.submit(0, work(container, torch.ones(2, 4)))  # nobody checked the input
    (failed,) = collect(executor, 1)
    assert "an input is not on the device" in str(failed.error)
    x = on_device(2, 4)
    ready = [work(container, x, slot=slot) for slot in range(2)]
    sim.hold()
    for slot in range(2):
        executor.submit(slot, ready[slot])
    sim.wait_until_pending(4)  # each waits for its inputs and runs
    sim.break_device()
    sim.go()
    assert {type(completion.error) for completion in collect(executor, 2)} == {DeviceLostError}
    executor.close()


@needs_native
def test_launchers_are_refused_where_nobody_can_be_asked(device, kind, monkeypatch):
    if kind == "cuda":
        monkeypatch.setenv("AOTI_SCHED_EXECUTOR", "threads")
    words = (
        "and AOTI_SCHED_EXECUTOR=threads" if kind == "cuda" else "and a device that can be polled"
    )
    with pytest.raises(ConfigError, match=f"launchers=1 needs native lanes, {words}"):
        device.open_executor(1, launchers=1)
    with pytest.raises(ConfigError, match="launchers=2, but a run on a CPU is its thread's work"):
        CpuDevice().open_executor(2, launchers=2)


# --- in what order things happen ------------------------------------------------------------------


def test_inputs_are_held_until_the_device_is_done_with_them(cuda, executors, loaded, sim):
    """The model lets go of them when it has launched, and their memory is of another stream's
    pool.
    """
    container = loaded(cuda)
    executor = executors(cuda)
    x = on_device(64, 4)
    sim.synchronize()
    sim.hold()
    in_use = sim.allocated()
    executor.submit(0, work(container, x))
    del x
    sim.wait_until_waiting(1)  # launched, and the lane waits for the device
    assert sim.allocated() > in_use  # the output is there, and the input still is
    sim.go()
    assert collect(executor, 1)[0].error is None


def test_a_completion_comes_when_the_device_is_done_and_not_before(device, executors, loaded, sim):
    container = loaded(device)
    executor = executors(device)
    x = on_device(2, 4)
    sim.synchronize()
    sim.hold()
    executor.submit(0, work(container, x))
    sim.wait_until_waiting(1)
    assert executor.drain() == []
    while sim.step():
        pass
    assert collect(executor, 1)[0].error is None


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_run_waits_for_what_the_callers_stream_was_given_before(device, executors, loaded, sim):
    container = loaded(device)
    executor = executors(device)
    x = on_device(2, 4)
    other = device.open_stream()
    sim.synchronize()
    sim.hold()
    before = sim.kernels()
    with other.current():
        launch(other.handle, writes=[x])
        one = work(container, x)
    executor.submit(0, one)
    sim.wait_until_waiting(1)
    assert sim.kernels() == before
    sim.go()
    assert collect(executor, 1)[0].error is None
    other.close()


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_outputs_are_recorded_on_the_callers_stream(device, executors, loaded, sim):
    """Their memory is of the slot's pool: given back while the caller's kernel still reads it,
    it would be the next run's.
    """
    container = loaded(device)
    executor = executors(device)
    mine = device.open_stream()
    with mine.current():
        x = on_device(2, 4)
        executor.submit(0, work(container, x))
    (completion,) = collect(executor, 1)
    sim.hold()
    launch(mine.handle, reads=completion.outputs)
    del completion
    sim.go()
    sim.synchronize()
    mine.close()


def test_each_slot_has_a_stream_that_no_other_has(cuda, loaded, sim):
    first, second = loaded(cuda, instances=3), loaded(cuda, instances=2)
    handles = [slot.stream.handle for one in (first, second) for slot in one._slots]
    assert len(set(handles)) == 5
    assert 0 not in handles


def test_a_models_streams_have_its_priority(cuda, loaded, sim):
    first, second = loaded(cuda, stream_priority=-2), loaded(cuda)
    assert [sim.priority(one._slots[0].stream.handle) for one in (first, second)] == [-2, 0]


@pytest.mark.parametrize("variable", [None, "32"])
def test_more_streams_than_the_device_has_queues_are_noted(cuda, loaded, monkeypatch, variable):
    if variable:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", variable)
    else:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    first = loaded(cuda, instances=8)
    second = loaded(cuda)
    told = [
        any("streams that share a queue wait" in note for note in one.info.notes)
        for one in (first, second)
    ]
    assert told == [False, variable is None]
    second.close()
    first.close()
    assert cuda.slots == 0


def test_slots_run_beside_each_other_on_their_streams(cuda, executors, loaded, sim):
    container = loaded(cuda, instances=2)
    executor = executors(cuda)
    x = on_device(2, 4)
    sim.synchronize()
    sim.hold()
    for slot in range(2):
        executor.submit(slot, work(container, x, slot=slot))
    sim.wait_until_waiting(2)
    assert all(sim.pending(slot.stream.handle) for slot in container._slots)
    sim.go()
    assert [one.error for one in collect(executor, 2)] == [None, None]


def test_streams_and_pinned_memory_are_given_back(cuda, executors, loaded, sim):
    before = sim.streams(), sim.pinned()
    container = loaded(cuda, instances=2, copy_inputs=True, copy_outputs="cpu")
    executor = executors(cuda)
    executor.submit(0, work(container, torch.ones(2, 4)))
    collect(executor, 1)
    assert sim.streams() == before[0] + 3
    container.close()
    assert (sim.streams(), sim.pinned()) == before


@needs_native
@pytest.mark.parametrize("most", [200, None], ids=["bounded", "unbounded"])
def test_pinned_memory_for_the_largest_sizes_is_made_at_load(cuda, executors, sim, tmp_path, most):
    """To make it holds up the run that needs it, and may wait for the device."""
    x = TensorSpec("x", "float32", (DynamicDim("n", 1, most), 4), "sim", order=(0, 1))
    request = LoadRequest(
        name="times",
        path=model_path(),
        model_name=None,
        instances=2,
        sha256=None,
        cache_dir=tmp_path,
        copy_inputs=True,
        copy_outputs="cpu",
    )
    spec = ModelSpec(inputs=(x,), outputs=(x,), parameters=("x",), torch_version="2.13")
    inspected = msgspec.structs.replace(cuda.inspect(request), own=spec)
    before = sim.pinned(), sim.pinned_ever()
    container = cuda.load(inspected)
    assert sim.pinned() - before[0] == (0 if most is None else 4)
    made = sim.pinned_ever()
    executor = cuda.open_executor(1)
    for slot in range(2):
        for rows in (1, 20, 200):
            executor.submit(0, work(container, torch.ones(rows, 4), slot=slot))
            assert collect(executor, 1)[0].error is None
    assert (sim.pinned_ever() == made) == (most is not None)
    executor.close()
    container.close()
    assert sim.pinned() == before[0]


@needs_native
def test_a_model_loads_where_there_is_no_pinned_memory_yet(cuda, monkeypatch, sim):
    """A run that needs the memory says so."""
    stream, native = (
        cuda.open_stream(),
        importlib.import_module("aoti_sched.backends.native._native"),
    )
    before = sim.pinned()
    made = native.Stream(
        cuda.native,
        handle=stream.handle,
        brought=[True],
        home=False,
        bytes_in=1 << 62,
        **stream.native_fence(),
    )
    assert sim.pinned() == before
    del made
    stream.close()


@pytest.mark.parametrize(
    ("specs", "size"),
    [
        ([], 0),
        ([TensorSpec("x", "float32", (3, 5))], 64),
        ([TensorSpec("x", "int8", (65,)), TensorSpec("y", "float64", ())], 192),
        ([TensorSpec("x", "float32", (DynamicDim("n", 1, 100), 4))], 1600),
        ([TensorSpec("x", "float32", (DynamicDim("n"), 4))], 0),
        ([TensorSpec("x", "float32", (4, 4), strides=(100, 1))], 4 * 304 + 16 - 16),
        ([TensorSpec("x", "float32", (4, 1000), strides=(1, 0))], 64),
        ([TensorSpec("x", "float32", (4, 4), strides=(DynamicDim("s"), 1))], 0),
        ([TensorSpec("x", "float32", (0, 4), strides=(4, 1))], 0),
        ([TensorSpec("x", "float32", (1 << 20, 1 << 20))], MOST_BYTES),
    ],
)
def test_the_pinned_memory_of_tensors_is_that_of_their_largest_sizes(specs, size):
    assert pinned_bytes(specs) == size


@needs_native
def test_requests_make_no_call_of_the_driver_through_python(cuda, loaded, monkeypatch, sim):
    """Each would give up the GIL on the loop's thread."""
    container = loaded(cuda)
    executor = cuda.open_executor(2)
    x = on_device(2, 4)
    names = []
    for function in ("call", "status"):
        made = getattr(cuda.driver, function)
        monkeypatch.setattr(
            cuda.driver,
            function,
            lambda name, *arguments, made=made: names.append(name) or made(name, *arguments),
        )
    for number in range(3):
        executor.submit(0, work(container, x))
        assert collect(executor, 1)[0].error is None
        if number == 0:
            names.clear()  # it made an event
    assert names == []
    executor.close()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_lanes_are_opened_while_others_work(cuda, loaded, sim, how, graphs):
    """Those of the stand-in, too, which runs what is recorded."""
    container = loaded(cuda, instances=3, cuda_graphs=graphs)
    executor = open_executor(cuda, how, 1)
    x = on_device(2, 4)
    sim.synchronize()
    sim.hold()
    executor.submit(0, work(container, x))
    sim.wait_until_pending(2)
    executor.grow(3)
    executor.grow(2)
    assert executor.lanes == 3
    for lane in (1, 2):
        executor.submit(lane, work(container, x, slot=lane))
    sim.wait_until_pending(6)
    sim.go()
    assert [completion.error for completion in collect(executor, 3)] == [None] * 3
    executor.close()


@needs_native
def test_native_lanes_grow_as_far_as_they_were_asked_to(cuda):
    executor = cuda.open_executor(1)
    with pytest.raises(ValueError, match="33 lanes are more than 32"):
        executor.grow(33)
    executor.close()
    executor.grow(2)  # which closed lanes ignore
    assert executor.lanes == 1


@needs_native
def test_a_request_costs_the_loops_thread_one_native_call(cuda, loaded, monkeypatch, sim):
    """The lane lets the slot's stream wait, and tells torch's allocator of the caller's stream."""
    container = loaded(cuda, instances=2)
    executor = cuda.open_executor(1)
    x, calls, native = on_device(2, 4), [], cuda.native

    class Counted:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(native, name)

    def hand_over(slot, work, outputs):
        calls.append("hand over")

    monkeypatch.setitem(vars(cuda), "native", Counted())
    monkeypatch.setattr(Slot, "hand_over", hand_over)
    sim.synchronize()
    sim.hold()
    executor.submit(0, work(container, x))
    sim.wait_until_waiting(1)
    executor.submit(0, work(container, x, slot=1))
    assert sim.pending(container._slots[1].stream.handle) == 0
    sim.go()
    assert [completion.error for completion in collect(executor, 2)] == [None, None]
    assert calls == ["arrive", "arrive"]
    executor.close()


@pytest.mark.parametrize("own", [True, False], ids=["outputs", "copies of weights"])
@pytest.mark.parametrize("batch", [False, True], ids=["alone", "batch"])
def test_what_a_request_gets_is_recorded_on_its_own_stream(
    cuda, executors, loaded, sim, monkeypatch, batch, own
):
    container = loaded(cuda, copy_inputs=True)
    if not own:  # as if the output were a weight
        monkeypatch.setattr(
            container, "_aliases", lambda outputs: [i for i, out in enumerate(outputs) if len(out)]
        )
    executor = executors(cuda)
    streams = [cuda.open_stream(), cuda.open_stream()]
    requests = []
    for stream in streams:
        with stream.current():
            requests.append(container.capture_stream([torch.ones(2, 4)]))
    if batch:
        plan = BatchPlan((InputPlan(0, (0, 1)),), (OutputPlan(0),))
        executor.submit(0, Work(container, (), 1, None, Batch(plan, requests, [2, 2], 4, 0)))
        outputs = collect(executor, 1)[0].outputs
    else:
        outputs = []
        for request in requests:
            executor.submit(0, Work(container, request, 1, None))
            outputs.append(collect(executor, 1)[0].outputs)
    sim.hold()
    for stream, given in zip(streams, outputs, strict=True):
        launch(stream.handle, reads=given)
    del outputs, given
    assert sim.faults() == ""
    sim.go()
    cuda.synchronize()
    for stream in streams:
        stream.close()


def test_where_torch_lacks_the_function_the_loop_records_uses(
    cuda, executors, loaded, sim, monkeypatch
):
    name = "aoti_sched.backends.accelerators.slot.RECORD_USE"
    monkeypatch.setattr(name, "a name that this torch has no function of")
    test_what_a_request_gets_is_recorded_on_its_own_stream(
        cuda, executors, loaded, sim, monkeypatch, batch=False, own=True
    )


def test_events_are_used_again(cuda, executors, loaded, sim):
    container = loaded(cuda)
    executor = executors(cuda)
    x = on_device(2, 4)
    events = []
    for _ in range(20):
        executor.submit(0, work(container, x))
        collect(executor, 1)
        events.append(sim.events())
    assert events[5] == events[-1]


def test_mps_never_runs_two_at_once(loaded, executors, sim):
    """Not even for two schedulers, or on the loop's own thread."""
    sim.repair()
    device = open_device("mps")
    containers = [loaded(device), loaded(open_device("mps"))]
    lanes = [executors(device), executors(device)]
    x = on_device(2, 4)
    sim.take(200)
    before = sim.kernels()

    def run_here():
        for _ in range(20):
            assert lanes[0].run_here(work(containers[0], x)).error is None

    def warm_up():
        containers[1].warm_up(lambda: [x])

    others = [threading.Thread(target=run_here), threading.Thread(target=warm_up)]
    for other in others:
        other.start()
    for _ in range(20):
        for executor, container in zip(lanes, containers, strict=True):
            executor.submit(0, work(container, x))
        for executor in lanes:
            assert collect(executor, 1)[0].error is None
    for other in others:
        other.join(60)
    assert sim.kernels() - before == 61  # the warm-up is one run
    assert sim.most_threads() == 1


@pytest.mark.parametrize("step", ["load", "unpark"])
def test_the_device_is_free_while_a_weights_file_blocks(
    device, loaded, executors, tmp_path, monkeypatch, step
):
    """On a network that is dead, for example; a model that is loaded already serves on."""
    path, blocks = tmp_path / "new.pt", step == "load"
    entered, go_on = threading.Event(), threading.Event()
    torch.save({name: tensor.cpu() for name, tensor in weights(3.0).items()}, path)
    opens = OpenFiles.open

    def open_later(self, path):
        if blocks:
            entered.set()
            assert go_on.wait(60)
        return opens(self, path)

    monkeypatch.setattr(OpenFiles, "open", open_later)
    other, late = loaded(device), []
    executor = executors(device)
    if step == "unpark":
        late.append(loaded(device, weights=path))
        late[0].park()
        blocks = True
    work_of = late[0].unpark if late else lambda: late.append(loaded(device, weights=path))
    reading = threading.Thread(target=work_of)
    reading.start()
    assert entered.wait(60)
    assert run_once(executor, other) == 1.0
    go_on.set()
    reading.join(60)
    assert run_once(executor, late[0]) == 3.0


def test_weights_for_mps_are_laid_out_and_written_between_its_runs(loaded, executors, sim):
    device = open_device("mps")
    container, other = loaded(device), loaded(device)
    executor = executors(device)
    x, wide = on_device(2, 4), on_device(8)
    sim.repair()
    sim.take(200)

    def stage():
        for _ in range(10):
            other.stage({"weight": wide[::2]}, check_finite=True)

    staging = threading.Thread(target=stage)
    staging.start()
    for _ in range(20):
        executor.submit(0, work(container, x))
        assert collect(executor, 1)[0].error is None
    staging.join(60)
    assert other.inactive_ready
    assert sim.most_threads() == 1


def test_the_device_sees_when_two_run_at_once(cuda, executors, loaded, sim):
    """Or the test above could not fail."""
    container = loaded(cuda, instances=2)
    executor = executors(cuda)
    x = on_device(2, 4)
    sim.synchronize()
    sim.hold()
    for slot in range(2):
        executor.submit(slot, work(container, x, slot=slot))
    sim.wait_until_waiting(2)
    sim.go()
    collect(executor, 2)
    assert sim.most_threads() == 2


def test_mps_has_one_lane():
    with pytest.raises(
        ConfigError, match=r"device 'sim': lanes=2, but MPS runs one model at a time"
    ):
        open_device("mps").open_executor(2)
    assert open_device("mps").cores() == 1


def test_xpus_streams_are_handed_out_once(loaded, sim):
    device = open_device("xpu")
    streams = [device.open_stream() for _ in range(POOL)]
    assert len({stream.handle for stream in streams}) == POOL
    with pytest.raises(LoadError, match="all 32 streams are taken"):
        device.open_stream()
    streams.pop().close()
    device.open_stream()


# --- loading --------------------------------------------------------------------------------------


def test_loading_leaves_the_threads_device_as_it_was(loaded, sim):
    loaded(simulator().cuda(0))
    with sim.driver.current(sim.driver.primary_context(0)):
        before = sim.context
        loaded(simulator().cuda(1))
        assert sim.context == before
    seen = []

    def load_in_thread():
        loaded(simulator().cuda(1))
        seen.append(sim.context)

    thread = threading.Thread(target=load_in_thread)
    thread.start()
    thread.join()
    assert seen == [None]


def test_nothing_makes_a_context_on_a_thread_that_has_none(loaded, executors, sim):
    """CUDA's runtime makes one on device 0, whichever device the model is on."""
    device = simulator().cuda(1)
    container = loaded(device, copy_inputs=True, copy_outputs="cpu")
    steps = [
        lambda: container.stage(weights(3.0)),
        container.swap,
        container.free_inactive,
        container.extract,
        container.rebuild,
        container.park,
        container.unpark,
        container.close,
    ]
    for step in steps:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        assert sim.faults() == "", step


def test_runs_and_closing_leave_the_threads_device_as_it_was(executors, tmp_path, sim):
    """The loop's own thread may run and close; what a user does there next must not land on
    another device.
    """
    device = simulator().cuda(0)
    other = sim.driver.primary_context(1)
    container = load(device, tmp_path, copy_inputs=True, copy_outputs="cpu")
    executor = executors(device)
    with sim.driver.current(other):
        assert executor.run_here(work(container, torch.ones(2, 4))).error is None
        assert sim.context == other
        container.close()
        gc.collect()
        assert sim.context == other


def test_a_loaded_model_says_what_it_is_and_that_no_real_device_has_run_it(device, loaded):
    info = loaded(device, instances=2).info
    assert (info.runtime, info.instances, info.inline, info.verified) == ("c_abi", 2, False, False)


def test_every_slot_is_warmed_up_once(cuda, loaded, sim):
    container = loaded(cuda, instances=3, copy_inputs=True)
    before = sim.kernels()
    container.warm_up(lambda: [torch.zeros(1, 4)])
    assert sim.kernels() - before == 3


@pytest.mark.parametrize(
    ("built", "fits"), [("80", True), ("75", True), ("86", False), ("90", False), ("gfx90a", True)]
)
def test_a_model_for_a_newer_architecture_is_refused(cuda, tmp_path, built, fits):
    path = tmp_path / "model.so"
    path.write_bytes(model_path().read_bytes())
    stated = {"AOTI_DEVICE_KEY": "sim", "AOTI_COMPUTE_CAPABILITY": built}
    (tmp_path / "model_metadata.json").write_text(json.dumps(stated))
    request = LoadRequest(
        name="newer",
        path=path,
        model_name=None,
        instances=1,
        sha256=None,
        cache_dir=tmp_path / "cache",
    )
    if fits:
        cuda.inspect(request)
        return
    with pytest.raises(
        PlatformMismatchError,
        match=rf"compute capability {built[0]}\.{built[1]}, this device has 8\.0. Compile it on",
    ):
        cuda.inspect(request)


def test_a_model_of_another_kind_is_refused(cuda, built, tmp_path):
    with pytest.raises(PlatformMismatchError, match="was compiled for cpu, not for sim"):
        cuda.inspect(
            LoadRequest(
                name="mlp",
                path=built("mlp").path,
                model_name=None,
                instances=1,
                sha256=None,
                cache_dir=tmp_path,
            )
        )


# --- weights --------------------------------------------------------------------------------------


def weights(value, device="cpu"):
    return {"weight": torch.full((4,), value).to(device)}


def run_once(executor, container):
    executor.submit(0, work(container, on_device(1, 4)))
    (completion,) = collect(executor, 1)
    return completion.outputs[0].cpu()[0, 0].item()


@pytest.mark.parametrize("row", [0, 6], ids=["expanded", "a part of wider rows"])
def test_inputs_that_are_not_dense_are_brought_with_their_strides(device, executors, loaded, row):
    container = loaded(device, copy_inputs=True, row=row)
    x = torch.rand(20).as_strided((3, 4), (row, 1))
    executor = executors(device)
    executor.submit(0, work(container, x))
    (completion,) = collect(executor, 1)
    assert completion.error is None
    assert torch.equal(completion.outputs[0].cpu(), x)


@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
@pytest.mark.parametrize("where", ["cpu", "sim"])
def test_weights_are_replaced_from_the_host_and_from_the_device(
    device, executors, loaded, where, older
):
    container = loaded(device, older=older)
    executor = executors(device)
    assert container.stage(weights(3.0, where)).bytes == 16
    assert run_once(executor, container) == 1.0
    container.swap()
    assert run_once(executor, container) == 3.0
    assert container.extract()["weight"].tolist() == [3.0] * 4
    assert container.extract(inactive=True)["weight"].tolist() == [1.0] * 4
    container.swap()
    assert run_once(executor, container) == 1.0
    container.free_inactive()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_weights_become_copies(device, kind, loaded, monkeypatch):
    """On MPS an address is that of an object, plus an offset: a number within the weights' may
    be anybody's.
    """
    container = loaded(device)
    blob = torch.zeros(8)
    monkeypatch.setattr(container._raw, "_borrow", lambda *, inactive: [("weight", blob)])
    container._index_constants()
    stranger = torch.tensor([]).set_(blob.untyped_storage()[8:16])
    assert blob.data_ptr() < stranger.data_ptr() < blob.data_ptr() + blob.nbytes
    outputs = [None, blob[2:], torch.zeros(8), stranger]
    assert container._aliases(outputs) == ([1] if kind == "mps" else [1, 3])
    own = CAbiContainer.detach_outputs(container, list(outputs))
    assert own[1].untyped_storage().data_ptr() != blob.data_ptr()
    assert (own[3] is stranger) == (kind == "mps")
    container._folded_outputs = {0, 2}
    assert sorted(container._aliases(outputs)) == ([1, 2] if kind == "mps" else [1, 2, 3])


def test_an_older_model_with_a_constant_on_the_host_takes_no_weights(device, executors, loaded):
    """Its code would write them to wrong places."""
    container = loaded(device, older=True, mixed=True)
    why = "takes no constants in the host's memory (factor) beside others on a device"
    assert why in container.updatable
    with pytest.raises(MissingCapabilityError, match="takes no constants in the host's memory"):
        container.stage({**weights(3.0), "factor": torch.tensor(2.0)})
    assert run_once(executors(device), container) == 1.0


@pytest.mark.parametrize("where", ["cpu", "sim"])
def test_a_constant_that_belongs_on_the_host_stays_there(device, executors, loaded, where):
    container = loaded(device, mixed=True)
    executor = executors(device)
    container.stage({**weights(3.0, where), "factor": torch.tensor(2.0).to(where)})
    container.swap()
    assert run_once(executor, container) == 6.0
    container.stage(weights(4.0, where), partial=True)
    container.swap()
    assert run_once(executor, container) == 8.0
    assert container.extract()["factor"].device.type == "cpu"
    container.rebuild()
    assert run_once(executor, container) == 8.0


@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
def test_a_container_without_weights_gets_those_of_its_package_from_the_host(
    cuda, executors, loaded, older, tmp_path
):
    """As when a package keeps them in files; this one had some, which are taken for missing."""
    container = loaded(cuda, older=older)
    torch.save(torch.full((4,), 5.0), tmp_path / "weight.pt")
    stored = StoredWeight(tmp_path / "weight.pt", (4,), (1,), 0)
    package = Extracted(tmp_path, tmp_path / "model.so", None, {"weight": stored})
    raw = container._raw
    missing = iter([("weight",), ()])
    raw.missing_constants = lambda: next(missing)
    load_weights(raw, package)
    cuda.settle()
    assert run_once(executors(cuda), container) == 5.0


def test_weights_are_on_the_device_before_they_can_be_swapped_in(cuda, loaded, sim):
    """The runtime itself does not wait for copies from device to device."""
    container = loaded(cuda)
    new = weights(3.0, "sim")
    sim.synchronize()
    sim.hold()
    staging = threading.Thread(target=lambda: container.stage(new))
    staging.start()
    sim.wait_until_waiting(1)
    assert staging.is_alive()
    while staging.is_alive():
        sim.step()
    assert container.inactive_ready
    assert sim.pending() == 0


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_weights_that_a_stream_still_makes_are_waited_for(device, loaded, sim):
    container = loaded(device)
    new = weights(3.0, "sim")
    mine = device.open_stream()
    sim.synchronize()
    sim.hold()
    launch(mine.handle, writes=[new["weight"]])
    staging = threading.Thread(target=lambda: container.stage(new))
    staging.start()
    sim.wait_until_waiting(1)
    sim.go()
    staging.join(60)
    assert container.inactive_ready
    mine.close()


def test_staging_goes_on_beside_a_run_and_its_buffer_is_not_touched(cuda, executors, loaded, sim):
    container = loaded(cuda)
    executor = executors(cuda)
    x = on_device(1, 4)
    sim.synchronize()
    sim.hold()
    executor.submit(0, work(container, x))
    sim.wait_until_waiting(1)
    staging = threading.Thread(target=lambda: container.stage(weights(3.0)))
    staging.start()
    sim.wait_until_waiting(2)
    sim.go()
    staging.join(60)
    (completion,) = collect(executor, 1)
    assert completion.outputs[0].cpu()[0, 0].item() == 1.0


def test_a_rebuilt_container_has_its_weights_and_its_slots(device, executors, loaded):
    container = loaded(device)
    executor = executors(device)
    container.stage(weights(3.0))
    container.swap()
    container.rebuild()
    assert run_once(executor, container) == 3.0


@pytest.mark.parametrize(
    ("older", "mixed"),
    [(False, False), (True, False), (False, True)],
    ids=["new", "older", "one on the host"],
)
def test_a_parked_container_has_no_memory_on_the_device_and_its_weights_come_back(
    device, executors, loaded, sim, older, mixed
):
    container = loaded(device, instances=lanes_of(device.type), older=older, mixed=mixed)
    executor = executors(device)
    set_of = weights(3.0) if not mixed else {**weights(3.0), "factor": torch.tensor(1.0)}
    for expected in (1.0, 3.0):
        assert run_once(executor, container) == expected
        gc.collect()
        full = sim.allocated()
        assert container.unparkable == ""
        container.park()
        assert sim.allocated() < full
        container.unpark()
        assert run_once(executor, container) == expected
        container.stage(set_of)
        container.swap()
        container.free_inactive()
    container.park()  # and is closed like that


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_take_besides_is_measured_on_cuda_and_only_for_who_asks(
    device, kind, loaded, executors, sim, monkeypatch
):
    container = loaded(device, copy_inputs=True)
    executor = executors(device)
    snapshots = sim.module.snapshots
    container.warm_up(lambda: [torch.zeros(1000, 4)])
    container.stage(weights(3.0))
    container.swap()
    container.park()
    container.unpark()
    assert sim.module.snapshots == snapshots
    if kind != "cuda":
        assert executor.workspace() == 0
        return
    executor.workspace()  # begins to measure
    monkeypatch.setattr("aoti_sched.backends.accelerators.cuda.BETWEEN_MEASUREMENTS", 0.0)
    for thread in threading.enumerate():
        if thread.name == f"aoti:{device.name}:memory":
            thread.join()
    assert executor.workspace() >= 2 * 16000  # an input and an output
    assert sim.module.snapshots > snapshots


def test_an_allocator_that_lists_no_memory_fails_nothing(cuda, loaded, executors, monkeypatch):
    """As torch's is with `backend:cudaMallocAsync`."""
    loaded(cuda)
    monkeypatch.setattr(
        cuda.module, "memory_snapshot", Mock(side_effect=RuntimeError("not meaningful"))
    )
    cuda._measure()
    assert executors(cuda).workspace() == 0


def fill_the_cache(sim):
    """Let torch's allocator keep all the memory that the device has left."""
    blocks = [on_device(1000, 4) for _ in range(8)]
    sim.memory_limit(sim.reserved())
    del blocks
    sim.synchronize()


@pytest.mark.parametrize("step", ["load", "update", "unpark"])
@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
def test_weights_find_room_where_torchs_allocator_keeps_what_it_does_not_need(
    cuda, loaded, executors, sim, step, older
):
    """It gives nothing back by itself: the runtime's memory is not its own."""
    if step == "load":
        fill_the_cache(sim)
    container = loaded(cuda, older=older)
    if step == "unpark":
        container.park()
    if step != "load":
        fill_the_cache(sim)
    if step == "unpark":
        # Its place was in the device's memory, and is torch's now.
        sim.memory_limit(sim.reserved() + 256)
        container.unpark()
    if step == "update":
        container.stage(weights(3.0, "sim" if older else "cpu"))
        container.swap()
    sim.memory_limit(0)
    assert run_once(executors(cuda), container) == (3.0 if step == "update" else 1.0)


def test_a_failed_call_of_the_runtime_leaves_torch_no_error(cuda, loaded, executors, sim):
    """Torch's next kernel on that thread would report it as its own."""
    container = loaded(cuda)
    new = weights(3.0)
    sim.empty_cache()
    sim.memory_limit(sim.reserved())
    with pytest.raises(LoadError, match="cudaMalloc"):
        container.stage(new)
    with pytest.raises(LoadError):
        loaded(cuda)
    assert sim.last_error() == 0
    sim.memory_limit(0)
    assert on_device(2, 4).cpu().unique().tolist() == [1.0]
    container.stage(new)


def test_what_could_not_be_kept_on_the_host_stays_on_the_device(
    cuda, executors, loaded, monkeypatch
):
    container = loaded(cuda)
    executor = executors(cuda)
    container.stage(weights(3.0))
    container.swap()
    container.free_inactive()
    monkeypatch.setattr(container._raw, "extract", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        container.park()
    container.unpark()
    assert run_once(executor, container) == 3.0


def test_nothing_comes_back_to_a_device_that_is_lost(cuda, loaded, monkeypatch):
    container = loaded(cuda)
    container.park()
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "lost", lambda: "it burns")
        with pytest.raises(DeviceLostError, match="it burns"):
            container.unpark()
    container.unpark()


def test_large_sets_are_written_in_bounded_groups_and_what_is_no_parameter_last():
    def pair(kind, count):
        return SimpleNamespace(spec=SimpleNamespace(type=kind)), torch.zeros(
            count, dtype=torch.uint8
        )

    ready = [
        pair("buffer", 9),
        pair("parameter", 6),
        pair("parameter", 4),
        pair("parameter", 1),
        pair("parameter", 0),
    ]
    ready += [pair("parameter", 30), pair("constant", 3)]
    sizes = [
        [(constant.spec.type[0], tensor.numel()) for constant, tensor in group]
        for group in _groups(ready, 10)
    ]
    assert sizes == [
        [("p", 6), ("p", 4)],
        [("p", 1)],
        [("p", 30)],
        [("b", 9), ("p", 0), ("c", 3)],
    ]


# --- a lost device --------------------------------------------------------------------------------


def test_an_error_that_stays_means_that_the_device_is_lost(cuda, executors, loaded, sim):
    container = loaded(cuda)
    executor = executors(cuda)
    x = on_device(2, 4)
    sim.break_device()
    executor.submit(0, work(container, x))
    (completion,) = collect(executor, 1)
    assert isinstance(completion.error, DeviceLostError)
    assert completion.error.device == "sim:0"
    assert "device sim:0 is lost: CUDA_ERROR_ILLEGAL_ADDRESS" in str(completion.error)
    assert executor.lost().startswith("CUDA_ERROR_ILLEGAL_ADDRESS")
    again = pickle.loads(pickle.dumps(completion.error))
    assert (str(again), again.device) == (str(completion.error), "sim:0")
    with pytest.raises(DeviceLostError, match="Restart the process to use the device again"):
        loaded(cuda)
    here = executor.run_here(Work(container, [x], 1, None))
    assert isinstance(here.error, DeviceLostError)


def test_a_device_that_breaks_before_a_launch_is_lost(cuda, executors, loaded, sim):
    container = loaded(cuda)
    executor = executors(cuda)
    x = on_device(2, 4)
    ready = work(container, x)
    sim.break_device()
    launch(0, reads=[x])
    with pytest.raises(RunError):
        cuda.settle()

    def submit():  # native lanes know it at once
        executor.submit(0, ready)
        raise collect(executor, 1)[0].error

    for _ in range(2):
        with pytest.raises(DeviceLostError, match="sim:0 is lost: CUDA_ERROR_ILLEGAL_ADDRESS"):
            submit()
    assert executor.lost().startswith("CUDA_ERROR_ILLEGAL_ADDRESS")


def test_a_driver_that_records_a_graph_is_not_lost(cuda, monkeypatch):
    """Then it refuses to be asked, which the simulated one never does."""
    status = cuda.driver.status
    refused = {"cuStreamQuery": 901}
    monkeypatch.setattr(
        cuda.driver,
        "status",
        lambda function, *args: refused.get(function) or status(function, *args),
    )
    cuda.look_after_failure()
    assert cuda.lost() == ""
    refused["cuStreamQuery"] = 700
    cuda.look_after_failure()
    assert "ILLEGAL_ADDRESS" in cuda.lost()


# --- which devices there are ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:1", "mps:0", "", "xpu:-1"])
def test_a_name_that_means_no_device_is_refused(name):
    with pytest.raises(
        ConfigError, match="expected 'cpu', 'mps', or 'cuda:0' or 'xpu:0' with any number"
    ):
        devices.open_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "xpu:1", "mps"])
def test_a_device_that_is_not_here_is_refused_and_the_reason_is_said(name):
    kind = name.partition(":")[0]
    if getattr(torch, kind).is_available():
        pytest.skip(f"this machine has a {kind} device, so it is not refused")
    with pytest.raises(
        ConfigError, match=rf"device '{name}': (this torch .* was built without|torch finds no)"
    ):
        devices.open_device(name)


def test_a_driver_that_is_not_there_is_said():
    with pytest.raises(
        ConfigError, match=r"CUDA's driver can't be used: libnone\.so\.1: cannot open"
    ):
        cuda_driver.Driver("libnone.so.1")
    with pytest.raises(ConfigError, match="CUDA's driver can't be used"):
        cuda_driver.Driver("libm.so.6")


# --- operators without a C function ---------------------------------------------------------------


@pytest.fixture
def calls_svd(tmp_path):
    """The path of a model whose list of operators names one of torch's own."""
    path = tmp_path / "calls_svd.so"
    path.write_bytes(model_path().read_bytes())
    arguments = [("A", {"as_tensor": {"name": "x"}}), ("full_matrices", {"as_bool": True})]
    node = {
        "target": "aten::_linalg_svd",
        "inputs": [{"name": name, "arg": value, "kind": 1} for name, value in arguments],
        "outputs": [{"as_tensor": {"name": name}} for name in ("u", "s", "v")],
        "metadata": {},
    }
    path.with_suffix(".json").write_text(json.dumps({"nodes": [{"name": "buf0", "node": node}]}))
    return path


@needs_native
def test_a_model_on_a_device_is_given_the_proxy_executor_of_that_devices_runner(
    device, calls_svd, tmp_path, monkeypatch
):
    asked = []

    def stock_runner(name, library, instances):
        asked.append(name)
        return stock.stock_runner(
            "cpu", library, instances
        )  # torch has none for the simulated device

    monkeypatch.setattr(proxy_executor, "stock_runner", stock_runner)
    request = LoadRequest(
        name="svd",
        path=calls_svd,
        model_name=None,
        instances=1,
        sha256=None,
        cache_dir=tmp_path / "cache",
    )
    container = device.load(device.inspect(request))
    try:
        assert asked == [device.name]
        assert container.info.runtime == "c_abi"
        assert "Calls aten::_linalg_svd through torch's dispatcher" in container.info.reason
        given = container._raw.proxy.address
        assert given != 0
        assert container.c_run.proxy_executor == given
        x = on_device(2, 4)
        assert torch.equal(container.run_raw([x])[0].cpu(), x.cpu())
        container.park()
        container.unpark()
        assert container.c_run.proxy_executor == given
        assert container.c_run.slots
        assert torch.equal(container.run_raw([x])[0].cpu(), x.cpu())
    finally:
        simulator().go()
        container.close()


def test_runs_that_call_such_operators_are_not_recorded(cuda, calls_svd, tmp_path):
    request = LoadRequest(
        name="svd",
        path=calls_svd,
        model_name=None,
        instances=1,
        sha256=None,
        cache_dir=tmp_path / "cache",
        cuda_graphs=True,
    )
    with pytest.raises(
        ConfigError, match="cuda_graphs=True, but the model calls aten::_linalg_svd through"
    ):
        cuda.inspect(request)


# --- torch's own runner ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:1", "xpu:0", "mps"])
def test_a_stock_runner_that_this_torch_has_not_is_named(name, tmp_path):
    runner = f"AOTIModelContainerRunner{name.partition(':')[0].capitalize()}"
    if hasattr(torch._C._aoti, runner):
        pytest.skip(f"this torch has {runner}")
    with pytest.raises(LoadError, match=f"lacks {runner}, which the model needs"):
        stock.stock_runner(name, tmp_path / "model.so", 1)


def test_a_stream_is_given_to_the_stock_runner_as_the_capsule_it_takes(built):
    """The CPU's runner takes one, too, and does not look at it."""
    model = built("mlp")
    runner = stock.stock_runner("cpu", model.library(), 1)
    (output,) = runner.run(list(model.args), capsule_of(0x1230))
    assert torch.allclose(output, model.module()(*model.args), atol=1e-5)


def test_closing_twice_does_nothing(device, loaded):
    container = loaded(device)
    container.close()
    container.close()
    with pytest.raises(RunnerClosedError):
        container._raw.run([on_device(1, 4)])
