"""C models on the calling thread: through the native module, and through ctypes where it is not
built.
"""

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from aoti_sched.backends.aoti.c_abi import libtorch
from aoti_sched.backends.contracts import Work
from aoti_sched.backends.cpu import set_threads
from aoti_sched.backends.executors.threads import ThreadsExecutor
from aoti_sched.errors import ResourcesError, RunError
from tests.compiled.backends.executor_contract import (
    MKL,
    readable,
    set_thread_counts,
    thread_counts,
)
from tests.native.c_model import CModel, handles
from tests.native.library import ROOT

BUILT = importlib.util.find_spec("aoti_sched.backends.native._native") is not None


def address(library, name):
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value


@pytest.fixture(
    params=[
        "threads",
        pytest.param(
            "native", marks=pytest.mark.skipif(not BUILT, reason="the native module is not built")
        ),
    ]
)
def executor(request):
    if request.param == "threads":
        executor = ThreadsExecutor("cpu", 1, set_threads)
    else:
        from aoti_sched.backends.native.executor import NativeExecutor

        executor = NativeExecutor("cpu", 1, 2, set_threads)
    with contextlib.closing(executor):
        yield executor


def test_outputs_come_back_with_the_token_and_none_where_one_is_left_out(executor):
    token, tensor = object(), torch.ones(2)
    completion = executor.run_here(CModel(1, 3).work(tensor, token=token))
    assert completion.token is token
    assert completion.error is None
    assert completion.outputs[0] is tensor
    assert completion.outputs[1:] == [None, None]
    assert handles(tensor) == 0
    assert not readable(executor)


def test_outputs_are_what_the_container_makes_its_own(executor):
    tensor = torch.ones(2)
    copies = CModel(own=lambda outputs: [output.clone() for output in outputs])
    (output,) = executor.run_here(copies.work(tensor)).outputs
    assert output.data_ptr() != tensor.data_ptr()


def test_outputs_that_can_not_be_made_ones_own_fail_the_run_and_are_freed(executor):
    def fail(outputs):
        raise MemoryError("no room for a copy")

    tensor = torch.ones(2)
    completion = executor.run_here(CModel(own=fail).work(tensor, token="mine"))
    assert (completion.token, completion.outputs) == ("mine", None)
    assert isinstance(completion.error, ResourcesError)
    assert handles(tensor) == 0
    watched = weakref.ref(tensor)
    del tensor
    assert watched() is None  # though the error is kept


@pytest.mark.parametrize("stolen", [0b00, 0b01, 0b11])
def test_a_failed_run_gives_the_models_name_and_the_runtimes_words_and_frees_everything(
    executor, stolen
):
    tensors = torch.ones(2), torch.zeros(3)
    model = CModel(2, 2, status=1, error=b"the kernel said no", stolen=stolen)
    completion = executor.run_here(model.work(*tensors, token="mine"))
    assert (completion.token, completion.outputs) == ("mine", None)
    assert isinstance(completion.error, RunError)
    assert str(completion.error) == "model 'scripted': the run failed: the kernel said no"
    assert [handles(tensor) for tensor in tensors] == [0, 0]


def test_words_that_are_not_utf8_are_given_all_the_same(executor):
    completion = executor.run_here(CModel(status=1, error=b"no \xff").work(torch.ones(1)))
    assert str(completion.error).endswith("no \N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_inputs_fails_the_run_before_a_handle_is_made(executor, count):
    model, tensor = CModel(2), torch.ones(2)
    completion = executor.run_here(model.work(*[tensor] * count, token="mine"))
    assert (completion.token, completion.outputs) == ("mine", None)
    assert isinstance(completion.error, ValueError)
    assert (handles(tensor), model.script.runs) == (0, 0)


def test_what_is_no_tensor_fails_the_run(executor):
    model = CModel(2)
    completion = executor.run_here(model.work(torch.ones(2), "no tensor"))
    assert isinstance(completion.error, TypeError)
    assert model.script.runs == 0


def test_a_forked_child_is_refused(executor):
    script = f"""
import os, signal, sys, torch
from aoti_sched.backends.executors.choose import open_executor
from aoti_sched.errors import UnsupportedLoopError
from tests.native.c_model import CModel

os.environ["AOTI_SCHED_EXECUTOR"] = "{executor.kind}"
executor = open_executor("cpu", 1, 2, lambda count: None)
work = CModel().work(torch.ones(1))
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a child that hangs
    try:
        executor.submit(0, work)
    except UnsupportedLoopError as error:
        print(error)
    error = executor.run_here(work).error
    print(type(error).__name__, error, flush=True)
    sys.exit(0)
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status), flush=True)
executor.close()
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    refusal = (
        "device cpu: the process was forked after the lanes were made; make a new Scheduler in the "
        "child"
    )
    assert result.stdout.splitlines() == [refusal, f"UnsupportedLoopError {refusal}", "child 0"]
    assert (result.stderr, result.returncode) == ("", 0)


def test_the_gil_is_kept(executor):
    """To give it up around a call of a few microseconds costs more than the call."""
    model = CModel(probe=address(ctypes.pythonapi, "PyGILState_Check"))
    executor.run_here(model.work(torch.ones(2)))
    assert model.script.probed == 1


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize(
    "function",
    ["omp_get_max_threads", *(["MKL_Get_Max_Threads"] if MKL else [])],
    ids=lambda name: name[:3],
)
@pytest.mark.parametrize("before", [(1, 0), (3, 3), (2, 1)] if MKL else [(1, 0), (3, 0)], ids=str)
def test_the_run_has_the_threads_it_asks_for_and_its_thread_has_its_own_again_after(
    executor, before, function, status
):
    model = CModel(status=status, probe=address(libtorch, function))
    after = []

    def body():
        set_thread_counts(*before)
        executor.run_here(model.work(torch.ones(2), threads=3))
        after.append(thread_counts())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert model.script.probed == 3
    assert after == [before]


def test_a_compiled_model_runs_here_as_it_does_alone(executor, built, tmp_path):
    from aoti_sched.backends.contracts import LoadRequest
    from aoti_sched.backends.cpu import CpuDevice

    request = LoadRequest(
        name="mlp",
        path=built("mlp").path,
        model_name=None,
        instances=2,
        sha256=None,
        cache_dir=tmp_path,
    )
    inputs = built("mlp").args
    device = CpuDevice()
    with contextlib.closing(device.load(device.inspect(request))) as container:
        expected = container.run_raw(inputs)
        completion = executor.run_here(Work(container, inputs, 1, None))
        assert completion.error is None
        assert all(map(torch.equal, completion.outputs, expected))
        assert [handles(tensor) for tensor in inputs] == [0] * len(inputs)
