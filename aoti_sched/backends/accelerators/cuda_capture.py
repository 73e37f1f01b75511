"""Captures runs into CUDA graphs, through the driver.

Torch's own `CUDAGraph` is not used. A capture that fails leaves its allocator, its random generator
and the memory of its pool in a state that spoils the process (torch 2.11 and 2.12). Closing one
graph clears the workspaces of its stream, which other graphs may use (torch 2.12 and newer).

Here the driver records, and torch's allocator only directs the memory of the recorded run to a
pool. No random generator takes part, so an operator that draws random numbers raises by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from ctypes import byref, c_void_p
from typing import TYPE_CHECKING, TypeVar

from aoti_sched.backends.accelerators.cuda_driver import AUTO_FREE, THREAD_LOCAL
from aoti_sched.errors import RunError

if TYPE_CHECKING:
    from aoti_sched.backends.accelerators.cuda import CudaDevice

_T = TypeVar("_T")


class Recorder:
    """Records runs whose memory comes from one pool.

    The recorder has a stream of its own. cuBLAS keeps a workspace for each stream, so that one
    lies in the pool too, and stays there when anybody clears the workspaces of the process.

    Args:
        device: The device.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._pool = device.module.graph_pool_handle()
        self._mutex = threading.Lock()
        self._graphs = 0  # that use the pool
        self.stream = device.open_stream()

    @property
    def is_spent(self) -> bool:
        """Whether no graph uses the pool. Torch takes such a pool for no further recording."""
        return self._graphs == 0

    def record(self, launch: Callable[[], _T]) -> tuple[Executable, _T]:
        """Record what `launch` gives to the recorder's stream. Recording executes nothing.

        Returns the executable graph and what `launch` returned.

        Raises:
            RuntimeError: The work can't be recorded, or another thread spoilt the recording.
                Nothing is left of the recording.
        """
        device = self._device
        with device.recording, self.stream.current():
            device.internals._cuda_beginAllocateCurrentStreamToPool(device.index, self._pool)  # noqa: SLF001
            self._count(1)
            graph = c_void_p()
            try:
                try:
                    result = self._captured(launch, graph)
                finally:
                    device.internals._cuda_endAllocateToPool(device.index, self._pool)  # noqa: SLF001
                made = c_void_p()
                device.driver.call("cuGraphInstantiateWithFlags", byref(made), graph, AUTO_FREE)
            except BaseException:
                self.release()
                raise
            finally:
                if graph.value:
                    device.driver.status("cuGraphDestroy", graph)
        return Executable(self, made.value or 0), result

    def _captured(self, launch: Callable[[], _T], graph: c_void_p) -> _T:
        driver, handle = self._device.driver, self.stream.handle
        driver.call("cuStreamBeginCapture_v2", handle, THREAD_LOCAL)
        try:
            result = launch()
        finally:
            status = driver.status("cuStreamEndCapture", handle, byref(graph))
        if status != 0:
            raise RunError(f"the run can't be recorded: {driver.explain(status)}")
        return result

    def destroy(self, executable: int) -> None:
        """Destroy a graph, unless the device is lost."""
        if self._device.is_lost():
            return
        self._device.driver.status("cuGraphExecDestroy", executable)
        self.release()

    def release(self) -> None:
        """Count one user of the pool less."""
        self._device.internals._cuda_releasePool(self._device.index, self._pool)  # noqa: SLF001
        self._count(-1)

    def close(self) -> None:
        """Close the stream. No graph may be left."""
        self.stream.close()

    def _count(self, more: int) -> None:
        with self._mutex:
            self._graphs += more


class Executable:
    """An executable graph.

    Attributes:
        handle: The driver's handle.
    """

    def __init__(self, recorder: Recorder, handle: int) -> None:
        self._recorder = recorder
        self.handle = handle

    def close(self) -> None:
        """Destroy the graph, which must not be running. Its tensors are freed before."""
        handle, self.handle = self.handle, 0
        if handle:
            self._recorder.destroy(handle)
