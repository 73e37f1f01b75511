"""The simulated device in this process: its driver, torch's tensors on it (kind "sim"), a
compiled model for it, and the backends of CUDA, XPU and MPS over it.

Torch learns of the device when it is first asked for, and does not forget it again; nothing else in
the process is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

import torch
from torch.utils import rename_privateuse1_backend

from aoti_sched.backends.accelerators.cuda import CLEAR_WORKSPACES, CudaDevice
from aoti_sched.backends.accelerators.cuda_driver import Driver
from aoti_sched.backends.accelerators.cuda_graphs import GraphContainer
from aoti_sched.backends.accelerators.mps import MpsDevice
from aoti_sched.backends.accelerators.xpu import XpuDevice
from aoti_sched.backends.aoti.handles import address_of
from tests.native.library import DRIVER_SOURCES, HERE, compile_once

KIND = "sim"
_TORCH = Path(torch.__file__).parent
_INCLUDE = [f"-I{_TORCH / 'include'}", f"-I{_TORCH / 'include/torch/csrc/api/include'}"]
_LINK = [
    "-Wl,--no-as-needed",
    f"-L{_TORCH / 'lib'}",
    "-ltorch_cpu",
    "-lc10",
    f"-Wl,-rpath,{_TORCH / 'lib'}",
]


def driver_path() -> Path:
    return compile_once(
        "libcuda.so.1", DRIVER_SOURCES, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"
    )


def model_path(
    *,
    older: bool = False,
    mixed: bool = False,
    chain: bool = False,
    twice: bool = False,
    row: int = 4,
) -> Path:
    """The compiled model.

    An older one is as torch 2.12 compiles it, a mixed one has a factor on the host, a chain is two
    kernels and a workspace, and with `twice` one tensor is two outputs. Rows of its input lie `row`
    elements apart.
    """
    flags = ["-DOLDER"] * older + ["-DMIXED"] * mixed + ["-DCHAIN"] * chain + ["-DTWICE"] * twice
    flags += [f"-DROW={row}"] * (row != 4)
    return compile_once(
        "device_model.so",
        [HERE / "device_model.cpp"],
        "-shared",
        "-fPIC",
        *flags,
        *_links(),
        str(torch_path()),
        f"-Wl,-rpath,{torch_path().parent}",
    )


def torch_path() -> Path:
    return compile_once(
        "simulated_torch.so",
        [HERE / "simulated_torch.cpp"],
        *("-shared", "-fPIC", "-std=c++20", "-O0", "-Wl,-soname,simulated_torch.so"),
        *_INCLUDE,
        *_links(),
    )


def _links() -> list[str]:
    return [*_LINK, str(driver_path()), f"-Wl,-rpath,{driver_path().parent}"]


class Simulator:
    """The test's hand on the device."""

    def __init__(self) -> None:
        self.driver = Driver(str(driver_path()))
        self._cuda = cuda = ctypes.CDLL(str(driver_path()))
        cuda.sim_pending.argtypes = (c_void_p,)
        cuda.sim_allocated.restype = cuda.sim_kept.restype = c_size_t
        cuda.sim_reserved.restype = c_size_t
        cuda.sim_begin_pool.argtypes = (c_void_p, c_int)
        cuda.sim_priority.argtypes = (c_void_p,)
        self.priority = cuda.sim_priority
        cuda.sim_kept.argtypes = (c_void_p,)
        cuda.sim_stream.restype = cuda.sim_blocking_stream.restype = c_void_p
        cuda.sim_memory_limit.argtypes = (c_size_t,)
        cuda.sim_faults.argtypes = (c_void_p,)
        self._torch = ctypes.CDLL(str(torch_path()))
        self._torch.simulated_current_stream.restype = c_void_p
        self._torch.simulated_set_stream.argtypes = (c_void_p,)
        self._torch.simulated_register()
        rename_privateuse1_backend(KIND)
        self.module = Module(self)
        self.internals = Internals(self)
        torch._register_device_module(KIND, self.module)
        self.hold, self.go, self.step = cuda.sim_hold, cuda.sim_go, cuda.sim_step
        self.repair, self.take, self.memory_limit = (
            cuda.sim_repair,
            cuda.sim_take,
            cuda.sim_memory_limit,
        )
        self.kernels, self.most_threads = cuda.sim_kernels, cuda.sim_most_threads
        self.streams, self.pinned, self.events = cuda.sim_streams, cuda.sim_pinned, cuda.sim_events
        self.pinned_ever = cuda.sim_pinned_ever
        self.allocated, self.waiting, self.graphs = (
            cuda.sim_allocated,
            cuda.sim_waiting,
            cuda.sim_graphs,
        )
        self.reserved, self.empty_cache = cuda.sim_reserved, cuda.sim_empty_cache
        self.diverted, self.refusals = cuda.sim_diverted, cuda.sim_refusals
        self.refuse_waits, self.refused_waits = cuda.sim_refuse_waits, cuda.sim_refused_waits
        self.spinning, self.last_error = cuda.sim_spinning, cuda.cudaGetLastError
        self.workspaces = self._torch.simulated_workspaces
        self.clear_workspaces = self._torch.simulated_clear_workspaces

    def synchronize(self) -> None:
        assert self._cuda.cuCtxSynchronize() == 0

    def pending(self, stream: int = 0) -> int:
        return self._cuda.sim_pending(stream or None)

    def break_device(self, error: int = 700, index: int = 0) -> None:
        self._cuda.sim_break(error, index)

    @contextlib.contextmanager
    def blocking_stream(self) -> Iterator[int]:
        """A stream of a user's that the default stream waits for, unlike all of torch's."""
        with self.module.in_context():
            stream = self._cuda.sim_blocking_stream()
        yield stream
        self.driver.call("cuStreamDestroy_v2", stream)

    @contextlib.contextmanager
    def recorded(self, stream: int, mode: int = 0) -> Iterator[list[int]]:
        """What a user does: record a stream, by default so that it concerns all threads.

        At the end, the list that is yielded has the status of the recording's end.
        """
        ended: list[int] = []
        graph = c_void_p()
        assert self._cuda.cuStreamBeginCapture_v2(c_void_p(stream), mode) == 0
        try:
            yield ended
        finally:
            ended.append(self._cuda.cuStreamEndCapture(c_void_p(stream), ctypes.byref(graph)))
            if graph.value:
                self._cuda.cuGraphDestroy(graph)

    def wait_until_pending(self, count: int) -> None:
        assert self._cuda.sim_wait_until_pending(count), (
            f"{count} pieces of work were not given to the device"
        )

    def wait_until_waiting(self, count: int) -> None:
        assert self._cuda.sim_wait_until_waiting(count), (
            f"{count} threads do not wait for the device"
        )

    def faults(self) -> str:
        """The first rule that was broken, in words; "" when none was."""
        text = c_char_p()
        count: int = self._cuda.sim_faults(ctypes.byref(text))
        return (text.value or b"").decode() if count else ""

    @property
    def current_stream(self) -> int:
        return self._torch.simulated_current_stream() or 0

    @current_stream.setter
    def current_stream(self, handle: int) -> None:
        self._torch.simulated_set_stream(handle or None)

    @property
    def context(self) -> int | None:
        """The calling thread's."""
        context = c_void_p()
        self.driver.call("cuCtxGetCurrent", ctypes.byref(context))
        return context.value

    def address(self, name: str) -> int:
        """Of a function of torch, as if torch had been built with such devices."""
        name = {CLEAR_WORKSPACES: "simulated_clear_workspaces_for_stream"}.get(name, name)
        name = name.replace("xpu", "cuda")
        function = getattr(self._torch, name, None)
        return address_of(name) if function is None else ctypes.cast(function, c_void_p).value or 0

    def cuda(self, index: int = 0) -> CudaDevice:
        device = CudaDevice(
            index,
            self.driver,
            GraphContainer,
            module=self.module,
            internals=self.internals,
            type=KIND,
        )
        return self._over(device)

    def xpu(self, index: int = 0) -> XpuDevice:
        return self._over(XpuDevice(index, module=self.module, type=KIND))

    def mps(self) -> MpsDevice:
        device = self._over(MpsDevice(module=self.module, type=KIND))
        device.preserve_current_device = (
            self.module.in_context
        )  # MPS has no contexts; the simulated driver has
        return device

    def _over(self, device):
        device.address = self.address
        return device


