"""What devices have in common whose runs go on streams: CUDA, XPU and MPS.

A run is launched on its slot's stream by one thread, which then waits for the device (the *fence*) without the GIL. So a completed run
is complete on the device, too: its inputs may be freed, its slot given to the next, and a barrier needs no other fence.

- On the way in, the slot's stream waits for an event on the stream that was the caller's current one when it called.
- Inputs are held until the fence: the model lets go of them when it has launched.
- On the way out, outputs are recorded on the caller's stream: their memory is of the slot's pool, and would be given to the slot's
  next run while the caller's own work may still read it.

How streams, events and fences are made is each device's own (`Accelerator`); `StreamContainer` is what runs on them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import torch

from aoti_sched.backends.aoti.c_abi import Library, libtorch
from aoti_sched.backends.aoti.container import CAbiContainer
from aoti_sched.backends.aoti.handles import address_of, each_once
from aoti_sched.backends.aoti.operators import names, operators_of
from aoti_sched.backends.aoti.proxy_executor import open_proxy_executor
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.aoti.torch_runner import TorchRunnerContainer
from aoti_sched.backends.contracts import ContainerInfo, CRun, Executor, Loaded, LoadRequest, Work
from aoti_sched.backends.cpu import available_cores, set_threads
from aoti_sched.backends.executors.choose import open_executor
from aoti_sched.errors import ConfigError, DeviceLostError, LoadError, PlatformMismatchError
from aoti_sched.events import log
from aoti_sched.model.specs import ModelSpec, TensorSpec, spec_from_metadata, specs_from_wrapper
from aoti_sched.model.wrapper_source import writes_to_buffers
from aoti_sched.package import Extracted, check_platform, open_package
from aoti_sched.package.sources import constant_layouts

if TYPE_CHECKING:
    from aoti_sched.backends.aoti.constants import Chosen, Constant
    from aoti_sched.backends.native import _native

STAGED_AT_ONCE = 64 << 20
"""Bytes of constants that are written in one call; between two calls, what serves has the device's copy engine."""

LANES = 4
"""The least lanes by default: each mostly waits for its device, and needs no core of its own for that."""


MakesContainers: TypeAlias = "type[StreamContainer]"


class Arrived(list[Any]):
    """A request's inputs, and what was current when it came: an event after all that they depend on, and the stream that will
    use the outputs."""

    __slots__ = ("consumer", "event")

    def __init__(self, inputs: Sequence[Any], event: Any, consumer: Any) -> None:
        super().__init__(inputs)
        self.event = event
        self.consumer = consumer


class Stream(ABC):
    """One stream, owned. `handle` is what a model is given, `of_torch` torch's object for it; None where there is none."""

    handle: int = 0
    of_torch: Any = None
    _device: Accelerator

    @abstractmethod
    def wait_for(self, event: Any) -> None:
        """What comes next on this stream comes after the event. Does not block."""

    def current(self) -> AbstractContextManager[object]:
        """Torch's operations inside go on this stream."""
        return self._device.under(self.of_torch)

    @abstractmethod
    def fence(self) -> None:
        """Wait, the GIL released, until all its work is complete.

        Raises:
            RuntimeError: The device failed.
        """

    @abstractmethod
    def native_fence(self) -> dict[str, int]:
        """How C waits: `fence` or `wait`, the address of a function, and its `argument`; 0 for both functions where C can't."""

    def close(self) -> None:  # noqa: B027 -- a device may have nothing to do
        """Give it back; nothing may be going on."""


