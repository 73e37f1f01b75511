"""The simulated device sees each rule that is broken, and nothing else: or the tests that ask
it could not fail.
"""

import threading
from ctypes import byref, c_void_p

import pytest
import torch

from tests.compiled.backends.simulation import launch, on_device
from tests.native.simulated import simulator


@pytest.fixture
def sim():
    sim = simulator()
    sim.repair()
    yield sim
    sim.go()
    sim.synchronize()
    sim.repair()


@pytest.fixture
def streams(sim):
    with sim.module.in_context():
        handles = [sim.driver.make("cuStreamCreateWithPriority", 1, 0) for _ in range(2)]
    yield handles
    sim.go()
    for handle in handles:
        sim.driver.call("cuStreamSynchronize", handle)
        sim.driver.call("cuStreamDestroy_v2", handle)


@pytest.fixture
def x(sim):
    x = on_device(4)
    sim.synchronize()
    sim.hold()
    return x


def event(sim):
    with sim.module.in_context():
        return sim.driver.make("cuEventCreate", 2)


def test_two_streams_that_write_the_same_memory_must_be_ordered(sim, streams, x):
    launch(streams[0], writes=[x])
    launch(streams[1], reads=[x])
    assert "use the same memory, and nothing orders them" in sim.faults()


def test_an_event_orders_them(sim, streams, x):
    one = event(sim)
    launch(streams[0], writes=[x])
    sim.driver.call("cuEventRecord", one, streams[0])
    sim.driver.call("cuStreamWaitEvent", streams[1], one, 0)
    launch(streams[1], reads=[x])
    assert sim.faults() == ""
    launch(streams[0], writes=[x])  # but not what comes after it
    launch(streams[1], reads=[x])
    assert sim.faults() != ""
    sim.driver.call("cuEventDestroy_v2", one)


def test_what_is_done_needs_no_order(sim, streams, x):
    launch(streams[0], writes=[x])
    assert sim.step() == 1
    launch(streams[1], reads=[x])
    assert sim.faults() == ""


def test_two_that_read_need_no_order(sim, streams, x):
    launch(streams[0], reads=[x])
    launch(streams[1], reads=[x])
    assert sim.faults() == ""


def test_a_wait_for_an_event_is_one(sim, streams, x):
    one = event(sim)
    launch(streams[0], writes=[x])
    sim.driver.call("cuEventRecord", one, streams[0])
    sim.driver.call("cuStreamWaitEvent", streams[1], one, 0)
    launch(streams[1], reads=[x])
    kernels = sim.kernels()
    sim.step()
    assert sim.kernels() == kernels + 1
    assert (sim.pending(streams[0]), sim.pending(streams[1])) == (1, 2)
    for _ in range(3):
        assert sim.step() == 1
    assert sim.step() == 0
    assert sim.kernels() == kernels + 2
    sim.driver.call("cuEventDestroy_v2", one)


def test_memory_may_not_be_given_back_while_another_stream_has_to_use_it(sim, streams):
    x = on_device(4)
    sim.synchronize()
    sim.hold()
    launch(streams[0], reads=[x])
    del x
    assert "is given back that stream" in sim.faults()


def give_back(sim, streams, *, recorded):
    x = on_device(4)
    sim.synchronize()
    sim.hold()
    launch(streams[0], reads=[x])
    if recorded:
        x.record_stream(sim.module.ExternalStream(streams[0]))
    return x.data_ptr()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_recorded_use_is_waited_for_before_memory_is_given_again(sim, streams, recorded):
    address = give_back(sim, streams, recorded=recorded)
    assert (sim.faults() == "") == recorded
    again = torch.empty(4, device="sim")
    assert (again.data_ptr() != address) == recorded
    sim.go()
    sim.synchronize()


def test_its_own_stream_may_use_memory_that_was_given_back(sim, streams):
    with sim.module.stream(sim.module.ExternalStream(streams[0])):
        x = torch.empty(4, device="sim")
        sim.hold()
        launch(streams[0], writes=[x])
        del x
    assert sim.faults() == ""


def test_a_stream_that_waits_for_the_default_one_is_a_fault(sim):
    with sim.module.in_context():
        handle = sim.driver.make("cuStreamCreateWithPriority", 0, 0)
    assert "made without CU_STREAM_NON_BLOCKING" in sim.faults()
    sim.driver.call("cuStreamDestroy_v2", handle)


def test_copies_start_and_end_in_pinned_memory(sim, streams):
    x = on_device(4)
    host = torch.zeros(4)
    sim.driver.call("cuMemcpyHtoDAsync_v2", x.data_ptr(), host.data_ptr(), 16, streams[0])
    assert "starts from memory that is not pinned" in sim.faults()


def test_an_error_that_stays_is_what_every_call_returns(sim, streams, x):
    sim.break_device()
    launch(streams[0], reads=[x])
    assert sim.driver.status("cuStreamQuery", streams[1]) == 600 or sim.pending(streams[1]) == 0
    sim.go()
    with sim.module.in_context():
        assert sim.driver.status("cuStreamSynchronize", streams[0]) == 700
    assert sim.driver.status("cuStreamQuery", streams[1]) == 700
    sim.repair()


