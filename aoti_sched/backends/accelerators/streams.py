"""Streams: what slots and containers need of a device, as the base class `StreamDevice`.

A device makes streams and events, waits for them, and finds out whether the device is lost. Each
kind of device has a subclass (`cuda.py`, `xpu.py`, `mps.py`). Loading is in `accelerator.py`.
"""

from __future__ import annotations

import ctypes
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from aoti_sched.backends.aoti.c_abi import Library, libtorch
from aoti_sched.backends.aoti.handles import address_of
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.errors import DeviceLostError, LoadError, RunError

if TYPE_CHECKING:
    from aoti_sched.backends.native import _native


RECORD_USE = "_ZN2at4_ops13record_stream4callERNS_6TensorEN3c106StreamE"
"""`at::_ops::record_stream::call(at::Tensor&, c10::Stream)`."""

_T = TypeVar("_T")


class Stream(ABC):
    """One stream, which its owner closes.

    Attributes:
        handle: The stream as compiled code takes it.
        of_torch: Torch's object for the stream; None where torch has none.
    """

    handle: int = 0
    of_torch: Any = None
    _device: StreamDevice

    @abstractmethod
    def wait_for(self, event: Any) -> None:
        """Let later work on this stream wait for an event. Does not block."""

    def current(self) -> AbstractContextManager[object]:
        """Make this stream the current one of torch's operations for the block."""
        return self._device.stream_context(self.of_torch)

    @abstractmethod
    def fence(self) -> None:
        """Wait without the GIL until all work on the stream is complete.

        Raises:
            RuntimeError: The device failed.
        """

    @abstractmethod
    def native_fence(self) -> dict[str, int]:
        """Return the function by which native code waits for the stream.

        The key `fence` or `wait` has the function's address, 0 where native code can't wait. The
        key `argument` has the function's argument, and `event` an event that is recorded before.
        """

    def close(self) -> None:  # noqa: B027 -- a device may have nothing to do
        """Release the stream. Nothing may be running on it."""


