"""The functions of CUDA's driver that streams need, through ctypes.

The library is found at run time, so nothing links against CUDA. Calls release the GIL. The CUDA
Driver API reference describes the functions; the header's macros add `_v2` to some names.
`cuStreamSynchronize` and `cuEventSynchronize` block, and so does the first `cuInit`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_int,
    c_size_t,
    c_uint,
    c_uint64,
    c_ulonglong,
    c_void_p,
)
from typing import Any

from aoti_sched.errors import ConfigError, RunError

NON_BLOCKING = 1
"""`CU_STREAM_NON_BLOCKING`: the stream and the default stream do not wait for each other."""
DISABLE_TIMING = 2
"""`CU_EVENT_DISABLE_TIMING`."""
BLOCKING_SYNC = 1
"""`CU_EVENT_BLOCKING_SYNC`: a thread that waits for the event sleeps."""
THREAD_LOCAL = 1
"""`CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: other threads may call anything during a capture."""
RELAXED = 2
"""`CU_STREAM_CAPTURE_MODE_RELAXED`: the thread's own captures don't forbid its calls, either."""
AUTO_FREE = 1
"""`CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH`, as torch instantiates graphs."""
NOT_READY = 600
"""`CUDA_ERROR_NOT_READY`: the stream still has work to do."""
CAPTURING = range(900, 910)
"""`CUDA_ERROR_STREAM_CAPTURE_*`: the call is not allowed while a graph is being recorded.

Such a status does not show a fault of the device.
"""

_idle_streams: dict[int, int] = {}
"""By context. They end with the process, as their contexts do."""
_making = threading.Lock()

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuStreamCreateWithPriority": (POINTER(c_void_p), c_uint, c_int),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamQuery": (c_void_p,),
    "cuStreamIsCapturing": (c_void_p, POINTER(c_int)),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventSynchronize": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


class Driver:
    """The driver's library.

    Raises:
        ConfigError: The library is missing, too old, or can't be initialized.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._cdll = ctypes.CDLL(library)
            for name, arguments in _FUNCTIONS.items():
                function = self._cdll[name]
                function.argtypes, function.restype = arguments, c_int
                setattr(self._cdll, name, function)
        except (OSError, AttributeError) as error:
            raise ConfigError(
                f"CUDA's driver can't be used: {error}. Install a newer driver."
            ) from error
        status = self.status("cuInit", 0)
        if status != 0:
            raise ConfigError(f"CUDA's driver can't be initialized: {self.explain(status)}")

    def status(self, function: str, *arguments: Any) -> int:
        """Call a function and return its status; 0 is success."""
        status: int = getattr(self._cdll, function)(*arguments)
        return status

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            RunError: The function failed. The message has the driver's own explanation.
        """
        status = self.status(function, *arguments)
        if status != 0:
            raise RunError(f"{function} failed: {self.explain(status)}")

    def make(self, function: str, *arguments: int) -> int:
        """Call a function that makes an object, and return the object's handle."""
        made = c_void_p()
        self.call(function, byref(made), *arguments)
        return made.value or 0

    def address(self, function: str) -> int:
        return ctypes.cast(getattr(self._cdll, function), c_void_p).value or 0

    def explain(self, status: int) -> str:
        """Return the driver's name and explanation of a status."""
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            if self.status(function, status, byref(text)) == 0 and text.value:
                texts.append(text.value.decode(errors="replace"))
        return ": ".join(texts) or f"status {status}"

    def device_count(self) -> int:
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        return count.value

    def primary_context(self, index: int) -> int:
        """Return a device's primary context, which torch uses too.

        The context is retained for the life of the process.
        """
        device = c_int()
        self.call("cuDeviceGet", byref(device), index)
        return self.make("cuDevicePrimaryCtxRetain", device.value)

    def idle_stream(self, context: int) -> int:
        """Return a stream of a context that never has work.

        To query it asks the device, and nothing else. The default stream would not do: while a
        stream that it waits for is captured, a query of it fails and spoils the capture (CUDA C++
        Programming Guide, "Prohibited and Unhandled Operations").
        """
        with _making:
            if context not in _idle_streams:
                with self.current(context), self.apart_from_captures(RELAXED):
                    made = self.make("cuStreamCreateWithPriority", NON_BLOCKING, 0)
                _idle_streams[context] = made
            return _idle_streams[context]

    def is_captured(self, stream: int) -> bool:
        """Return whether a stream can't be given work, since it is captured into a graph.

        The default stream can't while a stream that it waits for is captured. To ask spoils nothing
        (`cuStreamIsCapturing` in cuda.h).
        """
        capturing = c_int()
        status = self.status("cuStreamIsCapturing", stream, byref(capturing))
        return capturing.value != 0 or status in CAPTURING

    @contextmanager
    def current(self, context: int | None) -> Iterator[None]:
        """Make a context the calling thread's current one for the block.

        None changes nothing. After the block, the previous context is current again.
        """
        before = c_void_p()
        self.call("cuCtxGetCurrent", byref(before))
        if context is not None and before.value != context:
            self.call("cuCtxSetCurrent", context)
        try:
            yield
        finally:
            self.status("cuCtxSetCurrent", before)

    @contextmanager
    def apart_from_captures(self, how: int = THREAD_LOCAL) -> Iterator[None]:
        """Let no capture of another thread forbid the block's calls, or be spoilt by them.

        A capture in the mode "global", which is torch's default, concerns all threads that don't
        ask for this. With `RELAXED`, captures of this thread concern the block as little.
        """
        mode = c_int(how)
        self.status("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            yield
        finally:
            self.status("cuThreadExchangeStreamCaptureMode", byref(mode))
