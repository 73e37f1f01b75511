"""The CPU: lanes are threads, a run's own threads are capped, outputs never share memory with weights."""

from __future__ import annotations

import ctypes
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from aoti_sched.backends.base import ContainerInfo, CRun, Executor, Loaded, LoadRequest
from aoti_sched.backends.batch import Staging
from aoti_sched.backends.c_abi import FUNCTIONS, Library, libtorch
from aoti_sched.backends.executor import open_executor
from aoti_sched.backends.raw_container import RawContainer
from aoti_sched.backends.torch_runner import TorchRunnerContainer
from aoti_sched.backends.weight_source import open_weights
from aoti_sched.backends.weights import load_weights
from aoti_sched.errors import PlatformMismatchError
from aoti_sched.package import Extracted, check_platform, open_package
from aoti_sched.specs import spec_from_metadata


class CpuDevice:
    """This machine's CPU, as much of it as the process may use; or, by another `name`, so much of that as the numbered `cores` are."""

    def __init__(self, name: str = "cpu", cores: Sequence[int] | None = None) -> None:
        self.name = name
        self._cores = cores

    def cores(self) -> int:
        cores = available_cores()
        return cores if self._cores is None else min(cores, len(self._cores))

    def open_executor(self, lanes: int, affinity: Sequence[int] | None = None) -> Executor:
        return open_executor(self.name, lanes, self.cores(), set_threads, affinity)

    def load(self, request: LoadRequest) -> Loaded:
        package = open_package(request.path, sha256=request.sha256)
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
        spec = spec_from_metadata(model.metadata)
        if spec is not None and spec.mutates_buffers:
            # Instances share their buffers, and nothing in the runtime guards them (pytorch/pytorch#122824).
            request = msgspec.structs.replace(request, instances=1)
        raw = RawContainer(Library(extracted.library), request.instances)
        raw.name = f"model {request.name!r}"  # in errors: the name the user gave, not the library's
        try:
            container = (
                TorchRunnerContainer(raw, request, extracted)
                if model.needs_proxy_executor
                else CpuContainer(raw, request, extracted)
            )
        except BaseException:
            raw.close()
            raise
        return Loaded(
            container=container,
            metadata=model.metadata,
            wrapper_source=package.wrapper_source(model),
            sha256=package.sha256,
            thread_limit=model.thread_limit,
            fixed_threads=model.fixed_threads,
        )


