"""How lanes wait for a simulated CUDA device: asleep, whatever others record meanwhile, and with
their tensors until the device is done.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch

from aoti_sched.backends.contracts import Work
from aoti_sched.backends.cpu import CpuDevice
from aoti_sched.backends.executors.batches import Batch
from aoti_sched.errors import ConfigError, RunError
from aoti_sched.model.batch_plan import BatchPlan, InputPlan, OutputPlan
from tests.compiled.backends.executor_contract import collect
from tests.compiled.backends.simulation import (
    HOW,
    load,
    on_device,
    open_device,
    open_executor,
    work,
)
from tests.native.simulated import simulator


@pytest.fixture(autouse=True)
def sim():
    sim = simulator()
    sim.repair()
    yield sim
    sim.go()
    fault = sim.faults()
    sim.repair()
    assert fault == ""


@pytest.fixture
def device():
    return open_device("cuda")


@pytest.fixture(params=HOW)
def executor(device, request):
    executor = open_executor(device, request.param, 2)
    yield executor
    simulator().go()
    executor.close()


@pytest.fixture
def loaded(device, tmp_path):
    containers = []

    def load_model(**options):
        containers.append(load(device, tmp_path, **options))
        return containers[-1]

    yield load_model
    simulator().go()
    for container in containers:
        container.close()


@pytest.mark.parametrize("how", ["native", "threads"])
@pytest.mark.parametrize("wait", ["block", "spin"])
def test_a_lane_sleeps_while_the_device_works_unless_it_shall_spin(
    device, loaded, sim, monkeypatch, how, wait
):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", how)
    executor = device.open_executor(2, wait=wait)
    container = loaded()
    x = on_device(2, 4)
    sim.synchronize()
    sim.hold()
    before = sim.spinning()
    executor.submit(0, work(container, x))
    sim.wait_until_waiting(1)
    spinning = sim.spinning() - before
    sim.go()
    assert collect(executor, 1)[0].error is None
    executor.close()
    assert (spinning > 0) == (wait == "spin")


def test_how_lanes_wait_is_a_choice_on_cuda_alone():
    for device in (open_device("xpu"), open_device("mps")):
        with pytest.raises(ConfigError, match="wait='block': there is no choice"):
            device.open_executor(1, wait="block")
    with pytest.raises(ConfigError, match="a lane of a CPU waits for no device"):
        CpuDevice().open_executor(1, wait="spin")
    with pytest.raises(ConfigError, match="wait='doze'"):
        open_device("cuda").open_executor(1, wait="doze")


def test_a_wait_that_a_recording_forbids_is_not_the_runs_end(executor, loaded, sim):
    container = loaded()
    x = on_device(64, 4)
    sim.synchronize()
    sim.hold()
    one = work(container, x)
    del x
    sim.refuse_waits(8, 900)
    executor.submit(0, one)
    del one
    while sim.refused_waits():
        pass
    assert executor.drain() == []
    sim.go()
    (completion,) = collect(executor, 1)
    assert completion.error is None
    assert completion.outputs[0].cpu().unique().tolist() == [1.0]


def test_what_a_device_may_still_use_is_not_freed_when_it_can_not_be_waited_for(
    executor, loaded, sim, device
):
    container = loaded()
    x = on_device(64, 4)
    sim.synchronize()
    sim.hold()
    one = work(container, x)
    memory = x.data_ptr()
    del x
    sim.refuse_waits(1000, 1)
    executor.submit(0, one)
    del one
    (completion,) = collect(executor, 1)
    assert isinstance(completion.error, RunError)
    assert "waiting for the device failed" in str(completion.error)
    sim.refuse_waits(0, 0)
    others = [torch.empty(64, 4, device="sim") for _ in range(4)]
    assert memory not in [other.data_ptr() for other in others]
    sim.go()
    assert device.lost() == ""
    del completion
    executor.submit(0, work(container, on_device(64, 4)))
    assert collect(executor, 1)[0].error is None


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_users_recording_and_the_lanes_do_not_disturb_each_other(
    executor, loaded, sim, device, graphs
):
    """Torch records so that what may be unsafe is forbidden to all threads that don't mind it."""
    container = loaded(
        instances=2, copy_inputs=True, copy_outputs="cpu", chain=True, cuda_graphs=graphs
    )
    plan = BatchPlan((InputPlan(0, (0, 1)),), (OutputPlan(0),))
    members = [[torch.full((rows, 4), float(rows))] for rows in (1, 2)]
    stream = device.open_stream()

    def update():
        for _ in range(2):
            container.stage({"weight": torch.full((4,), 1.0)})
            container.free_inactive()

    with sim.recorded(stream.handle) as ended:
        updating = threading.Thread(target=update)
        updating.start()
        for rows in (3, 30, 300, 3000, 3):
            x = torch.rand(rows, 4)
            executor.submit(0, work(container, x, slot=rows % 2))
            (completion,) = collect(executor, 1)
            assert completion.error is None
            assert torch.equal(completion.outputs[0], x)
        executor.submit(0, Work(container, (), 1, None, Batch(plan, members, [1, 2], 4, 0)))
        assert collect(executor, 1)[0].error is None
        updating.join()
    assert ended == [0]
    assert sim.refusals() == 0
    stream.close()


