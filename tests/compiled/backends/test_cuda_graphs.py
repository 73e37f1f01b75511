"""CUDA graphs over the simulated device: recorded runs give the same results, whatever happens
to the weights and the memory around them.
"""

import gc
import threading

import pytest
import structlog
import torch

from aoti_sched.backends.accelerators import cuda_graphs
from aoti_sched.backends.accelerators.cuda_graphs import ATTEMPTS, MOST_GRAPHS
from aoti_sched.backends.contracts import LoadRequest, Work
from aoti_sched.backends.executors.batches import Batch, gather, whole_shapes
from aoti_sched.errors import ConfigError, DeviceLostError, RunError
from aoti_sched.model.batch_plan import BatchPlan, InputPlan, OutputPlan
from tests.compiled.backends.executor_contract import collect
from tests.compiled.backends.simulation import (
    HOW,
    launch,
    needs_native,
    on_device,
    open_device,
    open_executor,
    work,
)
from tests.native.simulated import model_path, simulator


@pytest.fixture(autouse=True)
def all_graphs_go(sim):
    yield
    gc.collect()
    assert sim.graphs() == 0


@pytest.fixture
def device():
    return open_device("cuda")


@pytest.fixture
def recorded(device, loaded):
    """Loads the model, whose runs are recorded."""
    return lambda **options: loaded(device, cuda_graphs=True, **options)


@pytest.fixture(params=HOW)
def executor(device, request):
    executor = open_executor(device, request.param, 2)
    yield executor
    simulator().go()
    executor.close()


def run(executor, container, x, slot=0):
    executor.submit(0, work(container, x, slot=slot))
    (completion,) = collect(executor, 1)
    if completion.error is not None:
        raise completion.error
    return completion.outputs[0].cpu()


def weights(value):
    return {"weight": torch.full((4,), value)}


