"""The CPU as a device: its lanes are threads, and a run's own threads are limited."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aoti_sched.backends.aoti.c_abi import Library, libtorch
from aoti_sched.backends.aoti.container import CAbiContainer
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.aoti.torch_runner import TorchRunnerContainer
from aoti_sched.backends.contracts import Container, Executor, Inspected, LoadRequest
from aoti_sched.backends.executors.choose import open_executor
from aoti_sched.backends.opening import InspectedPackage, inspect_package, open_container
from aoti_sched.errors import ConfigError


class CpuDevice:
    """This machine's CPU, or a part of it.

    Args:
        name: "cpu", or "cpu:0", "cpu:1" and so on for a part of the CPU.
        cores: The numbers of the part's cores; None for all cores that the process may use.
    """

    records_runs = False
    most_lanes = None

    def __init__(self, name: str = "cpu", cores: Sequence[int] | None = None) -> None:
        self.name = name
        self._cores = cores

    def cores(self) -> int:
        cores = available_cores()
        return cores if self._cores is None else min(cores, len(self._cores))

    def open_executor(
        self,
        lanes: int,
        affinity: Sequence[int] | None = None,
        launchers: int | None = None,
        wait: str | None = None,
    ) -> Executor:
        if wait is not None:
            raise ConfigError(
                f"device {self.name!r}: wait={wait!r}, but a lane of a CPU waits for no device. "
                "Leave wait out."
            )
        if launchers is not None:
            raise ConfigError(
                f"device {self.name!r}: launchers={launchers}, but a run on a CPU is its thread's "
                "work. Leave launchers out."
            )
        return open_executor(self.name, lanes, self.cores(), set_threads, affinity)

    def inspect(self, request: LoadRequest) -> Inspected:
        inspected = inspect_package(request, "cpu")
        if "AMX_TILE" in inspected.model.cpu_isa:
            # Linux enables the tile registers only for processes that ask for them.
            torch.cpu._init_amx()  # noqa: SLF001
        return inspected

    def load(self, inspected: Inspected) -> Container:
        return open_container(inspected, "cpu", _open_raw, _wrap)


def _open_raw(library: Library, request: LoadRequest, title: str) -> RawContainer:
    raw = RawContainer(library, request.instances)
    raw.name = title
    return raw


def _wrap(raw: RawContainer, inspected: InspectedPackage, why_not: str) -> Container:
    if why_not:
        return TorchRunnerContainer(
            raw, inspected.request, inspected.extracted, inspected.own, why=why_not
        )
    return CAbiContainer(raw, inspected.request, inspected.extracted, inspected.own)


# --- cores and threads
# --------------------------------------------------------------------------------


def available_cores() -> int:
    """Return the number of cores that this process may use.

    Its affinity limits them, and the CPU quota of its cgroup (v2, then v1).
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """Return the number of cores that the cgroup's quota amounts to; None without a quota.

    Docs: kernel.org cgroup-v2, "cpu.max".
    """
    try:
        quota, _, period = (root / "cpu.max").read_text().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 else None


def set_threads(count: int) -> None:
    """Set the intra-op threads of the calling thread alone.

    This sets OpenMP's count, and MKL's where torch has MKL. `torch.set_num_threads` would also set
    MKL's process-wide count and the default of later threads. Both belong to the application.
    """
    # Torch initializes a thread's count on first use, which would overwrite the new count later.
    torch.get_num_threads()
    set_openmp = _symbol("omp_set_num_threads")
    if set_openmp is None:
        torch.set_num_threads(count)
        return
    set_openmp(count)
    set_mkl = _symbol("MKL_Set_Num_Threads_Local")
    if set_mkl is not None:
        set_mkl(count)


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Set the intra-op threads of the calling thread for the block, and put them back."""
    before = torch.get_num_threads()
    set_threads(count)
    try:
        yield
    finally:
        set_openmp, set_mkl = _symbol("omp_set_num_threads"), _symbol("MKL_Set_Num_Threads_Local")
        if set_openmp is None:
            torch.set_num_threads(before)
        else:
            set_openmp(before)
        if set_mkl is not None:
            set_mkl(0)  # the process's own count counts again


def _symbol(name: str) -> Any:
    function = getattr(libtorch, name, None)
    if function is not None:
        function.argtypes = (ctypes.c_int,)
    return function
