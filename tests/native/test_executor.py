"""`NativeExecutor` keeps the executors' contract: its stand-in threads with Python functions,
its lanes with C models.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
import weakref

import psutil
import pytest
import torch

from aoti_sched.backends.contracts import CRun, LoadRequest, Work
from aoti_sched.backends.cpu import CpuDevice, set_threads
from aoti_sched.backends.executors.choose import open_executor
from aoti_sched.backends.native import executor as native
from aoti_sched.backends.native.executor import NativeExecutor
from aoti_sched.errors import ResourcesError, RunError
from aoti_sched.queue.selection.placement import MOST_AHEAD
from tests.compiled.backends.executor_contract import (
    FOREVER,
    Function,
    LanesContract,
    collect,
    must,
    readable,
    work,
)
from tests.native.c_model import CModel, Gated, handles
from tests.native.harness import tries
from tests.native.library import ROOT, THROWS_OTHER, THROWS_STANDARD
from tests.threads import cores_of


class TestNativeExecutorsStandIns(LanesContract):
    """Containers that C can't run."""

    @pytest.fixture(autouse=True)
    def no_c(self, monkeypatch):
        monkeypatch.setattr(Function, "c_run", None, raising=False)

    def open(self, lanes):
        self.thread_calls = []

        def set_threads(count):
            self.thread_calls.append((threading.current_thread().name, count))

        return NativeExecutor("cpu", lanes, 2, set_threads)


@pytest.fixture(params=["directly", "through capsules"])
def executor(request, monkeypatch):
    """With both ways from tensors to handles and back; which one is taken depends on the torch."""
    if request.param == "through capsules":
        monkeypatch.setattr(native, "WRAP", "a name that this torch has no function of")
    with contextlib.closing(NativeExecutor("cpu", 2, 2, set_threads)) as executor:
        yield executor


@pytest.fixture
def gated():
    gated = Gated()
    yield gated
    gated.open_gate()


def run(executor, *works, lane=0):
    for one in works:
        executor.submit(lane, one)
    return collect(executor, len(works))


def test_where_a_compiler_was_at_hand_lanes_are_native(monkeypatch):
    monkeypatch.delenv("AOTI_SCHED_EXECUTOR", raising=False)
    with contextlib.closing(open_executor("cpu", 1, 2, set_threads)) as executor:
        assert executor.kind == "native"


def test_a_run_comes_back_with_its_token_and_outputs(executor):
    token, tensors = object(), (torch.ones(2), torch.zeros(3))
    (completion,) = run(executor, CModel(2, 2).work(*tensors, token=token))
    assert completion.token is token
    assert completion.error is None
    for output, tensor in zip(completion.outputs, tensors, strict=True):
        assert output.data_ptr() == tensor.data_ptr()


def test_one_short_run_alone_is_worth_being_looked_for(executor, monkeypatch):
    monkeypatch.setattr(native, "WAKE_UP", FOREVER)
    short = CModel(0, 0)
    assert not executor.submit(0, short.work())  # nothing is known yet
    collect(executor, 1)
    assert executor.submit(0, short.work(token="mine"))
    assert executor.poll()
    assert [completion.token for completion in executor.drain()] == ["mine"]
    assert not readable(executor)
    assert not executor.poll()  # nothing is on its way


def test_two_runs_or_a_long_one_are_not_looked_for(executor, gated, monkeypatch):
    monkeypatch.setattr(native, "WAKE_UP", FOREVER)
    run(executor, CModel(0, 0).work())
    executor.submit(0, gated.work())
    gated.wait_until_inside()
    assert not executor.submit(1, CModel(0, 0).work())
    assert not executor.poll()
    gated.open_gate()
    collect(executor, 2)
    monkeypatch.setattr(native, "WAKE_UP", 0.0)  # so that any run is longer
    assert not executor.submit(0, CModel(0, 0).work())
    collect(executor, 1)