@pytest.mark.parametrize(
    ("use", "arguments"),
    [
        ("cuStreamQuery", (None,)),
        ("cuStreamSynchronize", (None,)),
        ("cuEventRecord", ("event", None)),
        ("cuStreamWaitEvent", (None, "event", 0)),
    ],
)
def test_no_use_of_the_default_stream_is_allowed_while_one_that_it_waits_for_is_recorded(
    sim, streams, use, arguments
):
    """CUDA C++ Programming Guide, "Prohibited and Unhandled Operations"."""
    one = event(sim)
    sim.driver.call("cuEventRecord", one, streams[0])
    arguments = [one if argument == "event" else argument for argument in arguments]
    with sim.blocking_stream() as users, sim.module.in_context():
        with sim.recorded(users, 2) as ended:
            assert sim.driver.status(use, *arguments) == 906
        assert ended == [901]
        with sim.recorded(streams[1], 2) as ended:  # which the default stream does not wait for
            assert sim.driver.status(use, *arguments) == 0
        assert ended == [0]
    with sim.blocking_stream() as users, sim.module.in_context(1), sim.recorded(users, 2) as ended:
        assert sim.driver.status(use, *arguments) == 0  # of another device
    assert ended == [0]
    sim.driver.call("cuEventDestroy_v2", one)


def test_whether_a_stream_is_recorded_may_be_asked_at_any_time(sim, streams):
    """cuda.h, cuStreamIsCapturing."""
    with sim.blocking_stream() as users, sim.module.in_context():
        for stream in (users, streams[0]):
            with sim.recorded(stream, 2) as ended:
                asked = [sim.driver.is_captured(one) for one in (users, streams[0], 0)]
                assert asked == [stream == users, stream == streams[0], stream == users]
            assert ended == [0]
        assert not sim.driver.is_captured(0)


@pytest.mark.parametrize("asks", ["cuEventQuery", "cuEventSynchronize"])
def test_an_event_that_was_recorded_in_a_recording_can_not_be_asked_for(sim, streams, asks):
    one = event(sim)
    with sim.module.in_context():
        with sim.recorded(streams[0], 2) as ended:
            sim.driver.call("cuEventRecord", one, streams[0])
            assert sim.driver.status(asks, one) == 907
        assert ended == [901]
        assert sim.driver.status(asks, one) == 907
        sim.driver.call("cuEventRecord", one, streams[0])
        assert sim.driver.status(asks, one) in (0, 600)
        sim.go()
    sim.driver.call("cuEventDestroy_v2", one)


def test_a_stream_that_waits_for_a_recorded_event_becomes_part_of_the_recording(sim, streams, x):
    one = event(sim)
    kernels = sim.kernels()
    with sim.module.in_context(), sim.recorded(streams[0], 2) as ended:
        sim.driver.call("cuEventRecord", one, streams[0])
        assert sim.driver.status("cuStreamWaitEvent", None, one, 0) == 906
        sim.driver.call("cuStreamWaitEvent", streams[1], one, 0)
        assert sim.driver.is_captured(streams[1])
        launch(streams[1], reads=[x])
    assert (ended, sim.pending(streams[1]), sim.kernels()) == ([904], 0, kernels)
    assert sim.driver.status("cuStreamWaitEvent", streams[1], one, 0) == 907
    sim.driver.call("cuEventDestroy_v2", one)


def test_two_recordings_do_not_meet(sim, streams):
    one, ended = event(sim), []
    with sim.module.in_context(), sim.recorded(streams[0], 2) as first:
        sim.driver.call("cuEventRecord", one, streams[0])
        with sim.recorded(streams[1], 2) as ended:
            assert sim.driver.status("cuStreamWaitEvent", streams[1], one, 0) == 902
    assert (first, ended) == ([901], [901])
    sim.driver.call("cuEventDestroy_v2", one)


def test_a_recorded_stream_waits_for_nothing_outside(sim, streams):
    one = event(sim)
    sim.driver.call("cuEventRecord", one, streams[1])
    with sim.module.in_context(), sim.recorded(streams[0], 2) as ended:
        assert sim.driver.status("cuStreamWaitEvent", streams[0], one, 0) == 905
    assert ended == [901]
    sim.driver.call("cuEventDestroy_v2", one)


def test_a_recording_ends_on_its_stream_and_its_thread(sim, streams):
    one, other = event(sim), []
    graph = c_void_p()

    def end(stream):
        other.append(sim.driver.status("cuStreamEndCapture", stream, byref(graph)))

    with sim.module.in_context(), sim.recorded(streams[0], 2):
        sim.driver.call("cuEventRecord", one, streams[0])
        sim.driver.call("cuStreamWaitEvent", streams[1], one, 0)
        end(streams[1])
    with sim.recorded(streams[1], 0) as ended:
        thread = threading.Thread(target=end, args=(streams[1],))
        thread.start()
        thread.join()
    assert (other, ended) == ([903, 908], [0])
    sim.driver.call("cuEventDestroy_v2", one)
