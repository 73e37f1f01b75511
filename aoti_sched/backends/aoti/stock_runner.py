"""Torch's own container runner: one class for each kind of device, found by the kind's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._C import _aoti

from aoti_sched.errors import LoadError


def stock_runner(device: str, library: Path, instances: int) -> Any:
    """Make torch's own runner for a model.

    The runners for CUDA and XPU also take the device and the folder of the model's kernels, which
    is the folder of its library.

    Args:
        device: "cpu", "cuda:0", "xpu:0" or "mps".
        library: The model's library.
        instances: The number of instances.

    Raises:
        LoadError: This torch was built without that kind of device.
        RuntimeError: Torch could not load the model.
    """
    kind = device.partition(":")[0]
    name = f"AOTIModelContainerRunner{kind.capitalize()}"
    runner = getattr(_aoti, name, None)
    if runner is None:
        raise LoadError(
            f"{library.name}: this torch ({torch.__version__}) lacks {name}, which the model "
            f"needs. Install a torch that was built with {kind}."
        )
    if kind in ("cuda", "xpu"):
        return runner(str(library), instances, device, str(library.parent))
    return runner(str(library), instances)
