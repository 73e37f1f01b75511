"""CUDA: a stream of the driver for each slot. Lanes launch, copy and wait there without the GIL."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from aoti_sched.backends.accelerators.accelerator import Accelerator
from aoti_sched.backends.accelerators.cuda_driver import (
    BLOCKING_SYNC,
    CAPTURING,
    DISABLE_TIMING,
    NON_BLOCKING,
    NOT_READY,
    RELAXED,
    Driver,
)
from aoti_sched.backends.accelerators.streams import Stream
from aoti_sched.errors import RunError
from aoti_sched.events import log

if TYPE_CHECKING:
    from aoti_sched.backends.accelerators.stream_container import StreamContainer
    from aoti_sched.backends.native import _native


CLEAR_WORKSPACES = "_ZN2at4cuda29clearCublasWorkspacesForStreamEP11CUstream_st"
"""`at::cuda::clearCublasWorkspacesForStream(cudaStream_t)`, since torch 2.12."""

CAPTURED = (
    "the current stream is being recorded into a graph, or is the default stream while a stream "
    "that waits for it is. A request is no part of a recording: make it before or afterwards, or "
    "under another current stream"
)
"""As native code says it."""

LONGEST_PAUSE = 1e-3
"""Seconds between two attempts to wait for a stream.

A capture may forbid to wait, and says nothing of the device.
"""

QUEUES = 8
"""The default of `CUDA_DEVICE_MAX_CONNECTIONS`, by the CUDA Programming Guide."""

BETWEEN_MEASUREMENTS = 1.0
"""Seconds after which a question for the memory starts the next measurement."""

RETRIES = 32
"""Attempts to wait for a stream after failures that are no capture's, while the device works."""


