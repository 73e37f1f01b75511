"""A lost device takes nothing along: neither the process, nor what runs on other devices."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from aoti_sched.backends.accelerators.stream_container import StreamTorchRunner
from aoti_sched.backends.executors.batches import Staging
from aoti_sched.errors import DeviceLostError, RunError
from tests.compiled.backends.executor_contract import collect
from tests.compiled.backends.simulation import load, open_device, open_executor, work
from tests.native.simulated import simulator

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("executor", ["native", "threads"])
@pytest.mark.parametrize("how", ["eager", "graphs", "parked"])
def test_a_process_that_loses_a_device_serves_on_and_ends_well(how, executor, monkeypatch):
    if executor == "threads":
        monkeypatch.setenv("AOTI_SCHED_EXECUTOR", executor)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.native.lost_device", how],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (ran.returncode, ran.stdout.splitlines()[-1:]) == (0, ["ended well"]), (
        ran.stdout + ran.stderr
    )


@pytest.mark.parametrize("how", ["native", "threads"])
def test_a_device_that_can_not_even_be_asked_is_lost_and_completions_come(
    how, tmp_path, monkeypatch
):
    """What is drained with a failed run must not be lost with it."""
    sim = simulator()
    device = open_device("cuda")
    container = load(device, tmp_path)
    executor = open_executor(device, how, 2)
    call = device.driver.call

    def no_context(function, *arguments):
        if function == "cuCtxGetCurrent":
            raise RunError("cuCtxGetCurrent failed: CUDA_ERROR_CONTEXT_IS_DESTROYED")
        call(function, *arguments)

    failing = work(container, torch.ones(2, 4))  # on the host, and not checked
    executor.submit(0, failing)
    with monkeypatch.context() as patch:
        patch.setattr(device.driver, "call", no_context)
        (completion,) = collect(executor, 1)
        device.look_after_failure()
    assert isinstance(completion.error, (RunError, DeviceLostError))
    assert "CONTEXT_IS_DESTROYED" in device.lost()
    executor.close()
    container.close()  # frees nothing
    device._lost = ""
    container._raw._handle = container._c_run.container
    container._raw.close()
    sim.go()


@pytest.mark.parametrize("step", ["close", "park"])
def test_torchs_own_runner_is_kept_on_a_lost_device(step):
    """Its end would free the model."""

    class Runner:
        pass

    device = open_device("cuda")
    for lost in ("it burns", ""):
        device._lost = lost
        container = StreamTorchRunner.__new__(StreamTorchRunner)
        container._device, container._slots, container.staging = device, [], Staging("m")
        container._runner = Runner()
        runner = weakref.ref(container._runner)
        getattr(container, step)()
        del container
        gc.collect()
        assert (runner() is not None) == bool(lost)


def test_the_device_is_asked_before_anything_is_freed(tmp_path):
    """A device can be lost before any run has reported it."""
    sim = simulator()
    sim.repair()
    device = open_device("cuda")
    container = load(device, tmp_path, older=True)
    x = torch.ones(2, 4).to("sim")
    sim.break_device()
    with pytest.raises(DeviceLostError):
        container.run_raw([x])
    device._lost = ""  # as if the run had been a stranger's
    container.free_inactive()
    container.close()
    assert device.lost()
    assert sim.faults() == ""
    sim.repair()
