"""Which device a name means."""

from __future__ import annotations

from aoti_sched.backends.base import Device
from aoti_sched.errors import ConfigError


def open_device(name: str) -> Device:
    """The device of a name like "cpu".

    Raises:
        ConfigError: There is no such device, or it is not supported yet.
    """
    if name == "cpu":
        from aoti_sched.backends.cpu import CpuDevice

        return CpuDevice()
    raise ConfigError(f"device {name!r}: only 'cpu' is supported so far")
