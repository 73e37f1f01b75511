"""What tests of devices share: each kind of backend over the simulated device, and that the
device saw no rule broken.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, c_int, c_size_t, c_void_p

import pytest
import torch

from aoti_sched.backends.accelerators.slot import Slot
from aoti_sched.backends.contracts import LoadRequest, Work
from aoti_sched.backends.executors.threads import ThreadsExecutor
from tests.native.c_function import CFunction
from tests.native.simulated import model_path, simulator

KINDS = ("cuda", "xpu", "mps")

BUILT = importlib.util.find_spec("aoti_sched.backends.native._native") is not None
needs_native = pytest.mark.skipif(not BUILT, reason="no native lanes were built")
HOW = ("native", pytest.param("launcher", marks=needs_native), "threads")
"""Executors, for `open_executor`."""


def lanes_of(kind):
    return 1 if kind == "mps" else 2


def open_device(kind):
    return getattr(simulator(), kind)()


def open_executor(device, how, lanes):
    """Native lanes, each with a thread or all with one launcher, or Python threads."""
    if how != "threads":
        return device.open_executor(lanes, launchers=1 if how == "launcher" else None)
    executor = ThreadsExecutor(device.name, lanes, lambda count: None)
    executor.lost = device.lost
    executor.workspace = device.workspace
    return executor


def load(
    device,
    cache,
    *,
    instances=1,
    older=False,
    mixed=False,
    chain=False,
    twice=False,
    row=4,
    **options,
):
    """The compiled model on a device: y = x * weight, which is ones.

    `mixed`: and times a factor on the host, 1. `chain`: times weight again. `twice`: y is both of
    two outputs. `row`: elements from one row of x to the next.
    """
    request = LoadRequest(
        name="times",
        path=model_path(older=older, mixed=mixed, chain=chain, twice=twice, row=row),
        model_name=None,
        instances=instances,
        sha256=None,
        cache_dir=cache,
        **options,
    )
    return device.load(device.inspect(request))


def work(container, *inputs, slot=0, token=None):
    return Work(container, container.capture_stream(inputs), 1, token, slot=slot)


def on_device(*shape, value=1.0):
    return torch.full(shape, value).to("sim")


class Slots:
    """Slots of no container, for functions of Python that stand for models."""

    def __init__(self, device, count, inputs, **options):
        request = LoadRequest(
            name="rows",
            path="",
            model_name=None,
            instances=count,
            sha256=None,
            cache_dir=None,
            **options,
        )
        self.slots = [
            Slot(device, device.open_stream(), [False] * inputs, request) for _ in range(count)
        ]

    def close(self):
        for slot in self.slots:
            slot.native = None
            slot.stream.close()


class OnDevice(CFunction):
    """A function of tensors on the device as a model that C runs there; `host` inputs are
    copied over, outputs come home.
    """

    def __init__(self, device, slots, function, inputs, outputs, own):
        def on_the_stream(*tensors):
            with slots[0].stream.current():
                return function(*tensors)

        super().__init__(on_the_stream, inputs, outputs, own)
        self.device = device
        self.c_run.slots = slots
        slots[0]._on_host = [False] * inputs

    def run_work(self, work):
        slot = self.c_run.slots[0]
        with slot.run(work):
            members = [slot.brought(member) for member in work.batch.members]
            batch = type(work.batch)(
                work.batch.plan, members, work.batch.rows, work.batch.padded_rows, work.batch.slot
            )
            return self.staging.run(
                batch, lambda inputs: slot.home(self.detach_outputs(self.function(*inputs)))
            )


# --- kernels of the caller's own ------------------------------------------------------------------


class _Range(ctypes.Structure):
    _fields_ = (("start", c_void_p), ("bytes", c_size_t), ("written", c_int))


_Call = ctypes.CFUNCTYPE(None, c_void_p)


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("run", _Call),
        ("done", c_void_p),
        ("argument", c_void_p),
        ("ranges", c_int),
        ("range", _Range * 4),
    )


_NOTHING = _Call(lambda argument: None)


def launch(stream, *, reads=(), writes=()):
    """A kernel on a stream (its handle; 0 is the default one) that uses these tensors' memory."""
    c = simulator()._cuda
    kernel = _Kernel(_NOTHING)
    for place, (tensor, written) in enumerate(
        [*((t, 0) for t in reads), *((t, 1) for t in writes)]
    ):
        kernel.range[place] = _Range(tensor.data_ptr(), tensor.nbytes, written)
        kernel.ranges += 1
    c.sim_launch.argtypes = (c_void_p, POINTER(_Kernel))
    with simulator().module.in_context():
        assert c.sim_launch(stream or None, kernel) == 0
