"""Intel's XPU: a `sycl::queue` for each slot, passed to the model explicitly.

Torch's functions copy tensors and wait for streams.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import AbstractContextManager
from typing import Any

import torch

from aoti_sched.backends.accelerators.accelerator import Accelerator
from aoti_sched.backends.accelerators.streams import Stream
from aoti_sched.errors import LoadError

POOL = 32
"""The number of streams of each priority that torch has on a device.

After the last one, torch returns the first one again.
"""

SYNCHRONIZE = "_ZNK3c106Stream11synchronizeEv"
"""`c10::Stream::synchronize() const`."""


class XpuDevice(Accelerator):
    """One XPU.

    Args:
        index: The device's number, as torch counts.
        module: Torch's module for the device. Tests pass another one.
        type: Torch's word for the kind of device.
    """

    def __init__(self, index: int, *, module: Any = torch.xpu, type: str = "xpu") -> None:
        self.type = type
        self.index = index
        self.module = module
        self._taken: set[int] = set()
        self._mutex = threading.Lock()

    def open_stream(self, priority: int = 0) -> XpuStream:
        del priority
        with self._mutex:
            # Torch has no default stream on an XPU: where no stream was made current, the first of
            # its pool is. A slot on that one would wait for all other work of the process.
            self._taken.add(self.module.current_stream(self.index).sycl_queue)
            for _ in range(POOL):
                stream = self.module.Stream(self.index)
                if stream.sycl_queue not in self._taken:
                    self._taken.add(stream.sycl_queue)
                    return XpuStream(self, stream)
        raise LoadError(
            f"device {self.name}: all {POOL} streams are taken. Load fewer models or instances: "
            "each instance takes one stream, and each model one more."
        )

    def give_back(self, handle: int) -> None:
        with self._mutex:
            self._taken.discard(handle)

    def record(self, stream: Any) -> Any:
        return stream.record_event()

    def current_stream(self) -> Any:
        return self.module.current_stream(self.index)

    def settle(self) -> None:
        self.module.current_stream(self.index).synchronize()

    def synchronize(self) -> None:
        self.module.synchronize(self.index)

    def preserve_current_device(self) -> AbstractContextManager[object]:
        made: AbstractContextManager[object] = self.module.device(self.index)
        return made

    def native_functions(self) -> dict[str, int]:
        return {
            "guard": self.address("aoti_torch_create_xpu_stream_guard"),
            "unguard": self.address("aoti_torch_delete_xpu_stream_guard"),
        }


class _C10Stream(ctypes.Structure):
    """`c10::Stream`: the kind and the number of its device, and its id on that device."""

    _fields_ = (
        ("device_type", ctypes.c_int8),
        ("device_index", ctypes.c_int8),
        ("id", ctypes.c_int64),
    )


class XpuStream(Stream):
    """One of torch's streams, reserved until `close`."""

    _device: XpuDevice

    def __init__(self, device: XpuDevice, of_torch: Any) -> None:
        self._device = device
        self.of_torch = of_torch
        self.handle = of_torch.sycl_queue
        self._c10 = _C10Stream(of_torch.device_type, of_torch.device_index, of_torch.stream_id)

    def wait_for(self, event: Any) -> None:
        self.of_torch.wait_event(event)

    def fence(self) -> None:
        self.of_torch.synchronize()

    def native_fence(self) -> dict[str, int]:
        return {"wait": self._device.address(SYNCHRONIZE), "argument": ctypes.addressof(self._c10)}

    def close(self) -> None:
        self._device.give_back(self.handle)
