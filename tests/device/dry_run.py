"""Run a probe of the driver without a device, to see that it calls what there is, as it is called.

python -m tests.device.dry_run (driver_probe|recording_probe) ARGUMENTS

The driver is replaced by one that knows the functions of CUDA's driver API and how many arguments
each takes, and does nothing. What the probe finds then means nothing; that it comes to its end
means that its own code works.
"""

from __future__ import annotations

import ctypes
import itertools
import runpy
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

ARGUMENTS = {
    "cuCtxGetCurrent": 1,
    "cuCtxGetStreamPriorityRange": 2,
    "cuCtxSetCurrent": 1,
    "cuCtxSynchronize": 0,
    "cuDeviceGet": 2,
    "cuDevicePrimaryCtxGetState": 3,
    "cuDriverGetVersion": 1,
    "cuEventCreate": 2,
    "cuEventQuery": 1,
    "cuEventRecord": 2,
    "cuEventSynchronize": 1,
    "cuGraphDestroy": 1,
    "cuGraphExecDestroy": 1,
    "cuGraphInstantiateWithFlags": 3,
    "cuGraphLaunch": 2,
    "cuMemAllocHost_v2": 2,
    "cuMemAlloc_v2": 2,
    "cuMemFreeHost": 1,
    "cuModuleLoadData": 2,
    "cuStreamBeginCapture_v2": 2,
    "cuStreamCreate": 2,
    "cuStreamDestroy_v2": 1,
    "cuStreamEndCapture": 2,
    "cuStreamIsCapturing": 2,
    "cuStreamQuery": 1,
    "cuStreamSynchronize": 1,
    "cuStreamWaitEvent": 3,
    "cuThreadExchangeStreamCaptureMode": 1,
}
"""The functions by how many arguments they take, from CUDA's driver API, version 13."""

MAKES = {
    "cuEventCreate",
    "cuGraphInstantiateWithFlags",
    "cuMemAllocHost_v2",
    "cuMemAlloc_v2",
    "cuModuleLoadData",
    "cuStreamCreate",
    "cuStreamEndCapture",
}
"""Those that write a handle."""

VOID_POINTER_PLACE = {"cuStreamEndCapture": 1}
_numbers = itertools.count(0x1000)


class CheckedDriver:
    """Stands for the driver's library: every function is checked and succeeds."""

    def __init__(self, name: str) -> None:
        del name

    def __getattr__(self, name: str) -> Any:
        if name == "cudaGetDevice":  # of the runtime's library
            return lambda number: 0
        if name not in ARGUMENTS:
            raise AttributeError(f"CUDA's driver API, as this file knows it, has no {name!r}")

        def call(*arguments: object) -> int:
            if len(arguments) != ARGUMENTS[name]:
                raise TypeError(f"{name} takes {ARGUMENTS[name]} arguments, got {len(arguments)}")
            for argument in arguments:
                if isinstance(argument, float):
                    raise TypeError(f"{name}: {argument!r} is no argument of C's")
            if name in MAKES:
                place: Any = arguments[VOID_POINTER_PLACE.get(name, 0)]
                place._obj.value = next(_numbers)
            return 0

        return call


class Stream:
    """Stands for a stream of torch's."""

    cuda_stream = 1

    def __init__(self, handle: int | None = None) -> None:
        del handle

    def synchronize(self) -> None:
        """Do nothing: all that is asked for is done at once."""


class Graph:
    """Stands for a graph of torch's, which records nothing."""

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode in ("global", "thread_local", "relaxed"), (pool, "unknown mode")

    def capture_end(self) -> None:
        """Do nothing."""

    replay = reset = capture_end


def on_the_cpu(make: Any) -> Any:
    def made(*arguments: Any, device: str = "cpu", **rest: Any) -> Any:
        assert device in ("cpu", "cuda"), device
        return make(*arguments, **rest)

    return made


def main() -> None:
    probe, *arguments = sys.argv[1:]
    ctypes.CDLL = ctypes.PyDLL = CheckedDriver  # type: ignore[assignment, misc]
    for name in ("ones", "randn", "empty", "zeros", "full"):
        setattr(torch, name, on_the_cpu(getattr(torch, name)))
    stands_for: dict[str, Any] = {
        "CUDAGraph": Graph,
        "ExternalStream": Stream,
        "Stream": Stream,
        "_sleep": lambda cycles: None,
        "current_stream": Stream,
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: (0, 1),
        "memory_allocated": lambda: 0,
        "memory_reserved": lambda: 0,
        "stream": nullcontext,
        "synchronize": lambda: None,
    }
    torch.cuda = SimpleNamespace(**stands_for)  # type: ignore[assignment]
    setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)  # noqa: B010
    for name in ("beginAllocateCurrentStreamToPool", "endAllocateToPool", "releasePool"):
        setattr(torch._C, f"_cuda_{name}", lambda device, pool: None)
    sys.argv = [probe, *arguments]
    runpy.run_module(f"tests.device.{probe}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