class Stream(torch.Stream):
    """A stream as torch.cuda and torch.xpu have them."""

    simulator: Simulator

    @property
    def cuda_stream(self):
        return self.stream_id

    sycl_queue = cuda_stream

    def record_event(self):
        event = Event(self.simulator)
        event.record(self)
        return event

    def wait_event(self, event):
        self.simulator.driver.call("cuStreamWaitEvent", self.stream_id or None, event.handle, 0)

    def synchronize(self):
        with self.simulator.module.in_context():
            self.simulator.driver.call("cuStreamSynchronize", self.stream_id or None)


class Event:
    def __init__(self, simulator):
        self._simulator = simulator
        with simulator.module.in_context():
            self.handle = simulator.driver.make("cuEventCreate", 2)

    def record(self, stream):
        with self._simulator.module.in_context():
            self._simulator.driver.call("cuEventRecord", self.handle, stream.stream_id or None)

    def __del__(self):
        self._simulator.driver.status("cuEventDestroy_v2", self.handle)


class Internals:
    """The functions of `torch._C` by which memory comes from a graph's pool."""

    def __init__(self, simulator):
        self._simulator = simulator

    def _cuda_beginAllocateCurrentStreamToPool(self, index, pool):
        stream = self._simulator.current_stream
        must(self._simulator._cuda.sim_begin_pool(stream, pool[1]), "already recording to it")

    def _cuda_endAllocateToPool(self, index, pool):
        must(self._simulator._cuda.sim_end_pool(pool[1]), "not currently recording to it")

    def _cuda_releasePool(self, index, pool):
        must(self._simulator._cuda.sim_release_pool(pool[1]), "uc >= 0 INTERNAL ASSERT FAILED")


