"""The functions of CUDA's driver that streams need, through ctypes.

The library is found at run time, so nothing links against CUDA. Calls release the GIL. The CUDA
Driver API reference describes the functions; the header's macros add `_v2` to some names.
`cuStreamSynchronize` and `cuEventSynchronize` block, and so does the first `cuInit`.
"""

from __future__ import annotations

import ctypes
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
AUTO_FREE = 1
"""`CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH`, as torch instantiates graphs."""
NOT_READY = 600
"""`CUDA_ERROR_NOT_READY`: the stream still has work to do."""
CAPTURING = range(900, 910)
"""`CUDA_ERROR_STREAM_CAPTURE_*`: the call is not allowed while a graph is being recorded.

Such a status does not show a fault of the device.
"""

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
    def apart_from_captures(self) -> Iterator[None]:
        """Let no capture of another thread forbid the block's calls, or be spoilt by them.

        A capture in the mode "global", which is torch's default, concerns all threads that don't
        ask for this.
        """
        mode = c_int(THREAD_LOCAL)
        self.status("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            yield
        finally:
            self.status("cuThreadExchangeStreamCaptureMode", byref(mode))
