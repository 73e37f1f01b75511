"""torch's own container runner, one class for each kind of device, found by the kind's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._C import _aoti

from aoti_sched.errors import LoadError


def stock_runner(device: str, library: Path, instances: int) -> Any:
    """Torch's own runner for a model on a device ("cpu", "cuda:0", "xpu:0", "mps").

    CUDA's and XPU's are told the device and where the model's kernels lie, which is beside its
    library.

    Raises:
        LoadError: This torch was built without that kind of device.
        RuntimeError: Torch could not load the model.
    """
    kind = device.partition(":")[0]
    name = f"AOTIModelContainerRunner{kind.capitalize()}"
    runner = getattr(_aoti, name, None)
    if runner is None:
        raise LoadError(
            f"{library.name}: it needs torch's own runner for {kind}, {name}, which this torch "
            f"({torch.__version__}) has not"
        )
    if kind in ("cuda", "xpu"):
        return runner(str(library), instances, device, str(library.parent))
    return runner(str(library), instances)