def must(holds, words):
    if not holds:
        raise RuntimeError(words)


class Module:
    """What torch.cuda, torch.xpu and torch.mps are to their devices."""

    def __init__(self, simulator):
        self._simulator = simulator
        Stream.simulator = simulator
        self._pool = []
        self._pools = itertools.count(1)
        self.snapshots = 0

    def init(self):
        """It is there as soon as it is asked for."""

    capability = (8, 0)

    def get_device_capability(self, index=0):
        return self.capability

    def device_count(self):
        return 2

    def is_available(self):
        return True

    def graph_pool_handle(self):
        return (0, next(self._pools))

    def empty_cache(self):
        self._simulator.empty_cache()

    def memory_reserved(self, index=0):
        return self._simulator.reserved()

    def memory_snapshot(self):
        self.snapshots += 1
        cuda = self._simulator._cuda
        streams = [cuda.sim_stream(number) for number in range(1, cuda.sim_most_streams())]
        return [{"device": 0, "stream": one, "total_size": cuda.sim_kept(one)} for one in streams]

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        """Numbers are drawn on the host."""

    def in_context(self, index=0):
        driver = self._simulator.driver
        return driver.current(driver.primary_context(index))

    def ExternalStream(self, handle, device=0):
        return Stream(stream_id=handle, device_index=device, device_type=20)

    def Stream(self, index=0):
        """The next of a pool of 32."""
        if len(self._pool) < 32:
            with self.in_context(index):
                self._pool.append(self._simulator.driver.make("cuStreamCreateWithPriority", 1, 0))
            return self.ExternalStream(self._pool[-1], index)
        self._pool.append(self._pool.pop(0))
        return self.ExternalStream(self._pool[-1], index)

    def current_stream(self, index=0):
        return self.ExternalStream(self._simulator.current_stream, index)

    @contextlib.contextmanager
    def stream(self, stream):
        before = self._simulator.current_stream
        self._simulator.current_stream = stream.stream_id
        try:
            yield
        finally:
            self._simulator.current_stream = before

    @contextlib.contextmanager
    def device(self, index):
        with self.in_context(index):
            yield

    def synchronize(self, index=0):
        with self.in_context(index):
            self._simulator.synchronize()


@functools.cache
def simulator() -> Simulator:
    return Simulator()
