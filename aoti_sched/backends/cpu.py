"""The CPU: lanes are threads, and a run's own threads are capped."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from aoti_sched.backends.aoti.c_abi import Library, libtorch
from aoti_sched.backends.aoti.container import CAbiContainer
from aoti_sched.backends.aoti.proxy_executor import open_proxy_executor
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.aoti.torch_runner import TorchRunnerContainer
from aoti_sched.backends.contracts import Executor, Loaded, LoadRequest
from aoti_sched.backends.executors.choose import open_executor
from aoti_sched.errors import ConfigError, PlatformMismatchError
from aoti_sched.model.specs import spec_from_metadata
from aoti_sched.model.wrapper_source import writes_to_buffers
from aoti_sched.package import check_platform, open_package
from aoti_sched.package.sources import constant_layouts


class CpuDevice:
    """This machine's CPU, as much of it as the process may use; or, by another `name`, so much of that as the numbered `cores` are."""

    records_runs = False

    def __init__(self, name: str = "cpu", cores: Sequence[int] | None = None) -> None:
        self.name = name
        self._cores = cores

    def cores(self) -> int:
        cores = available_cores()
        return cores if self._cores is None else min(cores, len(self._cores))

    def open_executor(
        self, lanes: int, affinity: Sequence[int] | None = None, launchers: int | None = None
    ) -> Executor:
        if launchers is not None:
            raise ConfigError(
                f"device {self.name!r}: launchers={launchers}, but a run on a CPU is its thread's work; leave it out"
            )
        return open_executor(self.name, lanes, self.cores(), set_threads, affinity)

    def load(self, request: LoadRequest) -> Loaded:
        package = open_package(request.path, sha256=request.sha256, contents=request.contents)
        model = package.model(request.model_name)
        check_platform(model)
        if model.device not in ("", "cpu"):
            raise PlatformMismatchError(
                f"{request.path}: model {model.name!r} was compiled for {model.device}, not for cpu",
                path=str(request.path),
            )
        if "AMX_TILE" in model.cpu_isa:
            torch.cpu._init_amx()  # noqa: SLF001 -- Linux gives the tile registers only to processes that ask
        extracted = package.extract(model, request.cache_dir)
        request = msgspec.structs.replace(
            request, contents=None
        )  # what is kept of it is in the cache
        own, wrapper = spec_from_metadata(model.metadata), package.wrapper_source(model)
        if writes_to_buffers(own, wrapper):
            # Instances share their buffers, and nothing in the runtime guards them (pytorch/pytorch#122824).
            request = msgspec.structs.replace(request, instances=1)
        request.make_room(model.constant_bytes)
        library = Library(extracted.library)
        raw = RawContainer(library, request.instances)
        if request.instances > 1 and writes_to_buffers(
            own, wrapper, [c.spec for c in raw.constants]
        ):
            raw.close()
            request = msgspec.structs.replace(request, instances=1)
            raw = RawContainer(library, 1)
        raw.name = f"model {request.name!r}"  # in errors: the name the user gave, not the library's
        raw.layouts = constant_layouts(wrapper or "")
        try:
            why_not = ""
            if model.needs_proxy_executor:
                raw.proxy, why_not = open_proxy_executor(raw.name, "cpu", extracted.library)
            container = (
                TorchRunnerContainer(raw, request, extracted, own, why=why_not)
                if why_not
                else CAbiContainer(raw, request, extracted, own)
            )
        except BaseException:
            raw.close()
            raise
        return Loaded(
            container=container,
            metadata=model.metadata,
            wrapper_source=wrapper,
            sha256=package.sha256,
            thread_limit=model.thread_limit,
            fixed_threads=model.fixed_threads,
        )


# --- cores and threads --------------------------------------------------------------------------------


def available_cores() -> int:
    """Cores this process may use: its affinity, and the CPU quota of its cgroup (v2, then v1)."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """Cores that the cgroup's quota amounts to; None without one. Docs: kernel.org cgroup-v2, "cpu.max"."""
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
    """Set the intra-op threads of the calling thread alone: OpenMP's, and MKL's where torch has it.

    `torch.set_num_threads` would also set MKL's process-wide count and the default of threads born later, which are the
    application's own business.
    """
    torch.get_num_threads()  # torch initializes a thread's count lazily; do it now, or it would overwrite ours
    set_openmp = _symbol("omp_set_num_threads")
    if set_openmp is None:
        torch.set_num_threads(count)
        return
    set_openmp(count)
    set_mkl = _symbol("MKL_Set_Num_Threads_Local")
    if set_mkl is not None:
        set_mkl(count)


def _symbol(name: str) -> Any:
    function = getattr(libtorch, name, None)
    if function is not None:
        function.argtypes = (ctypes.c_int,)
    return function