def test_who_looks_in_vain_looks_more_and_more_rarely(executor, gated, monkeypatch):
    monkeypatch.setattr(native, "WAKE_UP", FOREVER)
    monkeypatch.setattr(native, "MOST_VAIN", 7)
    run(executor, CModel(0, 0).work())
    passed_up = []
    for _ in range(5):
        monkeypatch.setattr(native, "WAKE_UP", FOREVER)
        chances = 0
        while not executor.submit(0, CModel(0, 0).work()):
            collect(executor, 1)
            chances += 1
        monkeypatch.setattr(native, "WAKE_UP", 0.0)  # it is not found, or found too late
        executor.poll()
        for _ in tries():
            if executor.drain():
                break
        passed_up.append(chances)
    assert passed_up == [0, 1, 3, 7, 7]


def test_where_there_is_one_core_nobody_looks(monkeypatch):
    monkeypatch.setattr(native, "WAKE_UP", FOREVER)
    with contextlib.closing(NativeExecutor("cpu", 1, 1, set_threads)) as executor:
        for _ in range(2):
            assert not executor.submit(0, CModel(0, 0).work())
            collect(executor, 1)


def test_an_output_that_is_left_out_is_none(executor):
    tensor = torch.ones(2)
    (completion,) = run(executor, CModel(1, 3).work(tensor))
    assert [output if output is None else output.tolist() for output in completion.outputs] == [
        [1, 1],
        None,
        None,
    ]


def test_a_completed_run_leaves_no_handle_behind(executor):
    tensor = torch.ones(2)
    (completion,) = run(executor, CModel().work(tensor))
    assert completion.outputs[0] is tensor
    assert handles(tensor) == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 1, "error": b"the kernel said no"}, "the kernel said no"),
        ({"throws": THROWS_STANDARD, "error": b"thrown across"}, "thrown across"),
        ({"throws": THROWS_OTHER}, "the model threw something that is no std::exception"),
    ],
)
def test_a_failed_run_names_the_model_and_gives_the_runtimes_words(executor, fault, words):
    (completion,) = run(executor, CModel(**fault).work(torch.ones(2), token="mine"))
    assert (completion.token, completion.outputs) == ("mine", None)
    assert isinstance(completion.error, RunError)
    assert str(completion.error) == f"model 'scripted': the run failed: {words}"


@pytest.mark.parametrize("stolen", [0b00, 0b01, 0b11])
@pytest.mark.parametrize("fault", [{"status": 1}, {"throws": THROWS_STANDARD}], ids=str)
def test_a_failed_run_leaves_no_handle_behind(executor, fault, stolen):
    tensors = torch.ones(2), torch.zeros(3)
    run(executor, CModel(2, 2, stolen=stolen, **fault).work(*tensors))
    assert [handles(tensor) for tensor in tensors] == [0, 0]


def test_a_failed_run_is_followed_by_the_next(executor):
    first, second = run(
        executor, CModel(status=1).work(torch.ones(1)), CModel().work(torch.ones(1))
    )
    assert isinstance(first.error, RunError)
    assert second.outputs == [torch.ones(1)]


def test_inputs_are_let_go_before_the_completion_is_seen(executor):
    tensor = torch.ones(2)
    watched = weakref.ref(tensor)
    executor.submit(0, CModel(1, 0, passes_on=0, stolen=0).work(tensor))
    del tensor
    (completion,) = collect(executor, 1)
    assert completion.error is None
    assert watched() is None


def test_outputs_are_what_the_container_makes_its_own(executor):
    copies = CModel(own=lambda outputs: [output.clone() for output in outputs])
    tensor = torch.ones(2)
    (completion,) = run(executor, copies.work(tensor))
    assert completion.outputs[0].data_ptr() != tensor.data_ptr()
    assert handles(tensor) == 0