class CpuContainer:
    """A container run through the C ABI, the GIL released."""

    def __init__(self, raw: RawContainer, request: LoadRequest, extracted: Extracted) -> None:
        self._raw = raw
        self._name = request.name
        self._instances = request.instances
        self._extracted = extracted
        load_weights(raw, extracted)
        self.folds = any(constant.spec.folded for constant in raw.constants)
        if self.folds:
            raw.fold(inactive=False)  # now, and not in the first request
        self._c_run = raw.c_run()
        self.staging = Staging(raw.name)
        self._inactive_bytes = 0
        # An output that lies where constants lie is a weight itself; so is one that warming up found to be folded.
        self._constants_start: list[int] = []
        self._constants_end: list[int] = []
        self._folded_outputs: set[int] = set()
        self._know_memory()
        self._info: ContainerInfo | None = None

    @property
    def info(self) -> ContainerInfo:
        if self._info is None:
            raw = self._raw
            in_spec, out_spec = raw.call_spec()
            self._info = ContainerInfo(
                runtime="c_abi",
                instances=self._instances,
                num_inputs=raw.num_inputs,
                num_outputs=raw.num_outputs,
                in_spec=in_spec,
                out_spec=out_spec,
                constants=tuple(constant.spec for constant in raw.constants),
                missing=missing_functions(raw.library),
            )
        return self._info

    @property
    def c_run(self) -> CRun:
        return self._c_run

    def own(self, outputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        for index in self._folded_outputs:
            tensor = outputs[index]
            outputs[index] = None if tensor is None else tensor.clone()
        starts = self._constants_start
        if starts:
            for index, tensor in enumerate(outputs):
                if tensor is not None:
                    address = tensor.data_ptr()
                    place = bisect_right(starts, address)
                    if place and address < self._constants_end[place - 1]:
                        outputs[index] = tensor.clone()
        return outputs

    def run_raw(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return self.own(self._raw.run(inputs))

    def warm_up(self, make_inputs: Callable[[], Sequence[torch.Tensor]]) -> None:
        """Also learns which outputs are folded constants: two results that live at once can only share those."""
        before: list[torch.Tensor | None] = []
        for _ in range(self._instances + 1):
            inputs = make_inputs()
            now = self._raw.run(inputs)
            own = {tensor.data_ptr() for tensor in inputs}
            for index, (old, new) in enumerate(zip(before, now, strict=False)):
                if old is None or new is None or not new.numel():
                    continue
                start = new.data_ptr()
                if start == old.data_ptr() and start not in own:
                    self._folded_outputs.add(index)
            before = now

    def close(self) -> None:
        self._raw.close()
        self.staging.clear()
        self._c_run.native = None  # with what native lanes keep

    def _know_memory(self) -> None:
        both = sorted({*self._raw.constant_memory(), *self._raw.constant_memory(inactive=True)})
        self._constants_start = [start for start, _ in both]
        self._constants_end = [end for _, end in both]

    # --- live weights ----------------------------------------------------------------------------------

    @property
    def updatable(self) -> str:
        constants = self._raw.constants
        if not constants or any(constant.spec.fqn.startswith("_frozen_param") for constant in constants):
            return "they were compiled into its code (freeze=True)"
        return self._raw.why_not_updatable

    @property
    def inactive_ready(self) -> bool:
        return self._raw.ready(inactive=True)

    @property
    def inactive_bytes(self) -> int:
        return self._inactive_bytes

    def stage(self, weights: object, *, partial: bool = False, check_finite: bool = False) -> int:
        with open_weights(weights) as tensors:
            ready = self._raw.full_set(self._name, tensors, partial=partial, check_finite=check_finite)
        size = self._raw.stage(ready)  # not before a file was found to be still the one that was read
        self._inactive_bytes = size
        self._know_memory()  # before anything can run on it
        return size

    def fold(self) -> None:
        self._raw.fold(inactive=True)

    def swap(self) -> None:
        self._raw.swap()

    def free_inactive(self) -> None:
        self._raw.free_inactive()
        self._inactive_bytes = 0
        self._know_memory()

    def extract(self, *, inactive: bool = False) -> dict[str, torch.Tensor]:
        return self._raw.extract(inactive=inactive)

    def rebuild(self) -> None:
        # When folding the inactive buffer throws, the runtime gives the instance it folded with back to the others while
        # that one's maps still point into the inactive buffer (`run_const_fold` in model_container.h): it would run on it.
        old = self._raw
        raw = RawContainer(old.library, self._instances)
        raw.name = old.name
        try:
            if self.updatable:  # so they are the package's own still
                load_weights(raw, self._extracted)
            else:
                raw.update(old.extract(), inactive=False)
            if self.folds:
                raw.fold(inactive=False)
        except BaseException:
            raw.close()
            raise
        self._raw = raw
        self._c_run = raw.c_run()
        self._inactive_bytes = 0
        self._know_memory()
        old.close()


def missing_functions(library: Library) -> tuple[str, ...]:
    """The functions that a model's library lacks because an older torch compiled it, and the torch that brings them."""
    wanted = {name: f for name, f in FUNCTIONS.items() if not f.needs_cpp and "MinimalArrayref" not in name}
    return tuple(f"{name} (torch {f.since})" for name, f in wanted.items() if not library.has(name))


# --- cores and threads --------------------------------------------------------------------------------


def available_cores() -> int:
    """Cores this process may use: its affinity, and the CPU quota of its cgroup (v2, then v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
