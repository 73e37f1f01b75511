"""Containers of compiled models, closed when the test is over; the simulated device and what is
opened on it; and processes that may die in a test's place.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch

from aoti_sched.backends.aoti.c_abi import Library
from aoti_sched.backends.aoti.raw_container import RawContainer
from tests.compiled.backends import simulation
from tests.models import ROOT, build
from tests.native.simulated import simulator


@pytest.fixture
def load() -> Iterator[Callable[..., RawContainer]]:
    """`load("mlp", instances=2)`: a container of a compiled model."""
    opened = []

    def open_container(name: str, instances: int = 1) -> RawContainer:
        container = RawContainer(Library(build(name).library()), instances)
        opened.append(container)
        return container

    yield open_container
    for container in opened:
        container.close()


@pytest.fixture
def sim():
    """The simulated device. After the test, it has seen no rule broken.

    It also has no memory and no recording of the test, and no error of this thread is pending.
    """
    sim = simulator()
    sim.clear_workspaces()
    sim.last_error()
    before = sim.allocated(), sim.pinned()
    yield sim
    sim.go()
    sim.clear_workspaces()
    if (sim.allocated(), sim.pinned()) != before:
        gc.collect()
    fault = sim.faults()
    sim.repair()
    left = sim.allocated() - before[0], sim.pinned() - before[1]
    assert (fault, left, sim.diverted(), sim.last_error()) == ("", (0, 0), 0, 0)


@pytest.fixture(params=["native", "threads"])
def executors(request):
    """Opens executors of a device, of either kind, and closes them."""
    opened = []

    def open_executor(device, lanes=None):
        lanes = lanes or simulation.lanes_of("mps" if device.one_at_a_time else "cuda")
        opened.append(simulation.open_executor(device, request.param, lanes))
        return opened[-1]

    yield open_executor
    simulator().go()
    for executor in opened:
        executor.close()


@pytest.fixture
def loaded(tmp_path):
    """Loads the compiled model, and closes what was loaded."""
    containers = []

    def load_model(device, **options):
        containers.append(simulation.load(device, tmp_path, **options))
        return containers[-1]

    yield load_model
    simulator().go()
    for container in containers:
        container.close()


PRELUDE = """
import ctypes, sys
import torch
from aoti_sched.backends.aoti.c_abi import ConstantEntry, Library
from aoti_sched.backends.aoti.handles import handles_of
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.errors import *
from tests.models import build

def load(name):
    return RawContainer(Library(build(name).library()))
"""


@pytest.fixture
def in_own_process() -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run lines of Python in a process of their own, with `load` and the C ABI at hand."""

    def run(lines: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(lines)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


class _MallocInfo(ctypes.Structure):
    # The last but two of ten sizes is what is handed out, the fifth what is mapped for large
    # blocks.
    _fields_ = tuple((f"field_{index}", ctypes.c_size_t) for index in range(10))


def heap_bytes() -> int:
    """Bytes that malloc has handed out and not got back, in the whole process."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return int(info.field_7 + info.field_4)


def owners(tensor: torch.Tensor) -> int:
    """How many tensors and handles share a tensor's memory, on both sides of the C ABI."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))