def test_outputs_that_can_not_be_made_ones_own_fail_their_run_alone(executor, gated):
    def fail(outputs):
        raise MemoryError("no room for a copy")

    executor.submit(0, gated.work())
    gated.wait_until_inside()
    executor.submit(0, CModel(own=fail).work(torch.ones(1), token=1))
    gated.open_gate()
    first, second = collect(executor, 2)
    assert first.error is None
    assert (second.token, second.outputs) == (1, None)
    assert isinstance(second.error, ResourcesError)


def test_stamps_are_of_the_monotonic_clock_and_in_order(executor):
    before = time.monotonic()
    completions = [*run(executor, CModel(0, 0).work()), *run(executor, CModel(0, 0).work())]
    stamps = [stamp for one in completions for stamp in (one.started, one.finished)]
    assert stamps == sorted(stamps)
    assert before <= stamps[0]
    assert stamps[-1] <= time.monotonic()


def test_lanes_run_beside_each_other(executor, gated):
    for lane in range(2):
        executor.submit(lane, gated.work(token=lane))
    gated.wait_until_inside(2)
    gated.open_gate()
    assert {completion.token for completion in collect(executor, 2)} == {0, 1}


def test_a_lane_runs_on_while_python_holds_the_gil(executor):
    """Nothing here lets another thread have it before both works have run."""
    model = CModel(0, 0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(FOREVER)
    try:
        executor.submit(0, model.work())
        executor.submit(0, model.work())
        until = time.monotonic() + FOREVER
        while model.script.runs < 2 and time.monotonic() < until:
            pass
        assert model.script.runs == 2
    finally:
        sys.setswitchinterval(interval)
    assert len(collect(executor, 2)) == 2


def test_a_work_more_than_the_rules_hand_ahead_is_refused_and_leaves_no_handle_behind(
    executor, gated
):
    tensor = torch.ones(2)
    executor.submit(0, gated.work())
    gated.wait_until_inside()
    for _ in range(MOST_AHEAD):
        executor.submit(0, CModel().work(torch.ones(1)))
    with pytest.raises(
        RuntimeError, match=r"^device cpu: lane 0 is full or closed; nothing was submitted$"
    ):
        executor.submit(0, CModel().work(tensor))
    assert handles(tensor) == 0
    gated.open_gate()
    assert len(collect(executor, 1 + MOST_AHEAD)) == 1 + MOST_AHEAD


def test_a_wrong_number_of_inputs_is_refused_and_leaves_no_handle_behind(executor):
    tensor = torch.ones(2)
    with pytest.raises(ValueError, match="wrong number of inputs"):
        executor.submit(0, CModel(2).work(tensor))
    assert handles(tensor) == 0
    assert not readable(executor)


def test_another_model_where_a_closed_one_lay_is_run_as_what_it_is(executor):
    first = CModel(0, 0, status=1)
    second = CModel(0, 0, function="other_model_run")
    second.c_run = CRun(
        name="model 'second'",
        run=second.c_run.run,
        container=first.c_run.container,  # the system gives the same memory again
        num_inputs=0,
        num_outputs=1,
    )
    (failed,) = run(executor, first.work())
    (completion,) = run(executor, second.work())
    assert isinstance(failed.error, RunError)
    assert (completion.outputs, completion.error) == ([None], None)


def test_c_models_and_python_containers_share_one_descriptor(executor, monkeypatch, gated):
    monkeypatch.setattr(Function, "c_run", None, raising=False)
    go = threading.Event()
    executor.submit(0, gated.work(token="c"))
    executor.submit(0, work(lambda: must(go), token="python"))
    gated.wait_until_inside()
    assert not readable(executor)
    gated.open_gate()
    assert [completion.token for completion in collect(executor, 1)] == ["c"]
    assert not readable(executor)
    go.set()
    assert [completion.token for completion in collect(executor, 1)] == ["python"]


def test_closing_waits_for_c_models_and_for_python_containers(monkeypatch):
    monkeypatch.setattr(Function, "c_run", None, raising=False)
    executor = NativeExecutor("cpu", 1, 2, set_threads)
    model, ran = CModel(0, 0), []
    executor.submit(0, model.work())
    executor.submit(0, model.work())
    executor.submit(0, work(lambda: ran.append("python")))
    executor.close()
    assert (model.script.runs, ran) == (2, ["python"])
    executor.close()


def test_a_closed_executor_refuses_and_leaves_no_handle_behind(executor):
    tensor = torch.ones(2)
    executor.close()
    with pytest.raises(RuntimeError, match="full or closed"):
        executor.submit(0, CModel().work(tensor))
    assert handles(tensor) == 0


def test_each_lane_stays_on_the_core_it_is_given():
    cores = sorted(os.sched_getaffinity(0))
    affinity = [cores[-1], cores[0]]
    with contextlib.closing(NativeExecutor("here", 2, 2, set_threads, affinity)) as executor:
        for lane in range(2):
            run(executor, CModel(0, 0).work(), lane=lane)
        for lane, core in enumerate(affinity):
            assert cores_of(f"aoti:here:{lane}", {core}) == {core}


def test_closing_gives_the_threads_and_descriptors_back():
    process = psutil.Process()
    before = process.num_fds(), process.num_threads()
    executor = NativeExecutor("cpu", 3, 2, set_threads)
    run(executor, CModel(0, 0).work())
    executor.close()
    for _ in tries():  # the system counts a thread for a moment after it was joined
        if process.num_threads() == before[1]:
            break
    del executor
    assert process.num_fds() == before[0]


def test_outputs_that_nobody_drained_are_freed_with_the_executor():
    tensor = torch.ones(2)
    executor = NativeExecutor("cpu", 1, 2, set_threads)
    executor.submit(0, CModel().work(tensor))
    executor.close()
    assert handles(tensor) == 2  # of the output, and the second one of the input
    del executor
    assert handles(tensor) == 0


def test_at_the_interpreters_exit_what_runs_is_waited_for():
    script = """
import atexit
# Handlers run in reverse order: the gate opens, the executor closes, then this one prints.
atexit.register(lambda: print(gated.script.runs, last.script.runs, flush=True))
from tests.native.test_executor import CModel, Gated, NativeExecutor
gated, last = Gated(), CModel(0, 0)
atexit.register(gated.open_gate)

executor = NativeExecutor("cpu", 1, 2, lambda count: None)
executor.submit(0, gated.work())
executor.submit(0, last.work())
gated.wait_until_inside()
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("1 1\n", "", 0)


@pytest.mark.parametrize(
    "look", ["executor._native.poll(0.5)", "while True: executor._native.poll(0.001)"]
)
def test_a_thread_that_looks_for_completions_when_the_interpreter_ends_does_not_end_the_process(
    look,
):
    """Python ends a thread that wants the GIL back later, and the process with it, since C++
    has promised not to throw there.
    """
    script = f"""
import sys, threading
from aoti_sched.backends.native.executor import NativeExecutor

executor = NativeExecutor("cpu", 1, 2, lambda count: None)
sys.setswitchinterval(1000)  # a thread has the GIL until it gives it up
looking = threading.Event()

def look():
    looking.set()
    {look}

threading.Thread(target=look, daemon=True).start()
looking.wait()
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (result.stderr, result.returncode) == ("", 0)


@pytest.fixture
def mlp(built, tmp_path):
    request = LoadRequest(
        name="mlp",
        path=built("mlp").path,
        model_name=None,
        instances=2,
        sha256=None,
        cache_dir=tmp_path,
    )
    device = CpuDevice()
    with contextlib.closing(device.load(device.inspect(request))) as container:
        yield container


def test_a_compiled_model_runs_on_every_lane_as_it_does_without_them(executor, mlp, built):
    inputs = built("mlp").args
    expected = mlp.run_raw(inputs)
    for lane in range(2):
        (completion,) = run(executor, Work(mlp, inputs, 1, lane), lane=lane)
        assert completion.error is None
        assert all(map(torch.equal, completion.outputs, expected))
    assert [handles(tensor) for tensor in inputs] == [0] * len(inputs)
