"""Containers whose runs go on streams: one that C runs, and one that torch's own runner runs.

A run is launched on its slot's stream by one thread, which then waits for the device (the *fence*)
without the GIL. So a completed run is complete on the device, too: its inputs may be freed, its
slot given to the next run, and a barrier needs no other fence.

- On the way in, the slot's stream waits for an event. The event is on the stream that was current
when the caller called.
- Inputs are held until the fence: the model drops its references when it has launched.
- On the way out, outputs are recorded on the caller's stream. Their memory is of the slot's pool.
Without the record, the
  slot's next run would get it while the caller's own work may still read it.
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
    from aoti_sched.backends.aoti.constants import Chosen, Constant

STAGED_AT_ONCE = 64 << 20
"""Bytes of constants that are written in one call.

Between two calls, runs have the device's copy engine.
"""


class OnStreams(ABC):
    """What containers on streams share, whether C or torch's own runner runs them."""

    staging: Any

    @staticmethod
    def instances_for(request: LoadRequest) -> int:
        """Return how many instances the runtime's container must have."""
        return request.instances

    def _open_slots(
        self, device: StreamDevice, request: LoadRequest, inputs: int, on_host: Sequence[int]
    ) -> None:
        self._device = device
        self._host_outputs = request.copy_outputs == "cpu"
        marks = [index in on_host for index in range(inputs)]
        self._slots: list[Slot] = []
        for _ in range(request.instances):
            self._slots.append(Slot(device, device.open_stream(), marks, request))
        self._house = device.open_stream()
        """For work of no request: folding, copies."""
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
        """The calling thread's current stream is, inside, that of whatever thread enters: a request
        is made for another thread.
        """
        return self._device.under(self._device.current_stream())

    def run_work(self, work: Work) -> list[Any]:
        """Run a work from beginning to end on the calling thread, in Python."""
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
        """Run the model once inside `slot.run`."""


class StreamContainer(OnStreams, CAbiContainer):
    """A container on a device, run through the C ABI: each of its slots has a stream."""

    def __init__(
        self,
        device: StreamDevice,
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

    def detach_outputs(self, outputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Copy outputs that are weights, on a stream of their own, and wait for the copies.

        The weights may be written next.
        """
        if self._host_outputs:  # and lie there
            return super().detach_outputs(outputs)
        if self._aliases(outputs):
            with self._device.turn(), self._house.current():
                super().detach_outputs(outputs)
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
        return slot.home(CAbiContainer.detach_outputs(self, outputs))

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run once for warming up, in the next slot. Outputs stay as the model gave them."""
        slot = self._slots[self._turns % len(self._slots)]
        self._turns += 1
        with slot.run(Work(self, self.capture_stream(inputs), 1, None)):
            return self._raw.run(slot.brought(inputs), stream=slot.stream.handle)

    # --- live weights
    # ----------------------------------------------------------------------------------

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
        """Copy host tensors to the device, for models that can't take them from the host.

        The copies are written in the block.
        """
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
        """Free the constants. Constants that the package does not have are kept on the host."""
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
