"""Streams: how one device makes streams and events, waits for them, and finds out that it is lost.

Each kind of device has its own (`cuda.py`, `xpu.py`, `mps.py`). Slots and containers know a device
as a `StreamDevice`; loading is in `accelerator.py`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from aoti_sched.backends.aoti.c_abi import Library, libtorch
from aoti_sched.backends.aoti.handles import address_of
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.errors import DeviceLostError

if TYPE_CHECKING:
    from aoti_sched.backends.native import _native


class Stream(ABC):
    """One stream, owned.

    Attributes:
        handle: What a model is given.
        of_torch: Torch's object for the stream; None where there is none.
    """

    handle: int = 0
    of_torch: Any = None
    _device: StreamDevice

    @abstractmethod
    def wait_for(self, event: Any) -> None:
        """Let later work on this stream wait for an event. Does not block."""

    def current(self) -> AbstractContextManager[object]:
        """Let torch's operations in the block go to this stream."""
        return self._device.under(self.of_torch)

    @abstractmethod
    def fence(self) -> None:
        """Wait, the GIL released, until all its work is complete.

        Raises:
            RuntimeError: The device failed.
        """

    @abstractmethod
    def native_fence(self) -> dict[str, int]:
        """Return how C waits.

        The keys are `fence` or `wait`, the address of a function (0 where C can't wait), and
        `argument`.
        """

    def close(self) -> None:  # noqa: B027 -- a device may have nothing to do
        """Release the stream. Nothing may be running on it."""


class StreamDevice(ABC):
    """What slots and containers need of one device.

    Attributes:
        type: Torch's word for its kind.
        index: Its number among the devices of its kind.
    """

    type: str
    index = 0
    module: Any
    """Torch's module for its kind."""
    verified = False
    """Whether this code has run on a real device of this kind."""
    one_at_a_time = False
    """Whether it takes one work of the whole process at a time."""
    takes_from_host = True
    """Whether a model's own function for constants from the host works there, where it has one."""
    has_addresses = True
    """As `RawContainer.has_addresses`."""
    may_be_asked = False
    """Whether native lanes can ask it what is done, and need not wait."""

    @property
    def name(self) -> str:
        return f"{self.type}:{self.index}"

    # --- streams
    # ---------------------------------------------------------------------------------------

    @abstractmethod
    def open_stream(self) -> Stream:
        """Open a stream that has no other user."""

    @abstractmethod
    def record(self, stream: Any) -> Any:
        """Record an event after all work on a stream (torch's object); None where there are no
        events.
        """

    @abstractmethod
    def current_stream(self) -> Any:
        """Return torch's object for the thread's current stream; None where there is none."""

    def under(self, stream: Any) -> AbstractContextManager[object]:
        """Make a stream (torch's object) the thread's current one for the block.

        None changes nothing.
        """
        made: AbstractContextManager[object] = (
            nullcontext() if stream is None else self.module.stream(stream)
        )
        return made

    @abstractmethod
    def settle(self) -> None:
        """Wait for the default stream, on which the runtime writes constants."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all streams."""

    def native_functions(self) -> dict[str, int]:
        """Return addresses of the functions that native lanes call, by their names there."""
        return {}

    @property
    def native_context(self) -> int:
        return 0

    @property
    def native_not_ready(self) -> int:
        """What the driver's `query` returns while a stream has work to do."""
        return 0

    def address(self, function: str) -> int:
        """Return the address of one of torch's functions, or 0."""
        return address_of(function)

    def workspace(self, streams: Sequence[Stream]) -> int | None:
        """Return the bytes that torch keeps for these streams, used or not; None where torch does
        not say.
        """
        del streams
        return None

    def turn(self) -> AbstractContextManager[object]:
        """Hold the process's lock for the block, on a device that takes one work at a time."""
        return nullcontext()

    def keeping_current(self) -> AbstractContextManager[object]:
        """Preserve the calling thread's current device for the block."""
        return nullcontext()

    def lost(self) -> str:
        """Return why nothing runs on the device any more; "" while it works."""
        return ""

    def look_after_failure(self) -> None:  # noqa: B027 -- a device may have no way to know
        """Find out whether the device is lost, after a run has failed."""

    def must_work(self) -> None:
        """Raise DeviceLostError unless the device works."""
        why = self.lost()
        if why:
            raise DeviceLostError(
                f"device {self.name} is lost: {why}. Nothing runs on it until the process is "
                "started again.",
                device=self.name,
            )

    def judged(self, error: BaseException) -> BaseException:
        """Return a failed run's error, or a DeviceLostError if the device is lost."""
        self.look_after_failure()
        why = self.lost()
        if not why or isinstance(error, DeviceLostError):
            return error
        return DeviceLostError(f"device {self.name} is lost: {why}. {error}", device=self.name)

    @functools.cached_property
    def native(self) -> _native.Device | None:
        """The device as native lanes know it; None where native lanes can't run on it."""
        try:
            from aoti_sched.backends.native import _native
            from aoti_sched.backends.native.executor import shim_of_torch
        except ImportError:
            return None
        shim = shim_of_torch()
        functions = {
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
        )

    def _number(self) -> int:
        """Return torch's number for this kind of device."""
        kind = "privateuse1" if self.type == torch._C._get_privateuse1_backend_name() else self.type  # noqa: SLF001
        number: int = getattr(libtorch, f"aoti_torch_device_type_{kind}")()
        return number

    def open_raw(self, library: Library, instances: int, name: str) -> RawContainer:
        """Make the runtime's container. The model's kernels lie beside its library."""
        raw = RawContainer(library, instances, self.name, str(library.path.parent))
        raw.name = name
        raw.takes_from_cpu &= self.takes_from_host
        raw.has_addresses = self.has_addresses
        return raw