class Accelerator(ABC):
    """One device. `type` is torch's word for its kind, `index` its number among those."""

    type: str
    index = 0
    module: Any
    """Torch's module for its kind."""
    verified = False
    """Whether this code has run on a real device of this kind."""
    one_at_a_time = False
    """Whether it takes one work of the whole process at a time."""
    takes_from_host = True
    """Whether a model's own function for constants from the host works there, where it has one."""
    has_addresses = True
    """As `RawContainer.has_addresses`."""
    graph_container: MakesContainers | None = None
    """What makes containers whose runs are recorded, where that can be."""
    may_be_asked = False
    """Whether native lanes can ask it what is done, and need not wait."""

    @property
    def name(self) -> str:
        return f"{self.type}:{self.index}"

    @property
    def records_runs(self) -> bool:
        """As `Device.records_runs`."""
        return self.graph_container is not None

    def cores(self) -> int:
        """How many lanes there are by default, and how many of them may work at once."""
        return max(LANES, available_cores())

    def open_executor(
        self, lanes: int, affinity: Sequence[int] | None = None, launchers: int | None = None
    ) -> Executor:
        if launchers is not None and not (self.may_be_asked and self.native is not None):
            raise ConfigError(
                f"device {self.name!r}: launchers={launchers} needs native lanes, and a device that can be asked what is done, as 'cuda' can; "
                "leave it out"
            )
        executor = open_executor(
            self.name, lanes, available_cores(), set_threads, affinity, launchers=launchers
        )
        executor.lost = self.lost
        return executor

    # --- streams ---------------------------------------------------------------------------------------

    @abstractmethod
    def open_stream(self) -> Stream:
        """A stream that nobody else has."""

    @abstractmethod
    def record(self, stream: Any) -> Any:
        """An event after all that a stream (torch's object) has been given; None where there is no such thing."""

    @abstractmethod
    def current_stream(self) -> Any:
        """Torch's object for the calling thread's current stream, for `Tensor.record_stream`; None where there is none."""

    def under(self, stream: Any) -> AbstractContextManager[object]:
        """A stream (torch's object; None where there is no such thing) is the thread's current one inside."""
        made: AbstractContextManager[object] = (
            nullcontext() if stream is None else self.module.stream(stream)
        )
        return made

    @abstractmethod
    def settle(self) -> None:
        """Wait for the default stream, on which the runtime writes constants."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all streams."""

    def native_functions(self) -> dict[str, int]:
        """Of the device's own functions those that native lanes call, by `_native.Device`'s names."""
        return {}

    @property
    def native_context(self) -> int:
        return 0

    def address(self, function: str) -> int:
        """The address of one of torch's functions, or 0."""
        return address_of(function)

    def workspace(self, streams: Sequence[Stream]) -> int | None:
        """Bytes that torch keeps for these streams, used at the moment or not; None where it does not say."""
        del streams
        return None

    def turn(self) -> AbstractContextManager[object]:
        """The process's turn, on a device that takes one work at a time."""
        return nullcontext()

    def keeping_current(self) -> AbstractContextManager[object]:
        """Whatever is done inside leaves the calling thread's current device as it was."""
        return nullcontext()

    def lost(self) -> str:
        """Why nothing runs on it any more; "" while it works."""
        return ""

    def look_after_failure(self) -> None:  # noqa: B027 -- a device may have no way to know
        """A run has failed: find out whether the device is lost."""

    def must_work(self) -> None:
        """Raise DeviceLostError unless the device works."""
        why = self.lost()
        if why:
            raise DeviceLostError(
                f"device {self.name} is lost: {why}. Nothing runs on it until the process is started again.",
                device=self.name,
            )

    def judged(self, error: BaseException) -> BaseException:
        """A failed run's error, or that the device is lost with it."""
        self.look_after_failure()
        why = self.lost()
        if not why or isinstance(error, DeviceLostError):
            return error
        return DeviceLostError(f"device {self.name} is lost: {why}. {error}", device=self.name)

    @functools.cached_property
    def native(self) -> _native.Device | None:
        """The device as native lanes know it; None where they can't run on it."""
        try:
            from aoti_sched.backends.native import _native
            from aoti_sched.backends.native.executor import shim_of_torch
        except ImportError:
            return None
        shim = shim_of_torch()
        functions = {
            "new_handle": self.address("aoti_torch_new_tensor_handle"),
            "get_device_type": self.address("aoti_torch_get_device_type"),
            "copy": self.address("aoti_torch_copy_"),
            **self.native_functions(),
        }
        if shim is None or not all(functions.values()):
            return None
        return _native.Device(
            shim,
            type=self._number(),
            index=self.index,
            one_at_a_time=self.one_at_a_time,
            functions=functions,
            context=self.native_context,
        )

    def _number(self) -> int:
        """Torch's number for this kind of device."""
        kind = "privateuse1" if self.type == torch._C._get_privateuse1_backend_name() else self.type  # noqa: SLF001
        number: int = getattr(libtorch, f"aoti_torch_device_type_{kind}")()
        return number

    # --- loading ---------------------------------------------------------------------------------------

    def load(self, request: LoadRequest) -> Loaded:
        """As `Device.load`. The calling thread's current device is afterwards what it was: torch's loader changes it."""
        package = open_package(request.path, sha256=request.sha256, contents=request.contents)
        model = package.model(request.model_name)
        check_platform(model)
        if model.device not in ("", self.type):
            raise PlatformMismatchError(
                f"{request.path}: model {model.name!r} was compiled for {model.device}, not for {self.type}",
                path=str(request.path),
            )
        if request.copy_outputs not in (None, "cpu"):
            raise LoadError(f"copy_outputs={request.copy_outputs!r}: 'cpu' or None")
        if request.replicated and not (request.copy_inputs and request.copy_outputs):
            raise ConfigError(
                f"load({str(request.path)!r}): nobody knows beforehand on which of its devices={self.name!r}, ... a request runs, so "
                "inputs come from the host and outputs go there: say copy_inputs=True, copy_outputs='cpu'"
            )
        extracted = package.extract(model, request.cache_dir)
        request = msgspec.structs.replace(
            request, contents=None
        )  # what is kept of it is in the cache
        own = spec_from_metadata(model.metadata)
        wrapper = package.wrapper_source(model)
        if writes_to_buffers(own, wrapper):
            request = msgspec.structs.replace(request, instances=1)
        if own is not None:
            specs = [leaf for leaf in own.inputs if isinstance(leaf, TensorSpec)]
        else:
            specs = list(specs_from_wrapper(wrapper) or ()) if wrapper is not None else []
        make = StreamContainer
        if request.cuda_graphs and model.needs_proxy_executor:
            raise ConfigError(
                f"load({str(request.path)!r}): cuda_graphs=True, but the model calls {names(operators_of(extracted.library))} through "
                "torch's dispatcher, which may wait for the device or call Python, and a graph would not do it again. Leave cuda_graphs out."
            )
        if request.cuda_graphs and self.graph_container is not None:
            make = self.graph_container
        self.must_work()
        request.make_room(model.constant_bytes)
        with self.keeping_current(), self.turn():
            library, title = Library(extracted.library), f"model {request.name!r}"
            proxy, why_not = None, ""
            if model.needs_proxy_executor:
                proxy, why_not = open_proxy_executor(title, self.name, extracted.library)
            raw = self.open_raw(library, make.instances_for(request), title)
            if request.instances > 1 and writes_to_buffers(
                own, wrapper, [c.spec for c in raw.constants]
            ):
                raw.close()
                request = msgspec.structs.replace(request, instances=1)
                raw = self.open_raw(library, make.instances_for(request), title)
            try:
                on_host = tuple(index for index, spec in enumerate(specs) if spec.device == "cpu")
                raw.layouts = constant_layouts(wrapper or "")
                raw.proxy = proxy
                if why_not:
                    container: Any = StreamTorchRunner(
                        self, raw, request, extracted, on_host, own, why=why_not
                    )
                else:
                    container = make(self, raw, request, extracted, on_host, own)
            except BaseException:
                raw.close()
                raise
        return Loaded(
            container=container,
            metadata=model.metadata,
            wrapper_source=wrapper,
            sha256=package.sha256,
            thread_limit=model.thread_limit,
            fixed_threads=1,
        )

    def open_raw(self, library: Library, instances: int, name: str) -> RawContainer:
        """A container of a model; its kernels lie beside its library."""
        raw = RawContainer(library, instances, self.name, str(library.path.parent))
        raw.name = name
        raw.takes_from_cpu &= self.takes_from_host
        raw.has_addresses = self.has_addresses
        return raw