class CudaDevice(Accelerator):
    """One CUDA device.

    Args:
        index: The device's number, as torch and the driver count.
        driver: The driver.
        graphs: The class of containers that record their runs; None to record no runs.
        module: Torch's module for the device.
        internals: What has torch's functions for the memory of graphs.
        type: Torch's word for the kind of device. Tests pass another one, with a simulated driver.
    """

    supports_query = True
    waits = ("block", "spin")

    def __init__(
        self,
        index: int,
        driver: Driver,
        graphs: type[StreamContainer] | None,
        *,
        module: Any = torch.cuda,
        internals: Any = torch._C,  # noqa: SLF001
        type: str = "cuda",
    ) -> None:
        self.graph_container = graphs
        self.internals = internals
        self.type = type
        self.index = index
        self.driver = driver
        self.module = module
        module.init()
        self.context = driver.primary_context(index)
        self._asked = driver.idle_stream(self.context)
        self._events: deque[int] = deque()  # the free events
        self._lost = ""
        self.streams: set[int] = set()  # the open ones of slots and graphs
        self._workspace = 0
        self._next_measurement = 0.0
        self.recording = threading.Lock()
        """Taken while a run is recorded: no thread may wait for the whole device meanwhile."""

    def open_stream(self, priority: int = 0) -> CudaStream:
        return CudaStream(self, priority)

    def record(self, stream: Any) -> CudaEvent | _native.Arrival:
        if self.native is not None:
            try:
                return self.native.arrive(stream.cuda_stream)
            except RuntimeError as error:
                raise RunError(str(error)) from None
        with self.driver.current(self.context):  # the default stream belongs to a context
            if self.driver.is_captured(stream.cuda_stream):
                raise RunError(CAPTURED)
            event = CudaEvent(self)
            self.driver.call("cuEventRecord", event.handle, stream.cuda_stream)
        return event

    def current_stream(self) -> Any:
        return self.module.current_stream(self.index)

    def notes(self) -> tuple[str, ...]:
        if self.slots <= QUEUES or "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ:
            return ()
        note = (
            f"The models on {self.name!r} have {self.slots} instances, each with a stream, and the "
            f"device has {QUEUES} queues: streams that share a queue wait for each other. Set "
            "CUDA_DEVICE_MAX_CONNECTIONS=32 before the process starts."
        )
        return (note,)

    def capability(self) -> int | None:
        if torch.version.hip is not None:  # an architecture's name
            return None
        major, minor = self.module.get_device_capability(self.index)
        return int(10 * major + minor)

    def settle(self) -> None:
        with self.driver.current(self.context):
            self.driver.call("cuStreamSynchronize", None)

    def synchronize(self) -> None:
        with self.recording:
            self.module.synchronize(self.index)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Make the device's context the thread's, apart from captures of other threads.

        A call of the runtime that failed leaves the thread an error, which torch's next kernel
        launch on that thread would report as its own. So the error is forgotten here.
        """
        with self.driver.current(self.context), self.driver.apart_from_captures():
            try:
                yield
            except BaseException:
                self.forget_error()
                raise

    @functools.cached_property
    def forget_error(self) -> Callable[[], int]:
        """Forget the thread's last error of CUDA's runtime, and return it."""
        address = self.address("cudaGetLastError")
        return ctypes.CFUNCTYPE(ctypes.c_int)(address) if address else int

    def release_cached(self) -> bool:
        before: int = self.module.memory_reserved(self.index)
        with (
            self.recording,
            self.turn(),
        ):  # torch's allocator can't while memory comes from a graph's pool
            self.module.empty_cache()
        released: bool = self.module.memory_reserved(self.index) < before
        return released

    def clear_workspaces(self, stream: int) -> None:
        """Free the workspaces that cuBLAS keeps for a stream of which no graph is left."""
        address = self.address(CLEAR_WORKSPACES)
        if address:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(stream)

    @contextmanager
    def preserve_current_device(self) -> Iterator[None]:
        # The thread may be a new one, which has no context yet.
        with self.driver.current(self.context), self.module.device(self.index):
            yield

    def native_functions(self) -> dict[str, int]:
        address = self.driver.address
        last_error = self.address("cudaGetLastError")
        return {
            **({"take_last_error": last_error} if last_error else {}),
            "guard": self.address("aoti_torch_create_cuda_stream_guard"),
            "unguard": self.address("aoti_torch_delete_cuda_stream_guard"),
            "get_context": address("cuCtxGetCurrent"),
            "set_context": address("cuCtxSetCurrent"),
            "exchange_capture_mode": address("cuThreadExchangeStreamCaptureMode"),
            "query": address("cuStreamQuery"),
            "is_capturing": address("cuStreamIsCapturing"),
            "make_event": address("cuEventCreate"),
            "destroy_event": address("cuEventDestroy_v2"),
            "wait_for_event": address("cuStreamWaitEvent"),
            "record_event": address("cuEventRecord"),
            "query_event": address("cuEventQuery"),
            "copy_in": address("cuMemcpyHtoDAsync_v2"),
            "copy_out": address("cuMemcpyDtoHAsync_v2"),
            "allocate_host": address("cuMemAllocHost_v2"),
            "free_host": address("cuMemFreeHost"),
            "launch_graph": address("cuGraphLaunch"),
            "explain": address("cuGetErrorString"),
        }

    @property
    def native_context(self) -> int:
        return self.context

    @property
    def native_not_ready(self) -> int:
        return NOT_READY

    @property
    def native_asked(self) -> int:
        return self._asked

    def workspace(self) -> int:
        """As `Executor.workspace`.

        Torch's allocator is locked while it lists its memory, so it is asked only then.
        """
        now = time.monotonic()
        if self.streams and not self._lost and now > self._next_measurement:
            self._next_measurement = math.inf
            threading.Thread(target=self._measure, name=f"aoti:{self.name}:memory").start()
        return self._workspace

    def _measure(self) -> None:
        try:
            segments = self.module.memory_snapshot()
        except RuntimeError:  # the allocator of CUDA itself (cudaMallocAsync) has no snapshot
            return
        streams = set(self.streams)
        self._workspace = sum(
            one["total_size"]
            for one in segments
            if one["device"] == self.index and one["stream"] in streams
        )
        self._next_measurement = time.monotonic() + BETWEEN_MEASUREMENTS

    # --- graphs

    def launch_graph(self, executable: int, stream: int) -> None:
        with self.driver.current(self.context):
            self.driver.call("cuGraphLaunch", executable, stream)

    # --- faults

    def lost(self) -> str:
        return self._lost

    def look_after_failure(self) -> None:
        if self._lost:
            return
        try:
            with self.driver.current(self.context), self.driver.apart_from_captures(RELAXED):
                # After an error that can't be cleared, every later call returns that error.
                status = self.driver.status("cuStreamQuery", self._asked)
        except RunError as error:  # the context itself is gone
            self._lost = str(error)
        else:
            if status in (0, NOT_READY, *CAPTURING):
                return
            self._lost = self.driver.explain(status)
        log.error("device lost", device=self.name, error=self._lost)

    # --- events are kept for later requests

    def take_event(self) -> int:
        try:
            return self._events.popleft()
        except IndexError:
            with self.driver.current(self.context):
                return self.driver.make("cuEventCreate", DISABLE_TIMING)

    def give_event(self, handle: int) -> None:
        self._events.append(handle)


class CudaEvent:
    """An event of the device, released with the last reference to this object.

    By then, the wait has been enqueued on every stream that waits for the event.
    """

    __slots__ = ("_device", "handle")

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.handle = device.take_event()

    def __del__(self) -> None:
        handle = getattr(self, "handle", 0)
        if handle:
            self._device.give_event(handle)


class CudaStream(Stream):
    """A stream that does not wait for the default one."""

    _device: CudaDevice

    def __init__(self, device: CudaDevice, priority: int) -> None:
        self._device = device
        self._driver = device.driver
        with self._driver.current(device.context):
            self.handle = self._driver.make("cuStreamCreateWithPriority", NON_BLOCKING, priority)
            self._end = self._driver.make("cuEventCreate", BLOCKING_SYNC | DISABLE_TIMING)
        self.of_torch = device.module.ExternalStream(self.handle, device=device.index)
        device.streams.add(self.handle)

    def wait_for(self, event: CudaEvent | _native.Arrival) -> None:
        if isinstance(event, CudaEvent):
            with self._driver.current(self._device.context):
                self._driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)
            return
        try:
            event.precede(self.handle)
        except RuntimeError as error:
            raise RunError(str(error)) from None

    def fence(self) -> None:
        pause = LONGEST_PAUSE / 64
        function, argument = self._wait
        with self._device.turn():
            if argument == self._end:
                self._driver.call("cuEventRecord", self._end, self.handle)
            retries = 0
            while (status := self._driver.status(function, argument)) != 0:
                if status not in CAPTURING:
                    retries += 1
                    if retries > RETRIES or self._device.is_lost():
                        break
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        if status != 0:
            raise RunError(f"waiting for the device failed: {self._driver.explain(status)}")

    def native_fence(self) -> dict[str, int]:
        function, argument = self._wait
        event = argument if argument == self._end else 0
        return {"fence": self._driver.address(function), "argument": argument, "event": event}

    @property
    def _wait(self) -> tuple[str, int]:
        """The driver's function that waits for the stream, and its argument."""
        if self._device.spins:
            return "cuStreamSynchronize", self.handle
        return "cuEventSynchronize", self._end

    def close(self) -> None:
        handle, self.handle = self.handle, 0
        self._device.streams.discard(handle)
        if not handle or self._device.is_lost():
            return
        with self._device.turn():
            self._device.clear_workspaces(handle)
            self._driver.status("cuEventDestroy_v2", self._end)
            self._driver.status("cuStreamDestroy_v2", handle)
