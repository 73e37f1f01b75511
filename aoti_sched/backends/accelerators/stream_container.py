"""Containers whose runs go on streams: one that C runs, and one that torch's own runner runs.

One thread launches a run on the slot's stream, then waits for the device without the GIL. The wait
is called the *fence*. So a completed run is also complete on the device: the inputs may be freed,
the slot may take the next run, and a barrier needs no other fence.

- Before a run, the slot's stream waits for an event, which was recorded on the caller's current
  stream when the request came.
- Inputs are kept until the fence, because the model drops its references once it has launched.
- After a run, outputs are recorded on the caller's stream. Their memory belongs to the slot's pool.
  Without the record, the slot's next run could get that memory while the caller's own work still
  reads it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from aoti_sched.backends.accelerators.slot import Arrived, Slot, copied
from aoti_sched.backends.aoti.container import CAbiContainer
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.aoti.torch_runner import TorchRunnerContainer
from aoti_sched.backends.contracts import ContainerInfo, CRun, LoadRequest, Work
from aoti_sched.model.specs import ModelSpec
from aoti_sched.package import Extracted

if TYPE_CHECKING:
    from aoti_sched.backends.accelerators.streams import StreamDevice
    from aoti_sched.backends.aoti.constants import Constant
    from aoti_sched.backends.aoti.weight_check import Chosen
    from aoti_sched.backends.reading import Reading

STAGED_AT_ONCE = 64 << 20
"""The most bytes of constants that are written in one call.

