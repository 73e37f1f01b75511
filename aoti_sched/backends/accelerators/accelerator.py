"""Accelerators: the lanes and the loading that CUDA, XPU and MPS have in common."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aoti_sched.backends.accelerators.stream_container import StreamContainer, StreamTorchRunner
from aoti_sched.backends.accelerators.streams import StreamDevice
from aoti_sched.backends.aoti.c_abi import Library
from aoti_sched.backends.aoti.operators import names, operators_of
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.contracts import Container, Executor, Inspected, LoadRequest
from aoti_sched.backends.cpu import available_cores, set_threads
from aoti_sched.backends.executors.choose import open_executor
from aoti_sched.backends.opening import InspectedPackage, inspect_package, open_container
from aoti_sched.errors import ConfigError, LoadError
from aoti_sched.model.specs import TensorSpec, specs_from_wrapper
from aoti_sched.package import PackagedModel, check_capability

MOST_LANES = 32
"""The most lanes by default: as many hardware queues as a CUDA device can have
(`CUDA_DEVICE_MAX_CONNECTIONS`, CUDA C++ Programming Guide).

A lane mostly waits for its device, so it needs no core of its own. Where each instance has a lane,
it keeps that one, and libraries keep memory for as few pairs of a thread and a stream as possible.
"""


class Accelerator(StreamDevice):
    """A device whose runs go on streams."""

    graph_container: type[StreamContainer] | None = None
    """The class of containers that record their runs; None where runs can't be recorded."""

    @property
    def records_runs(self) -> bool:
        """As `Device.records_runs`."""
        return self.graph_container is not None

    @property
    def most_lanes(self) -> int | None:
        """As `Device.most_lanes`."""
        return MOST_LANES

    def cores(self) -> int:
        """Return 1: each model brings as many lanes as it has instances."""
        return 1

    def open_executor(
        self,
        lanes: int,
        affinity: Sequence[int] | None = None,
        launchers: int | None = None,
        wait: str | None = None,
    ) -> Executor:
        if wait is not None and wait not in self.waits:
            raise ConfigError(
                f"device {self.name!r}: wait={wait!r}: there is no choice of how its lanes wait; "
                "it is for 'cuda'. Leave wait out."
            )
        self.spins = wait == "spin"
        if launchers is not None and not (self.supports_query and self.native is not None):
            raise ConfigError(
                f"device {self.name!r}: launchers={launchers} needs native lanes, and a device "
                "that can be polled, such as 'cuda'. Leave launchers out."
            )
        executor = open_executor(
            self.name,
            lanes,
            available_cores(),
            set_threads,
            affinity,
            launchers=launchers,
            most=self.most_lanes,
        )
        executor.lost = self.lost
        executor.workspace = self.workspace
        return executor

    def inspect(self, request: LoadRequest) -> Inspected:
        """As `Device.inspect`."""

        def check(model: PackagedModel) -> None:
            capability = self.capability()
            if capability is not None:
                check_capability(model, capability)
            if request.copy_outputs not in (None, "cpu"):
                raise LoadError(
                    f"copy_outputs={request.copy_outputs!r}: no such place. Use 'cpu' or None."
                )
            if request.replicated and not (request.copy_inputs and request.copy_outputs):
                raise ConfigError(
                    f"load({str(request.path)!r}): a request runs on any of its "
                    f"devices={self.name!r}, ..., so its inputs come from the host and its outputs "
                    "go there. Set copy_inputs=True, copy_outputs='cpu'."
                )

        inspected = inspect_package(request, self.type, check)
        if request.cuda_graphs and inspected.model.needs_proxy_executor:
            raise ConfigError(
                f"load({str(request.path)!r}): cuda_graphs=True, but the model calls "
                f"{names(operators_of(inspected.extracted.library))} through "
                "torch's dispatcher, which may wait for the device or call Python, and a graph "
                "would not do it again. Leave cuda_graphs out."
            )
        if request.cuda_graphs and _records_itself(inspected.extracted.library):
            raise ConfigError(
                f"load({str(request.path)!r}): cuda_graphs=True, but the model was compiled to "
                "record its runs itself. Leave cuda_graphs out."
            )
        self.check_alive()
        return msgspec.structs.replace(inspected, fixed_threads=1)

    def load(self, inspected: Inspected) -> Container:
        """As `Device.load`.

        The calling thread's current device stays as it was: torch's loader changes it.
        """
        make = StreamContainer
        if inspected.request.cuda_graphs and self.graph_container is not None:
            make = self.graph_container
        own, wrapper = inspected.own, inspected.wrapper_source
        if own is not None:
            specs = [leaf for leaf in own.inputs if isinstance(leaf, TensorSpec)]
        else:
            specs = list(specs_from_wrapper(wrapper) or ()) if wrapper is not None else []
        on_host = tuple(index for index, spec in enumerate(specs) if spec.device == "cpu")

        def open_raw(library: Library, request: LoadRequest, title: str) -> RawContainer:
            return self.open_raw(library, make.instances_for(request), title)

        def wrap(raw: RawContainer, opened: InspectedPackage, why_not: str) -> Container:
            request, extracted = opened.request, opened.extracted
            if why_not:
                return StreamTorchRunner(self, raw, request, extracted, on_host, own, why=why_not)
            return make(self, raw, request, extracted, on_host, own)

        self.check_alive()

        def load() -> Container:
            with self.at_work():
                return open_container(inspected, self.name, open_raw, wrap)

        return self.with_room(load)


def _records_itself(library: Path) -> bool:
    """Return whether a model's library calls torch's functions for CUDA graphs.

    No torch has them yet (pytorch/pytorch#196780).
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as all_:
        return all_.find(b"aoti_torch_cuda_graph_") >= 0