def test_the_device_sees_calls_that_a_recording_forbids(sim, device):
    """Or the test above could not fail."""
    stream = device.open_stream()
    statuses = []

    def other(how):
        with sim.module.in_context(), how:
            statuses.append(sim.driver.status("cuStreamQuery", device_stream.handle))

    device_stream = device.open_stream()
    for mode, how in (
        (0, nullcontext()),
        (1, nullcontext()),
        (0, sim.driver.apart_from_captures()),
    ):
        with sim.recorded(stream.handle, mode) as ended:
            thread = threading.Thread(target=other, args=(how,))
            thread.start()
            thread.join()
        statuses.append(ended[0])
    assert statuses == [900, 901, 0, 0, 0, 0]
    stream.close()
    device_stream.close()
    assert "whose memory is of no pool" in sim.faults()  # the second one, which is as ours are
    sim.repair()


# --- recordings on streams that the default stream waits for, which are not torch's ---------------


def test_to_find_out_about_a_loss_spoils_no_recording(executor, loaded, sim):
    """A query of the default stream would: CUDA C++ Programming Guide, "Prohibited and Unhandled
    Operations".
    """
    container = loaded(copy_inputs=True, copy_outputs="cpu")
    failing = loaded(copy_outputs="cpu")  # since nothing brings its inputs to the device
    with sim.blocking_stream() as users, sim.module.in_context():
        for mode in (0, 1, 2):
            with sim.recorded(users, mode) as ended:
                executor.submit(0, work(failing, torch.ones(2, 4)))
                (completion,) = collect(executor, 1)
                assert isinstance(completion.error, RunError), mode
                executor.submit(0, work(container, torch.ones(2, 4)))
                assert collect(executor, 1)[0].error is None
            assert ended == [0], mode
    assert executor.lost() == ""
    sim.repair()  # a recording of a user's comes from no pool


def test_a_wait_that_fails_asks_for_a_loss_without_the_default_stream(
    executor, loaded, sim, device
):
    container, mine = loaded(), device.open_stream()
    x = on_device(2, 4)
    sim.synchronize()
    with sim.blocking_stream() as users, sim.module.in_context(), sim.recorded(users) as ended:
        with mine.current():
            one = work(container, x)
        sim.refuse_waits(3, 1)
        executor.submit(0, one)
        (completion,) = collect(executor, 1)
    assert (completion.error, ended) == (None, [0])
    mine.close()


def test_a_thread_that_records_may_find_out_about_a_loss(device, sim):
    stream = device.open_stream()
    with sim.recorded(stream.handle, 0) as ended:
        device.look_after_failure()
    assert (ended, device.lost(), sim.refusals()) == ([0], "", 0)
    stream.close()


@pytest.mark.parametrize("how", HOW)
def test_a_request_is_no_part_of_the_callers_recording(device, loaded, sim, how):
    """Its run would be recorded instead of run, and its stream with it."""
    executor = open_executor(device, how, 1)
    container = loaded()
    x = on_device(2, 4)
    sim.synchronize()
    mine = device.open_stream()
    refused = pytest.raises(RunError, match="the current stream is being recorded into a graph")
    with mine.current(), sim.recorded(mine.handle, 2) as ended, refused:
        work(container, x)
    with sim.blocking_stream() as users, sim.recorded(users, 2) as also_ended:
        with pytest.raises(RunError, match="is the default stream while a stream that waits for"):
            work(container, x)
        with mine.current():
            other = work(container, x)
        executor.submit(0, other)
        assert collect(executor, 1)[0].error is None
    assert (ended, also_ended) == ([0], [0])
    executor.submit(0, work(container, x))
    assert collect(executor, 1)[0].error is None
    executor.close()
    mine.close()


def test_without_native_lanes_a_request_is_no_part_of_a_recording_either(
    device, loaded, sim, monkeypatch
):
    monkeypatch.setitem(vars(device), "native", None)
    test_a_request_is_no_part_of_the_callers_recording(device, loaded, sim, "threads")
