"""Apple's MPS: one work of the process at a time, and a wait for the device after each work.

Torch has one stream on MPS, and models use that stream whatever stream is passed. Two threads that
encode at once end the process (pytorch/pytorch#197805, #167541). So there is one lane. Work outside
the lane takes the process's lock, which all schedulers share. A run returns when its commands are
encoded, before the device has executed them, so each run is followed by a fence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from aoti_sched.backends.accelerators.accelerator import Accelerator
from aoti_sched.backends.accelerators.streams import Stream
from aoti_sched.backends.contracts import Executor
from aoti_sched.errors import ConfigError

SYNCHRONIZE = "_ZN2at11accelerator17synchronizeDeviceEa"
"""`at::accelerator::synchronizeDevice(c10::DeviceIndex)`."""

_turn = threading.RLock()
"""The process's lock where native lanes are not built; otherwise native lanes have the lock."""


class MpsDevice(Accelerator):
    """The one MPS device.

    Args:
        module: Torch's module for the device. Tests pass another one.
        type: Torch's word for the kind of device.
    """

    one_at_a_time = True
    has_addresses = False
    takes_from_host = (
        False  # the function exists and refuses (`update_constant_buffer` in model_container.h)
    )

    def __init__(self, *, module: Any = torch.mps, type: str = "mps") -> None:
        self.type = type
        self.module = module

    @property
    def name(self) -> str:
        return self.type  # torch's runtime takes exactly this

    @property
    def most_lanes(self) -> None:
        """None: there is one lane."""
        return None

    def open_executor(
        self,
        lanes: int,
        affinity: Sequence[int] | None = None,
        launchers: int | None = None,
        wait: str | None = None,
    ) -> Executor:
        if lanes != 1:
            raise ConfigError(
                f"device {self.name!r}: lanes={lanes}, but MPS runs one model at a time. Leave "
                "lanes out, or set lanes=1."
            )
        return super().open_executor(lanes, affinity, launchers, wait)

    def open_stream(self, priority: int = 0) -> MpsStream:
        del priority
        return MpsStream(self)

    def record(self, stream: Any) -> None:
        """Return None: work on the one stream runs in order, so no event is needed."""

    def current_stream(self) -> None:
        """Return None: there is one stream."""

    def settle(self) -> None:
        self.module.synchronize()

    def synchronize(self) -> None:
        with self.turn():
            self.module.synchronize()

    @contextmanager
    def turn(self) -> Iterator[None]:
        take_turn, end_turn = _turns()
        take_turn()
        try:
            yield
        finally:
            end_turn()

    @contextmanager
    def away(self) -> Iterator[None]:
        take_turn, end_turn = _turns()
        end_turn()
        try:
            yield
        finally:
            take_turn()


def _turns() -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what takes the process's lock, and what releases it."""
    try:
        from aoti_sched.backends.native._native import end_turn, take_turn
    except ImportError:
        return _turn.acquire, _turn.release
    return take_turn, end_turn


class MpsStream(Stream):
    """The device's one stream."""

    def __init__(self, device: MpsDevice) -> None:
        self._device = device

    def wait_for(self, event: Any) -> None:
        """Do nothing: `record` returns no events."""

    def fence(self) -> None:
        self._device.module.synchronize()

    def native_fence(self) -> dict[str, int]:
        return {"wait": self._device.address(SYNCHRONIZE), "argument": self._device.index}
