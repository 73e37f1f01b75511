"""Which device a name means."""

from __future__ import annotations

from collections.abc import Sequence

from aoti_sched.backends.base import Device
from aoti_sched.errors import ConfigError


def open_device(name: str, cores: Sequence[int] | None = None) -> Device:
    """The device of a name like "cpu"; one like "cpu:0" is these `cores` of it.

    Raises:
        ConfigError: There is no such device, or it is not supported yet.
    """
    if name == "cpu":
        from aoti_sched.backends.cpu import CpuDevice

        return CpuDevice()
    if cores is not None:
        from aoti_sched.backends.cpu import CpuDevice

        return CpuDevice(name, cores)
    raise ConfigError(f"device {name!r}: only 'cpu' is supported so far")


def count_devices(kind: str) -> int:
    """How many devices of a kind like "cuda" this machine has."""
    import torch

    if kind == "cuda":
        return torch.cuda.device_count()
    return torch.xpu.device_count() if kind == "xpu" else 0