@pytest.mark.parametrize("chain", [False, True], ids=["one kernel", "two kernels"])
@pytest.mark.parametrize("home", [None, "cpu"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_a_recorded_run_gives_what_the_run_gave(recorded, executor, sim, where, home, chain):
    container = recorded(copy_inputs=True, copy_outputs=home, chain=chain)
    for number in range(4):
        for rows in (3, 1000):
            x = torch.rand(rows, 4)
            strangers = on_device(rows, 4, value=7.0)  # of the sizes that the run used in between
            assert torch.equal(run(executor, container, x if where == "host" else x.to("sim")), x)
            assert strangers.cpu().unique().tolist() == [7.0]
        assert (container.graphs, sim.graphs()) == (2, 2), number


@pytest.mark.parametrize("row", [0, 6], ids=["expanded", "a part of wider rows"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_a_recorded_run_reads_inputs_that_are_not_dense(recorded, executor, sim, where, row):
    container = recorded(copy_inputs=True, row=row)
    for number in range(4):
        memory = torch.rand(20) if where == "host" else torch.rand(20).to("sim")
        x = memory.as_strided((3, 4), (row, 1))
        assert torch.equal(run(executor, container, x), x.cpu()), number
        assert (container.graphs, sim.graphs()) == (1, 1), number


@pytest.mark.parametrize("home", [None, "cpu"])
def test_one_tensor_that_a_recorded_run_gives_twice_is_one(recorded, executor, home):
    container = recorded(copy_inputs=True, copy_outputs=home, twice=True)
    for value in range(4):
        executor.submit(0, work(container, torch.full((2, 4), float(value))))
        (completion,) = collect(executor, 1)
        one, other = completion.outputs
        assert one is other
        assert one.cpu().unique().tolist() == [float(value)]
    assert container.graphs == 1


def test_the_first_run_of_sizes_is_recorded_and_the_next_is_launched_as_one(
    recorded, executor, sim, monkeypatch
):
    container = recorded()
    launched = []
    once = container._raw.run_single_threaded
    monkeypatch.setattr(
        container._raw,
        "run_single_threaded",
        lambda *args, **options: launched.append(1) or once(*args, **options),
    )
    for rows, launches in [(2, 2), (2, 2), (3, 4), (2, 4), (3, 4)]:
        assert run(executor, container, on_device(rows, 4)).shape == (rows, 4)
        assert len(launched) == launches


def test_outputs_are_their_callers_own_and_the_next_run_does_not_write_over_them(
    recorded, executor
):
    container = recorded()
    first = []
    for value in range(4):
        executor.submit(0, work(container, on_device(2, 4, value=float(value))))
        first.append(collect(executor, 1)[0].outputs[0])
    assert [tensor.cpu().unique().tolist() for tensor in first] == [[0.0], [1.0], [2.0], [3.0]]


def test_inputs_of_any_strides_are_copied_to_the_graphs_own(recorded, executor):
    container = recorded(copy_inputs=True, copy_outputs="cpu")
    wide = torch.rand(3, 8)
    for x in (wide[:, :4].contiguous(), wide[:, ::2], wide[:, 4:], torch.rand(4, 3).t()):
        assert torch.equal(run(executor, container, x), x)
        there = x.to("sim")
        assert torch.equal(run(executor, container, there), x)
    assert container.graphs == 1


def test_slots_have_graphs_of_their_own_and_run_beside_each_other(recorded, executor, sim):
    container = recorded(instances=2, copy_inputs=True, copy_outputs="cpu")
    container.warm_up(lambda: [torch.zeros(2, 4)])
    assert container.graphs == 2
    sim.hold()
    for slot in (0, 1):
        executor.submit(
            slot, work(container, torch.full((2, 4), float(slot)), slot=slot, token=slot)
        )
    if executor.kind == "threads":
        sim.wait_until_waiting(2)
    else:
        sim.wait_until_pending(6)  # each copies, runs, and copies back
    sim.go()
    for completion in collect(executor, 2):
        assert completion.outputs[0].unique().tolist() == [float(completion.token)]


def test_runs_here_are_recorded_as_well(recorded, executor):
    container = recorded(copy_inputs=True, copy_outputs="cpu")
    for value in range(3):
        completion = executor.run_here(work(container, torch.full((2, 4), float(value))))
        assert completion.outputs[0].unique().tolist() == [float(value)]
    assert container.graphs == 1
    assert container.run_raw([torch.ones(2, 4)])[0].tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("where", ["host", "device"])
def test_batches_of_the_same_sizes_share_a_graph(recorded, executor, where):
    container = recorded(copy_inputs=True, copy_outputs="cpu")
    plan = BatchPlan((InputPlan(0, (0, 1)),), (OutputPlan(0),))
    for sizes in ((1, 2), (2, 1), (3,), (1, 1, 1)):
        members = [torch.full((rows, 4), float(rows)) for rows in sizes]
        there = [container.capture_stream([m if where == "host" else m.to("sim")]) for m in members]
        executor.submit(0, Work(container, (), 1, None, Batch(plan, there, sizes, 4, 0)))
        (completion,) = collect(executor, 1)
        assert completion.error is None
        for (output,), member in zip(completion.outputs, members, strict=True):
            assert torch.equal(output.cpu(), member)
    assert container.graphs == 1


def test_the_sizes_of_a_batch_are_those_that_it_is_put_together_in():
    plan = BatchPlan((InputPlan(1, (1, 0), ragged=(0,)), InputPlan(0, (0,))), ())
    members = [[torch.zeros(5, 2), torch.zeros(2)], [torch.zeros(7, 1), torch.zeros(1)]]
    batch = Batch(plan, members, [2, 1], 4, 0)
    assert (
        whole_shapes(batch) == ((7, 4), (4,)) == tuple(tuple(t.shape) for t in gather("m", batch))
    )


# --- weights --------------------------------------------------------------------------------------


def test_graphs_read_the_weights_that_serve(recorded, executor):
    """Each of the two buffers has its own, which stay as long as its memory does."""
    container = recorded()
    x = on_device(2, 4)

    def serves(value, graphs):
        assert run(executor, container, x).unique().tolist() == [value]
        assert run(executor, container, x).unique().tolist() == [value]
        assert container.graphs == graphs

    serves(1.0, 1)
    container.stage(weights(2.0))
    serves(1.0, 1)
    container.swap()
    serves(2.0, 2)
    container.swap()
    serves(1.0, 2)
    for value in (3.0, 4.0, 5.0):  # into memory that is there
        container.stage(weights(value))
        container.swap()
        serves(value, 2)
    container.free_inactive()
    serves(5.0, 1)
    container.stage(weights(6.0))
    container.swap()
    serves(6.0, 2)
    container.rebuild()
    serves(6.0, 1)
    container.free_inactive()
    container.park()
    assert container.graphs == 0
    container.unpark()
    serves(6.0, 1)


def test_a_constant_on_the_host_was_read_when_the_run_was_recorded(recorded, executor):
    container = recorded(mixed=True)
    x = on_device(2, 4)
    for value in (1.0, 2.0, 3.0, 4.0):
        for _ in range(2):
            assert run(executor, container, x).unique().tolist() == [value]
        container.stage({**weights(1.0), "factor": torch.tensor(value + 1)})
        container.swap()


def test_a_set_that_could_not_be_staged_takes_its_graphs_along(recorded, executor, monkeypatch):
    container = recorded()
    x = on_device(2, 4)
    run(executor, container, x)
    container.stage(weights(2.0))
    container.swap()
    run(executor, container, x)
    assert container.graphs == 2
    monkeypatch.setattr(container._raw, "_write", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        container.stage(weights(3.0))
    assert container.graphs == 1
    assert run(executor, container, x).unique().tolist() == [2.0]


# --- what can't be recorded -----------------------------------------------------------------------


def test_a_model_that_waits_for_the_device_is_launched_as_ever_and_the_reason_is_logged(
    recorded, executor
):
    container = recorded(chain=True, copy_inputs=True)
    with structlog.testing.capture_logs() as events:
        for _ in range(3):
            x = torch.rand(13, 4)
            assert torch.equal(run(executor, container, x), x)
    (event,) = [one for one in events if one["event"] == "run not recorded"]
    assert (event["runner"], event["sizes"]) == ("times", [[13, 4]])
    assert "operation not permitted when stream is capturing" in event["error"]
    assert container.graphs == 0
    for _ in range(2):
        assert torch.equal(run(executor, container, x[:3]), x[:3])
    assert container.graphs == 1


def test_a_model_that_draws_random_numbers_is_not_recorded(recorded, executor):
    container = recorded(chain=True)
    with structlog.testing.capture_logs() as events:
        for _ in range(2):
            assert run(executor, container, on_device(17, 4)).unique().tolist() == [1.0]
    (event,) = [one for one in events if one["event"] == "run not recorded"]
    assert "CUDA generator not in capture mode" in event["error"]
    assert container.graphs == 0


def test_a_recording_that_fails_leaves_torchs_allocator_as_it_was(recorded, executor, device, sim):
    """Otherwise no memory that two streams use would ever be given back."""
    container = recorded(chain=True, copy_inputs=True)
    for rows in (13, 17):
        run(executor, container, torch.rand(rows, 4))
    assert (container.graphs, sim.diverted()) == (0, 0)
    shared = on_device(1000, 4)
    address = shared.data_ptr()
    shared.record_stream(device.current_stream())
    del shared
    sim.synchronize()
    assert on_device(1000, 4).data_ptr() == address
    sim.empty_cache()  # torch refuses while memory goes to a pool, and the simulated one tells


def spoilt_by_another(container, monkeypatch, sim):
    """Let another thread wait for the whole device in each recording, and count recordings."""
    once = container._raw.run_single_threaded
    recordings = []

    def launch(inputs, **options):
        if sim.diverted():
            recordings.append(1)
            outside = threading.Thread(target=wait_for_all, args=(sim,))
            outside.start()
            outside.join()
        return once(inputs, **options)

    monkeypatch.setattr(container._raw, "run_single_threaded", launch)
    return recordings


def wait_for_all(sim):
    with sim.module.in_context():
        assert sim._cuda.cuCtxSynchronize() == 900


def test_a_recording_that_another_thread_spoils_is_tried_again(
    recorded, executor, monkeypatch, sim
):
    monkeypatch.setattr(cuda_graphs, "RUNS_BETWEEN", 3)
    container = recorded()
    with monkeypatch.context() as patch:
        recordings = spoilt_by_another(container, patch, sim)
        run(executor, container, on_device(2, 4))
    assert (len(recordings), container.graphs) == (1, 0)
    graphs = []
    for _ in range(4):
        assert run(executor, container, on_device(2, 4)).unique().tolist() == [1.0]
        graphs.append(container.graphs)
    assert graphs == [0, 0, 1, 1]


def test_a_recording_is_tried_so_often_and_not_for_ever(recorded, executor, monkeypatch, sim):
    monkeypatch.setattr(cuda_graphs, "RUNS_BETWEEN", 1)
    container = recorded()
    recordings = spoilt_by_another(container, monkeypatch, sim)
    with structlog.testing.capture_logs() as events:
        for _ in range(ATTEMPTS + 3):
            run(executor, container, on_device(2, 4))
    assert len(recordings) == ATTEMPTS
    assert [e["attempt"] for e in events if e["event"] == "run not recorded"] == [1, 2, 3]
    assert container.graphs == 0


def test_graphs_keep_their_workspaces_whoever_clears_them(recorded, executor, sim):
    """As torch's graph trees do, and torch's own graphs when one of them is closed."""
    container = recorded(chain=True)
    x = on_device(2, 4)
    for _ in range(2):
        run(executor, container, x)
    sim.clear_workspaces()
    sim.empty_cache()
    strangers = [torch.full((1024,), 7.0).to("sim") for _ in range(8)]
    assert run(executor, container, x).unique().tolist() == [1.0]
    assert all(one.cpu().unique().tolist() == [7.0] for one in strangers)


def test_closing_some_graphs_of_a_slot_leaves_the_others_their_memory(recorded, executor, sim):
    container = recorded(chain=True)
    x = on_device(2, 4)
    for value in (2.0, 3.0, 4.0):
        run(executor, container, x)
        container.stage(weights(value))
        container.swap()
        run(executor, container, x)
        container.free_inactive()
        sim.empty_cache()
        for _ in range(2):
            assert run(executor, container, x).unique().tolist() == [value**2]


def test_the_memory_of_graphs_goes_back_to_the_device_with_the_last_of_them(recorded, device, sim):
    sim.clear_workspaces()
    sim.empty_cache()
    before = sim.reserved(), sim.streams(), sim.events(), sim.workspaces()
    container = recorded(chain=True, instances=2)
    for rows in (2, 3):
        for slot in (0, 1):
            container.run_work(work(container, on_device(rows, 4), slot=slot))
    assert container.graphs == 4
    container.close()
    device._events.clear()
    gc.collect()
    sim.empty_cache()
    assert (sim.reserved(), sim.streams(), sim.workspaces()) == (before[0], before[1], before[3])


def test_empty_inputs_are_not_recorded(recorded, executor):
    container = recorded(copy_inputs=True)
    for _ in range(2):
        assert run(executor, container, torch.zeros(0, 4)).shape == (0, 4)
    assert container.graphs == 0


def test_no_more_than_so_many_sizes_are_recorded_and_others_run_all_the_same(recorded, executor):
    container = recorded(copy_inputs=True, copy_outputs="cpu")
    with structlog.testing.capture_logs() as events:
        for rows in (*range(1, MOST_GRAPHS + 4), 1, MOST_GRAPHS + 2):
            x = torch.rand(rows, 4)
            assert torch.equal(run(executor, container, x), x)
    assert container.graphs == MOST_GRAPHS
    assert [
        event["most"] for event in events if event["event"] == "no more graphs are recorded"
    ] == [MOST_GRAPHS]


def test_what_can_not_be_recorded_at_all_is_refused(recorded, device, monkeypatch):
    container = recorded()
    raw = container._raw
    make = type(container)
    request = LoadRequest(
        name="m",
        path="m.pt2",
        model_name=None,
        instances=1,
        sha256=None,
        cache_dir=None,
        cuda_graphs=True,
    )
    with pytest.raises(
        ConfigError, match="cuda_graphs=True, but its input 'x' lies in the host's memory"
    ):
        make(device, raw, request, None, [0])
    folded = [type("Constant", (), {"spec": type("Spec", (), {"folded": True})})]
    monkeypatch.setattr(type(raw), "constants", folded)
    with pytest.raises(
        ConfigError, match="cuda_graphs=True, but the model computes constants from others"
    ):
        make(device, raw, request, None, [])


def test_an_older_model_serves_its_own_weights_and_takes_no_others(recorded, executor):
    """While its second buffer served, it would refuse to run new sizes."""
    container = recorded(older=True)
    for rows in (2, 3, 2, 3):
        assert run(executor, container, on_device(rows, 4)).unique().tolist() == [1.0]
    assert container.graphs == 2
    assert "runs no new sizes while the second of its buffers serves" in container.updatable
    # What would become of it:
    with container._device.at_work():
        container._raw.stage(container._raw.full_set({"weight": on_device(4, value=2.0)}))
        container._raw.fold(inactive=True)
        container._raw.swap()
        container._raw.free_inactive()
    with pytest.raises(RunError):
        run(executor, container, on_device(5, 4))


def test_a_model_that_records_itself_is_refused(recorded, device, tmp_path):
    path = tmp_path / "own.so"
    path.write_bytes(model_path().read_bytes() + b"\0aoti_torch_cuda_graph_replay\0")
    request = LoadRequest(
        name="own",
        path=path,
        model_name=None,
        instances=1,
        sha256=None,
        cache_dir=tmp_path / "cache",
        cuda_graphs=True,
    )
    with pytest.raises(ConfigError, match="compiled to record its runs itself"):
        device.inspect(request)


# --- faults ---------------------------------------------------------------------------------------


def test_a_run_that_fails_while_it_is_recorded_leaves_nothing_behind(
    recorded, executor, sim, monkeypatch
):
    container = recorded()
    once = container._raw.run_single_threaded
    calls = []

    def fail(inputs, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RunError("no memory")
        return once(inputs, **options)

    monkeypatch.setattr(container._raw, "run_single_threaded", fail)
    for _ in range(2):
        assert run(executor, container, on_device(2, 4)).unique().tolist() == [1.0]
    assert (container.graphs, sim.graphs(), len(calls)) == (0, 0, 3)


def test_a_device_that_breaks_under_a_graph_is_lost(recorded, executor, sim):
    container = recorded(copy_inputs=True)
    for _ in range(2):
        run(executor, container, torch.ones(2, 4))
    sim.break_device()
    with pytest.raises(DeviceLostError, match="sim:0 is lost: CUDA_ERROR_ILLEGAL_ADDRESS"):
        run(executor, container, torch.ones(2, 4))
    container.close()
    assert sim.graphs() == 1  # it ends with the process
    assert sim.faults() == ""
    sim.repair()


def test_memory_that_is_not_there_for_a_graphs_outputs_fails_its_run_alone(recorded, executor, sim):
    container = recorded()
    x = on_device(1000, 4)
    run(executor, container, x)
    sim.empty_cache()
    sim.memory_limit(sim.reserved() + 1024)
    with pytest.raises((RunError, torch.OutOfMemoryError), match="out of memory"):
        run(executor, container, x)
    sim.memory_limit(0)
    assert run(executor, container, x).unique().tolist() == [1.0]


def test_nobody_waits_for_the_whole_device_while_a_run_is_recorded(
    recorded, executor, device, sim, monkeypatch
):
    """An update whose tensors lie on the device does; it would fail, and the recording with it."""
    container = recorded()
    once = container._raw.run_single_threaded
    waiting = []
    device.recording = AskedFor()

    def meanwhile(inputs, **options):
        if device.recording.lock.locked():
            waiting.append(threading.Thread(target=device.synchronize))
            waiting[0].start()
            device.recording.by_another.wait()
        return once(inputs, **options)

    monkeypatch.setattr(container._raw, "run_single_threaded", meanwhile)
    run(executor, container, on_device(2, 4))
    waiting[0].join()
    assert container.graphs == 1  # or what was recorded would have been spoilt


class AskedFor:
    """A lock that tells when it was wanted while another had it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.by_another = threading.Event()

    def __enter__(self):
        if self.lock.locked():
            self.by_another.set()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


@needs_native
@pytest.mark.parametrize("executor", ["native"], indirect=True)
@pytest.mark.parametrize("recorded_first", [False, True])
def test_a_lane_takes_no_work_for_its_other_thread_beside_one(
    recorded, executor, sim, recorded_first
):
    """The two would run at once, on one slot and its stream."""
    container = recorded(copy_inputs=True)
    run(executor, container, torch.ones(2, 4))
    known, new = torch.ones(2, 4), torch.ones(3, 4)
    first, second = (known, new) if recorded_first else (new, known)
    sim.hold()
    executor.submit(0, work(container, first, token="first"))
    sim.wait_until_waiting(1)
    with pytest.raises(RuntimeError, match="lane 0 has a work under way on its other thread"):
        executor.submit(0, work(container, second, token="second"))
    sim.go()
    (completion,) = collect(executor, 1)
    assert (completion.token, completion.error) == ("first", None)
    executor.submit(0, work(container, second, token="second"))
    assert collect(executor, 1)[0].error is None


def test_inputs_are_held_until_a_graph_has_copied_them(recorded, executor, sim):
    container = recorded()
    run(executor, container, on_device(64, 4))
    x = on_device(64, 4)
    sim.synchronize()
    sim.hold()
    executor.submit(0, work(container, x))
    del x
    sim.wait_until_pending(1)
    sim.go()
    assert collect(executor, 1)[0].error is None


def test_a_graph_waits_for_what_the_callers_stream_was_given_before(
    recorded, executor, device, sim
):
    container = recorded()
    run(executor, container, on_device(2, 4))
    x = on_device(2, 4)
    other = device.open_stream()
    sim.synchronize()
    sim.hold()
    with other.current():
        launch(other.handle, writes=[x])
        one = work(container, x)
    executor.submit(0, one)
    sim.wait_until_pending(3)
    sim.go()
    assert collect(executor, 1)[0].error is None
    other.close()


@needs_native
@pytest.mark.parametrize("executor", ["native"], indirect=True)
def test_native_lanes_refuse_a_graph_that_is_not_their_models(recorded, executor, device):
    from aoti_sched.backends.native import _native

    with pytest.raises(ValueError, match="the device launches no graphs"):
        _native.Graph(open_device("xpu").native, executable=1, inputs=[], outputs=[])
    container = recorded()
    x = on_device(2, 4)
    run(executor, container, x)
    in_use = simulator().allocated()
    run_of = container.c_run
    other = _native.Graph(device.native, executable=1, inputs=[], outputs=[])
    for options in (
        {"on": container._slots[0].native, "graph": other},
        {"graph": run_of.graph_of(work(container, x))},
    ):
        run(executor, container, x)  # the model is known to the lanes
        with pytest.raises(
            ValueError, match="the graph is not this model's, or no stream was given for it"
        ):
            executor._native.submit(0, 99, run_of.native, [x], 1, **options)
    assert simulator().allocated() == in_use