Between two calls, runs can use the device's copy engine.
"""


class OnStreams(ABC):
    """The common part of containers on streams: slots, the caller's stream, and runs in Python."""

    staging: Any

    @staticmethod
    def instances_for(request: LoadRequest) -> int:
        """Return how many instances the runtime's container must have."""
        return request.instances

    def _open_slots(
        self,
        device: StreamDevice,
        request: LoadRequest,
        inputs: int,
        on_host: Sequence[int],
        spec: ModelSpec | None,
    ) -> None:
        self._device = device
        self._host_outputs = request.copy_outputs == "cpu"
        marks = [index in on_host for index in range(inputs)]
        self._slots: list[Slot] = []
        for _ in range(request.instances):
            stream = device.open_stream(request.stream_priority)
            self._slots.append(Slot(device, stream, marks, request, spec))
        device.slots += len(self._slots)
        self._notes_of_device = device.notes()
        self._internal_stream = device.open_stream()
        """The stream for work that belongs to no request: folding and copies of weights."""

    def _on_device(self, info: ContainerInfo) -> ContainerInfo:
        return msgspec.structs.replace(
            info,
            inline=False,
            verified=self._device.verified,
            notes=(*info.notes, *self._notes_of_device),
        )

    def _close_slots(self) -> None:
        slots, self._slots = self._slots, []
        if not slots:
            return
        self._device.slots -= len(slots)
        with self._device.preserve_current_device():
            for slot in slots:
                slot.native = None  # frees its pinned memory
                slot.stream.close()
            self._internal_stream.close()

    def capture_stream(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Return a request's inputs together with the caller's current stream.

        The caller's thread calls this.

        Raises:
            DeviceLostError: The device is lost.
        """
        from_host = all(tensor.is_cpu for tensor in inputs)
        if from_host and self._host_outputs:
            return inputs
        stream = self._device.current_stream()
        try:
            event = None if from_host else self._device.record(stream)
        except RuntimeError as error:
            raise self._device.classify(error) from None
        return Arrived(inputs, event, None if self._host_outputs else stream)

    def inherit_stream(self) -> AbstractContextManager[object]:
        """Make the caller's current stream current on the thread that enters the returned context.

        One thread uses this to make a request on behalf of another.
        """
        return self._device.stream_context(self._device.current_stream())

    def run_work(self, work: Work) -> list[Any]:
        """Run a work completely on the calling thread, in Python."""
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
            raise self._device.classify(error) from None
        slot.hand_over(work, outputs)
        return outputs

    @abstractmethod
    def _once(self, slot: Slot, inputs: Sequence[Any]) -> list[Any]:
        """Run the model once; called inside `slot.run`."""


class StreamContainer(OnStreams, CAbiContainer):
    """A container on a device, run through the C ABI, with a stream for each slot."""

    def __init__(
        self,
        device: StreamDevice,
        raw: RawContainer,
        request: LoadRequest,
        extracted: Extracted,
        on_host: Sequence[int],
        spec: ModelSpec | None = None,
    ) -> None:
        self._open_slots(device, request, raw.num_inputs, on_host, spec)
        self._turns = 0  # warm-up runs so far; they go through the slots in order
        try:
            super().__init__(raw, request, extracted, spec)
            device.settle()
            self._know_c_run()
        except BaseException:
            self._close_slots()
            raise

    @property
    def info(self) -> ContainerInfo:
        return self._on_device(super().info)

    def _know_c_run(self) -> None:
        self._c_run.slots = self._slots

    @property
    def c_run(self) -> CRun | None:  # type: ignore[override]
        """How native code runs the model; None where only Python can wait for the device."""
        return self._c_run if self._slots and self._slots[0].native is not None else None

    def detach_outputs(self, outputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Copy outputs that share memory with weights, and wait for the copies.

        The copies are made on the internal stream. The weights may be written right afterwards.
        """
        if self._host_outputs:  # the outputs are on the host already
            return super().detach_outputs(outputs)
        if self._aliases(outputs):
            with self._device.turn(), self._internal_stream.current():
                super().detach_outputs(outputs)
                self._internal_stream.fence()
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

    def close(self) -> None:
        with self._device.preserve_current_device():
            self._raw.close()
        self.staging.clear()
        self._c_run.native = None
        self._c_run.slots = ()
        self._close_slots()

    def _once(self, slot: Slot, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        outputs = self._raw.run(slot.brought(inputs), stream=slot.stream.handle)
        return slot.home(CAbiContainer.detach_outputs(self, outputs))

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run once in the next slot, as a warm-up. Outputs are not copied to the host."""
        slot = self._slots[self._turns % len(self._slots)]
        self._turns += 1
        with slot.run(Work(self, self.capture_stream(inputs), 1, None)):
            return self._raw.run(slot.brought(inputs), stream=slot.stream.handle)

    # --- live weights
    # ----------------------------------------------------------------------------------

    def _fold(self, raw: RawContainer, *, inactive: bool) -> None:
        with self._device.at_work():
            raw.fold(inactive=inactive, stream=self._internal_stream.handle)
            self._internal_stream.fence()
            self._device.settle()  # constants other than parameters are copied on that stream

    def _full_set(
        self, chosen: Chosen, *, check_finite: bool
    ) -> list[tuple[Constant, torch.Tensor]]:
        # Laying out tensors that are on the device is work of the device, too.
        with self._device.at_work():
            return super()._full_set(chosen, check_finite=check_finite)

    def _write(self, ready: list[tuple[Constant, torch.Tensor]]) -> int:
        self._device.check_alive()
        if any(not tensor.is_cpu for _, tensor in ready):
            self._device.synchronize()  # any stream may still be computing them

        def write() -> int:
            with self._device.at_work():
                size = self._raw.stage(ready, at_once=STAGED_AT_ONCE, bring=self._bring)
                self._device.settle()  # the runtime does not wait for copies on the device
            return size

        return self._device.with_room(write)

    @contextmanager
    def _bring(self, tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Copy host tensors to the device, for models that can't take them from the host.

        The block writes the copies to the constants.
        """
        with self._internal_stream.current():
            brought = [copied(tensor, self._device.name) for tensor in tensors]
            self._internal_stream.fence()
        yield brought
        self._device.settle()  # the runtime reads the copies on the default stream without waiting

    def swap(self) -> None:
        with self._device.preserve_current_device():
            super().swap()

    def free_inactive(self) -> None:
        with self._device.at_work():
            super().free_inactive()

    def extract(self, *, inactive: bool = False) -> dict[str, torch.Tensor]:
        with self._device.at_work():
            constants = super().extract(inactive=inactive)
            self._device.settle()
        return constants

    def rebuild(self) -> None:
        with self._device.at_work():
            super().rebuild()
            self._device.settle()
        self._know_c_run()

    unparkable = ""

    def park(self) -> None:
        """Free the constants, after copying those that the package lacks to the host."""
        with self._device.at_work():
            if not self._packaged[0]:
                self._kept = self._raw.extract(host=True)
            super().park()

    def unpark(self, reading: Reading | None = None) -> None:
        self._device.check_alive()

        def restore() -> None:
            with self._device.at_work():
                CAbiContainer.unpark(self, reading)
                self._device.settle()

        self._device.with_room(restore)
        self._know_c_run()

    def _new_raw(self) -> RawContainer:
        raw = self._device.open_raw(self._raw.library, self._instances, self._raw.name)
        raw.layouts = self._raw.layouts
        return raw


class StreamTorchRunner(OnStreams, TorchRunnerContainer):
    """Torch's own runner on a device."""

    def __init__(
        self,
        device: StreamDevice,
        raw: RawContainer,
        request: LoadRequest,
        extracted: Extracted,
        on_host: Sequence[int],
        spec: ModelSpec | None = None,
        *,
        why: str,
    ) -> None:
        self._open_slots(device, request, raw.num_inputs, on_host, spec)
        self._turns = 0
        try:
            super().__init__(raw, request, extracted, spec, device=device.name, why=why)
            device.settle()
        except BaseException:
            self._close_slots()
            raise

    @property
    def info(self) -> ContainerInfo:
        return self._on_device(super().info)

    def run_raw(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        slot = self._turns % len(self._slots)
        return self.run_work(Work(self, self.capture_stream(inputs), 1, None, slot=slot))

    def warm_up(self, make_inputs: Callable[[], Sequence[torch.Tensor]]) -> None:
        for _ in self._slots:
            self.run_raw(make_inputs())
            self._turns += 1
        super().warm_up(make_inputs)

    def _once(self, slot: Slot, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        return slot.home(self._run_on(slot.brought(inputs), slot.stream.handle))

    def rebuild(self) -> None:
        with self._device.at_work():
            super().rebuild()
            self._device.settle()

    def park(self) -> None:
        with self._device.at_work():
            self._keep_if_lost()
            super().park()

    def close(self) -> None:
        with self._device.preserve_current_device():
            self._keep_if_lost()
            super().close()
        self._close_slots()

    def _keep_if_lost(self) -> None:
        if self._runner is not None and self._device.is_lost():
            self._device.abandon(self._runner)