class StreamDevice(ABC):
    """One device, as slots and containers use it.

    Attributes:
        type: Torch's word for the kind of device.
        index: The device's number among the devices of its kind.
    """

    type: str
    index = 0
    module: Any
    """Torch's module for the kind of device."""
    verified = False
    """Whether this code has run on a real device of this kind."""
    one_at_a_time = False
    """Whether the device takes one work of the whole process at a time."""
    takes_from_host = True
    """Whether a model's own function for constants from the host works on this device."""
    has_addresses = True
    """As `RawContainer.has_addresses`."""
    supports_query = False
    """Whether native lanes can poll the device for completed work instead of waiting."""
    waits: tuple[str, ...] = ()
    """The ways in which a lane can wait, where there is a choice."""
    slots = 0
    """How many slots containers have on the device now."""
    spins = False
    """Whether a lane that waits keeps its core busy."""

    @property
    def name(self) -> str:
        return f"{self.type}:{self.index}"

    # --- streams
    # ---------------------------------------------------------------------------------------

    @abstractmethod
    def open_stream(self, priority: int = 0) -> Stream:
        """Open a stream that has no other user.

        Args:
            priority: 0 or less, and less goes first. Only on devices that record runs.
        """

    @abstractmethod
    def record(self, stream: Any) -> Any:
        """Record an event after all work on a stream.

        Args:
            stream: Torch's object for the stream.

        Returns:
            The event; None where the device has no events.
        """

    @abstractmethod
    def current_stream(self) -> Any:
        """Return torch's object for the calling thread's current stream; None without one."""

    def stream_context(self, stream: Any) -> AbstractContextManager[object]:
        """Make torch's object for a stream the thread's current stream for the block.

        None changes nothing.
        """
        made: AbstractContextManager[object] = (
            nullcontext() if stream is None else self.module.stream(stream)
        )
        return made

    @abstractmethod
    def settle(self) -> None:
        """Wait for the default stream, on which torch's runtime writes constants."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all streams."""

    def native_functions(self) -> dict[str, int]:
        """Return the addresses of the functions that native lanes call, by name."""
        return {}

    @property
    def native_context(self) -> int:
        return 0

    @property
    def native_not_ready(self) -> int:
        """The status that the driver's `query` returns while a stream has work to do."""
        return 0

    @property
    def native_asked(self) -> int:
        """A stream without work, to be queried where the device may be lost."""
        return 0

    def address(self, function: str) -> int:
        """Return the address of one of torch's functions; 0 where this torch lacks the function."""
        return address_of(function)

    def workspace(self) -> int:
        """As `Executor.workspace`."""
        return 0

    def notes(self) -> tuple[str, ...]:
        """Return notes for users on a model that has just been loaded."""
        return ()

    def capability(self) -> int | None:
        """Return the compute capability as torch writes it into packages; None without one."""
        return None

    def turn(self) -> AbstractContextManager[object]:
        """Let the calling thread work on the device for the block.

        On a device that takes one work at a time, the block has the process's lock.
        """
        return nullcontext()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let the thread work on the device, and preserve its current device."""
        with self.preserve_current_device(), self.turn():
            yield

    def with_room(self, allocate: Callable[[], _T]) -> _T:
        """Allocate device memory outside torch's allocator, after a failure once more.

        The runtime's memory for weights does not come from torch's allocator, which may keep much
        that no tensor has. Models of torch before 2.13 tell no reason, so any failure counts.
        """
        try:
            return allocate()
        except (LoadError, RunError):
            if self.is_lost() or not self.release_cached():
                raise
        return allocate()

    def release_cached(self) -> bool:
        """Give the device back memory that torch keeps and no tensor has.

        Returns whether there was any.
        """
        return False

    def away(self) -> AbstractContextManager[object]:
        """Let others have the device for the block, which is in one `turn` and reads a file."""
        return nullcontext()

    def preserve_current_device(self) -> AbstractContextManager[object]:
        """Preserve the calling thread's current device for the block."""
        return nullcontext()

    def lost(self) -> str:
        """Return why nothing runs on the device any more; "" while it works."""
        return ""

    def look_after_failure(self) -> None:  # noqa: B027 -- a device may have no way to know
        """Find out, after a failed run, whether the device is lost. Never raises."""

    def is_lost(self) -> bool:
        """Ask the device whether it is lost.

        What is on a lost device is not freed: it ends with the process. The runtime's own functions
        would end the process at once.
        """
        self.look_after_failure()
        return bool(self.lost())

    @staticmethod
    def abandon(thing: object) -> None:
        """Keep an object until the process ends.

        The device may use what the object has, or freeing that on a lost device would end the
        process. No list would do: what is in a list is freed with it.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))

    def check_alive(self) -> None:
        """Raise DeviceLostError unless the device works."""
        why = self.lost()
        if why:
            raise DeviceLostError(
                f"device {self.name} is lost: {why}. Restart the process to use the device again.",
                device=self.name,
            )

    def classify(self, error: BaseException) -> BaseException:
        """Return a failed run's error, or a DeviceLostError if the device is lost."""
        self.look_after_failure()
        why = self.lost()
        if not why or isinstance(error, DeviceLostError):
            return error
        return DeviceLostError(f"device {self.name} is lost: {why}. {error}", device=self.name)

    @functools.cached_property
    def native(self) -> _native.Device | None:
        """The device's record for native lanes; None where native lanes can't use the device."""
        try:
            from aoti_sched.backends.native import _native
            from aoti_sched.backends.native.executor import shim_of_torch
        except ImportError:
            return None
        shim = shim_of_torch()
        record_use = self.address(RECORD_USE)
        functions = {
            **({"record_use": record_use} if record_use else {}),
            "new_handle": self.address("aoti_torch_new_tensor_handle"),
            "get_device_type": self.address("aoti_torch_get_device_type"),
            "copy": self.address("aoti_torch_copy_"),
            **self.native_functions(),
        }
        if shim is None or not all(functions.values()):
            return None
        return _native.Device(
            shim,
            type=self._number(),
            index=self.index,
            one_at_a_time=self.one_at_a_time,
            functions=functions,
            context=self.native_context,
            not_ready=self.native_not_ready,
            asked=self.native_asked,
        )

    def _number(self) -> int:
        """Return torch's number for this kind of device."""
        third = torch._C._get_privateuse1_backend_name()  # noqa: SLF001
        kind = "privateuse1" if self.type == third else self.type
        number: int = getattr(libtorch, f"aoti_torch_device_type_{kind}")()
        return number

    def open_raw(self, library: Library, instances: int, name: str) -> RawContainer:
        """Make the runtime's container of a library, whose folder also has the model's kernels."""
        raw = RawContainer(library, instances, self.name, str(library.path.parent))
        raw.name = name
        raw.takes_from_cpu &= self.takes_from_host
        raw.has_addresses = self.has_addresses
        raw.away = self.away
        raw.is_lost = self.is_lost
        return raw
