"""Apple's MPS: one work of the process at a time, and a wait for the device after each.

Torch has one stream there, and models use that stream whatever they are given. Two threads that
encode at once end the process (pytorch/pytorch#197805, #167541). So there is one lane. Work outside
the lane holds the process's lock, which all schedulers share. A run's completion is reported when
the run is encoded, not when it is done, hence the fence.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
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
"""The process's lock where native lanes are not built; otherwise native lanes have it."""


class MpsDevice(Accelerator):
    """The one MPS device.

    `module` and `type` are torch's module for it and word for its kind (the tests have others).
    """

    one_at_a_time = True
    has_addresses = False
    takes_from_host = (
        False  # it is there and refuses them (`update_constant_buffer` in model_container.h)
    )

    def __init__(self, *, module: Any = torch.mps, type: str = "mps") -> None:
        self.type = type
        self.module = module

    @property
    def name(self) -> str:
        return self.type  # torch's runtime takes exactly this

    def cores(self) -> int:
        """Return 1: there is one lane."""
        return 1

    def open_executor(
        self, lanes: int, affinity: Sequence[int] | None = None, launchers: int | None = None
    ) -> Executor:
        if lanes != 1:
            raise ConfigError(
                f"device {self.name!r}: lanes={lanes}, but it runs one model at a time; leave "
                "lanes out, or say 1"
            )
        return super().open_executor(lanes, affinity, launchers)

    def open_stream(self) -> MpsStream:
        return MpsStream(self)

    def record(self, stream: Any) -> None:
        """Return None: there is one stream, and it keeps its order."""

    def current_stream(self) -> None:
        """Return None, for the same reason."""

    def settle(self) -> None:
        self.module.synchronize()

    def synchronize(self) -> None:
        with self.turn():
            self.module.synchronize()

    @contextmanager
    def turn(self) -> Iterator[None]:
        try:
            from aoti_sched.backends.native._native import end_turn, take_turn
        except ImportError:
            with _turn:
                yield
            return
        take_turn()
        try:
            yield
        finally:
            end_turn()


class MpsStream(Stream):
    """The device's one stream."""

    def __init__(self, device: MpsDevice) -> None:
        self._device = device

    def wait_for(self, event: Any) -> None:
        """Do nothing: there are no events."""

    def fence(self) -> None:
        self._device.module.synchronize()

    def native_fence(self) -> dict[str, int]:
        return {"wait": self._device.address(SYNCHRONIZE), "argument": self._device.index}