def copied(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return a copy on a device with the same strides, whatever these are."""
    there = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    write(there, tensor)
    return there


def write(to: torch.Tensor, given: torch.Tensor) -> None:
    """Copy the elements of `given`. Of those that are one element of `to`, along a dimension of stride 0, the first is copied.

    Torch refuses to write to one element several times.
    """
    for dim, step in enumerate(to.stride()):
        if step == 0 and to.size(dim) > 1:
            to, given = to.narrow(dim, 0, 1), given.narrow(dim, 0, 1)
    to.copy_(given)


class Slot:
    """One of a container's slots: a stream that is its alone, and what is done around a run on it."""

    def __init__(
        self, device: Accelerator, stream: Stream, on_host: Sequence[bool], request: LoadRequest
    ) -> None:
        self.device = device
        self.stream = stream
        self._on_host = on_host  # of each input, whether it belongs there
        self._copies = request.copy_inputs
        self.copies_home = request.copy_outputs == "cpu"
        self.native: _native.Stream | None = None
        fence = stream.native_fence()
        if device.native is not None and (fence.get("fence") or fence.get("wait")):
            from aoti_sched.backends.native import _native

            brought = [self._copies and not here for here in on_host]
            self.native = _native.Stream(
                device.native, handle=stream.handle, brought=brought, home=self.copies_home, **fence
            )

    def begin(self, work: Work) -> None:
        """Before a run is launched: its stream waits for what the inputs depend on. Does not block.

        Raises:
            DeviceLostError: The device works no more.
        """
        self.device.must_work()
        for inputs in _arrivals(work):
            event = getattr(inputs, "event", None)
            if event is not None:
                try:
                    self.stream.wait_for(event)
                except RuntimeError as error:
                    raise self.device.judged(error) from None

    def hand_over(self, work: Work, outputs: list[Any]) -> None:
        """Outputs (of a batch: each member's) are used on their caller's stream from now on."""
        if self.copies_home:
            return
        each = outputs if work.batch is not None else [outputs]
        for inputs, own in zip(_arrivals(work), each, strict=True):
            consumer = getattr(inputs, "consumer", None)
            for tensor in own if consumer is not None else ():
                if tensor is not None and not tensor.is_cpu:
                    tensor.record_stream(consumer)

    def brought(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs where the model wants them, in Python's way: inside `stream.current()`."""
        if not self._copies:
            return list(inputs)
        return [
            self._bring(tensor) if tensor.is_cpu and not here else tensor
            for tensor, here in zip(inputs, self._on_host, strict=True)
        ]

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        return copied(tensor.detach(), self.device.name)

    def home(self, outputs: list[Any]) -> list[Any]:
        """The outputs where they are wanted."""
        return each_once(outputs, torch.Tensor.cpu) if self.copies_home else outputs

    @contextmanager
    def run(self, work: Work) -> Iterator[None]:
        """A run of Python's inside; when it comes out, the device is done, whatever has failed."""
        with self.device.turn(), torch.no_grad():
            self.begin(work)
            try:
                with self.stream.current():
                    yield
            except BaseException:
                try:
                    self.stream.fence()
                except RuntimeError:
                    log.debug("the device failed after its run", device=self.device.name)
                raise
            self.stream.fence()


class OnStreams(ABC):
    """What a container has whose runs go on streams, be they called through the C ABI or by torch's runner."""

    staging: Any

    @staticmethod
    def instances_for(request: LoadRequest) -> int:
        """How many instances the runtime's container must have."""
        return request.instances

    def _open_slots(
        self, device: Accelerator, request: LoadRequest, inputs: int, on_host: Sequence[int]
    ) -> None:
        self._device = device
        self._host_outputs = request.copy_outputs == "cpu"
        marks = [index in on_host for index in range(inputs)]
        self._slots: list[Slot] = []
        for _ in range(request.instances):
            self._slots.append(Slot(device, device.open_stream(), marks, request))
        self._house = device.open_stream()
        """For what is no request's: folding, copies."""
        self._workspace: int | None = None

    @property
    def workspace(self) -> int | None:
        return self._workspace

    def _measure(self) -> None:
        self._workspace = self._device.workspace(
            [*(slot.stream for slot in self._slots), self._house]
        )

    def _close_slots(self) -> None:
        for slot in self._slots:
            slot.native = None  # with its pinned memory
            slot.stream.close()
        if self._slots:
            self._house.close()
        self._slots = []

    def capture_stream(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """A request's inputs, on the caller's thread and under its current stream.

        Raises:
            DeviceLostError: The device works no more.
        """
        from_host = all(tensor.is_cpu for tensor in inputs)
        if from_host and self._host_outputs:
            return inputs
        stream = self._device.current_stream()
        try:
            event = None if from_host else self._device.record(stream)
        except RuntimeError as error:
            raise self._device.judged(error) from None
        return Arrived(inputs, event, None if self._host_outputs else stream)

    def inherit_stream(self) -> AbstractContextManager[object]:
        """The calling thread's current stream is, inside, that of whatever thread enters: a request is made for another thread."""
        return self._device.under(self._device.current_stream())

    def run_work(self, work: Work) -> list[Any]:
        """A work from beginning to end on the calling thread, in Python's way."""
        slot = self._slots[work.slot]
        try:
            with slot.run(work):
                batch = work.batch
                if batch is None:
                    outputs = self._once(slot, work.inputs)
                else:
                    members = [slot.brought(member) for member in batch.members]
                    there = msgspec.structs.replace(batch, members=members)
                    outputs = self.staging.run(there, functools.partial(self._once, slot))
        except Exception as error:  # noqa: BLE001 -- it is raised again, perhaps as another
            raise self._device.judged(error) from None
        slot.hand_over(work, outputs)
        return outputs

    @abstractmethod
    def _once(self, slot: Slot, inputs: Sequence[Any]) -> list[Any]:
        """One run of the model inside `slot.run`."""


class StreamContainer(OnStreams, CAbiContainer):
    """A container on a device, run through the C ABI: each of its slots has a stream."""

    def __init__(
        self,
        device: Accelerator,
        raw: RawContainer,
        request: LoadRequest,
        extracted: Extracted,
        on_host: Sequence[int],
        spec: ModelSpec | None = None,
    ) -> None:
        self._open_slots(device, request, raw.num_inputs, on_host)
        self._turns = 0  # whose turn it is to be warmed up
        try:
            super().__init__(raw, request, extracted, spec)
            device.settle()
            self._know_c_run()
        except BaseException:
            self._close_slots()
            raise

    @property
    def info(self) -> ContainerInfo:
        return msgspec.structs.replace(super().info, inline=False, verified=self._device.verified)

    def _know_c_run(self) -> None:
        self._c_run.slots = self._slots

    @property
    def c_run(self) -> CRun | None:  # type: ignore[override]
        """None where only Python can wait for the device."""
        return self._c_run if self._slots and self._slots[0].native is not None else None

    def own(self, outputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Outputs that are weights are copied on a stream of their own, and that is waited for: the weights may be written next."""
        if self._host_outputs:  # and lie there
            return super().own(outputs)
        if self._aliases(outputs):
            with self._device.turn(), self._house.current():
                super().own(outputs)
                self._house.fence()
        return outputs

    def _aliases(self, outputs: Sequence[torch.Tensor | None]) -> list[int]:
        if self._raw.has_addresses:
            return super()._aliases(outputs)
        weights = {*self._folded_outputs}
        for index, tensor in enumerate(outputs):
            if tensor is not None and tensor.untyped_storage().data_ptr() in self._constants_start:
                weights.add(index)
        return [index for index in sorted(weights) if outputs[index] is not None]

    def run_raw(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return self.run_work(Work(self, self.capture_stream(inputs), 1, None))

    def warm_up(self, make_inputs: Callable[[], Sequence[torch.Tensor]]) -> None:
        super().warm_up(make_inputs)
        self._measure()

    def close(self) -> None:
        self._raw.close()
        self.staging.clear()
        self._c_run.native = None
        self._c_run.slots = ()
        self._close_slots()

    def _once(self, slot: Slot, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        outputs = self._raw.run(slot.brought(inputs), stream=slot.stream.handle)
        return slot.home(CAbiContainer.own(self, outputs))

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """A run of warming up: outputs as the model gave them, each time in the next slot."""
        slot = self._slots[self._turns % len(self._slots)]
        self._turns += 1
        with slot.run(Work(self, self.capture_stream(inputs), 1, None)):
            return self._raw.run(slot.brought(inputs), stream=slot.stream.handle)

    # --- live weights ----------------------------------------------------------------------------------

    def _fold(self, raw: RawContainer, *, inactive: bool) -> None:
        with self._device.keeping_current(), self._device.turn():
            raw.fold(inactive=inactive, stream=self._house.handle)
            self._house.fence()
            self._device.settle()  # what is no parameter was copied over on the default stream

    def _full_set(
        self, chosen: Chosen, *, check_finite: bool
    ) -> list[tuple[Constant, torch.Tensor]]:
        with (
            self._device.keeping_current(),
            self._device.turn(),
        ):  # laying tensors out is work of the device's, too, when they are there
            return super()._full_set(chosen, check_finite=check_finite)

    def _write(self, ready: list[tuple[Constant, torch.Tensor]]) -> int:
        self._device.must_work()
        if any(not tensor.is_cpu for _, tensor in ready):
            self._device.synchronize()  # what computes them may go on, on any stream
        with self._device.keeping_current(), self._device.turn():
            size = self._raw.stage(ready, at_once=STAGED_AT_ONCE, bring=self._bring)
            self._device.settle()  # the runtime does not wait for copies from device to device
        self._measure()
        return size

    @contextmanager
    def _bring(self, tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Host tensors on the device, for models that can't take them from the host; inside they are written."""
        with self._house.current():
            brought = [copied(tensor, self._device.name) for tensor in tensors]
            self._house.fence()
        yield brought
        self._device.settle()  # the runtime reads them on the default stream, and does not wait

    def extract(self, *, inactive: bool = False) -> dict[str, torch.Tensor]:
        with self._device.keeping_current(), self._device.turn():
            constants = super().extract(inactive=inactive)
            self._device.settle()
        return constants

    def rebuild(self) -> None:
        with self._device.keeping_current(), self._device.turn():
            super().rebuild()
            self._device.settle()
        self._know_c_run()

    unparkable = ""

    def park(self) -> None:
        """What the package has not is kept on the host."""
        with self._device.keeping_current(), self._device.turn():
            if not self._packaged[0]:
                self._kept = self._raw.extract(host=True)
            super().park()

    def unpark(self) -> None:
        self._device.must_work()
        with self._device.keeping_current(), self._device.turn():
            super().unpark()
            self._device.settle()
        self._measure()
        self._know_c_run()

    def _another(self) -> RawContainer:
        raw = self._device.open_raw(self._raw.library, self._instances, self._raw.name)
        raw.layouts = self._raw.layouts
        return raw


class StreamTorchRunner(OnStreams, TorchRunnerContainer):
    """Torch's own runner on a device."""

    def __init__(
        self,
        device: Accelerator,
        raw: RawContainer,
        request: LoadRequest,
        extracted: Extracted,
        on_host: Sequence[int],
        spec: ModelSpec | None = None,
        *,
        why: str,
    ) -> None:
        self._open_slots(device, request, raw.num_inputs, on_host)
        self._turns = 0
        try:
            super().__init__(raw, request, extracted, spec, device=device.name, why=why)
            device.settle()
        except BaseException:
            self._close_slots()
            raise

    @property
    def info(self) -> ContainerInfo:
        return msgspec.structs.replace(super().info, inline=False, verified=self._device.verified)

    def run_raw(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        slot = self._turns % len(self._slots)
        return self.run_work(Work(self, self.capture_stream(inputs), 1, None, slot=slot))

    def warm_up(self, make_inputs: Callable[[], Sequence[torch.Tensor]]) -> None:
        for _ in self._slots:
            self.run_raw(make_inputs())
            self._turns += 1
        super().warm_up(make_inputs)
        self._measure()

    def _once(self, slot: Slot, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return slot.home(self._run_on(slot.brought(inputs), slot.stream.handle))

    def rebuild(self) -> None:
        with self._device.keeping_current(), self._device.turn():
            super().rebuild()
            self._device.settle()

    def close(self) -> None:
        super().close()
        self._close_slots()


def _arrivals(work: Work) -> Sequence[Sequence[Any]]:
    return work.batch.members if work.batch is not None else (work.inputs,)
