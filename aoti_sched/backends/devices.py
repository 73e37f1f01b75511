"""Opens the device that a name means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aoti_sched.backends.contracts import Device
from aoti_sched.errors import ConfigError

if TYPE_CHECKING:
    from aoti_sched.backends.accelerators.accelerator import Accelerator

_NAME = re.compile(r"(cpu|mps)|(cuda|xpu)(?::(\d+))?")


def open_device(name: str, cores: Sequence[int] | None = None) -> Device:
    """Open a device.

    Args:
        name: "cpu", "cuda:0", "xpu:0" or "mps"; or, with `cores`, the name of a part of the CPU.
        cores: The numbers of the part's cores.

    Raises:
        ConfigError: This machine has no such device, or torch was built without its kind.
    """
    if cores is not None:
        from aoti_sched.backends.cpu import CpuDevice

        return CpuDevice(name, cores)
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ConfigError(
            f"device {name!r}: expected 'cpu', 'mps', or 'cuda:0' or 'xpu:0' with any number."
        )
    if parts[1] == "cpu":
        from aoti_sched.backends.cpu import CpuDevice

        return CpuDevice()
    return _accelerator(name, parts[1] or parts[2], int(parts[3] or 0))


def _accelerator(name: str, kind: str, index: int) -> Accelerator:
    import torch

    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(
                f"device {name!r}: {_absent('MPS', built=torch.backends.mps.is_built())}"
            )
        from aoti_sched.backends.accelerators.mps import MpsDevice

        return MpsDevice()
    built, count = _built(kind), count_devices(kind)
    if count == 0:
        raise ConfigError(f"device {name!r}: {_absent(kind.upper(), built=built)}")
    if index >= count:
        there = ", ".join(f"{kind}:{number}" for number in range(count))
        raise ConfigError(f"device {name!r}: no such device. Choose from: {there}.")
    if kind == "cuda":
        from aoti_sched.backends.accelerators.cuda import CudaDevice
        from aoti_sched.backends.accelerators.cuda_driver import Driver
        from aoti_sched.backends.accelerators.cuda_graphs import GraphContainer

        return CudaDevice(index, Driver(), GraphContainer)
    from aoti_sched.backends.accelerators.xpu import XpuDevice

    return XpuDevice(index)


def count_devices(kind: str) -> int:
    """Return how many devices of a kind like "cuda" torch can use on this machine."""
    import torch

    return getattr(torch, kind).device_count() if _built(kind) else 0


def _built(kind: str) -> bool:
    """Return whether this torch was built with CUDA ("cuda") or XPU ("xpu")."""
    import torch

    if kind == "cuda":
        return torch.version.cuda is not None
    return kind == "xpu" and torch.xpu._is_compiled()  # noqa: SLF001


def _absent(kind: str, *, built: bool) -> str:
    import torch

    if built:
        return f"torch finds no {kind} device here. Use another device, or check the driver."
    return (
        f"this torch ({torch.__version__}) was built without {kind}. Install a torch that was "
        f"built with {kind}."
    )
