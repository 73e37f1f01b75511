"""Slots: a container's streams, and the work on a stream before and after each run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch

from aoti_sched.backends.accelerators.pinned import pinned_bytes
from aoti_sched.backends.accelerators.streams import RECORD_USE
from aoti_sched.backends.aoti.handles import each_once
from aoti_sched.backends.contracts import LoadRequest, Work
from aoti_sched.events import log
from aoti_sched.model.specs import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from aoti_sched.backends.accelerators.streams import Stream, StreamDevice
    from aoti_sched.backends.native import _native


class Arrived(list[Any]):
    """A request's inputs, with the caller's stream at the time of the request.

    Attributes:
        event: The event that follows all work on which the inputs depend; None without such work.
        consumer: The stream that uses the outputs; None where the outputs go to the host.
    """

    __slots__ = ("consumer", "event")

    def __init__(self, inputs: Sequence[Any], event: Any, consumer: Any) -> None:
        super().__init__(inputs)
        self.event = event
        self.consumer = consumer


class Slot:
    """One slot of a container, with a stream of its own.

    Args:
        device: The container's device.
        stream: The slot's stream. No other slot uses the stream.
        on_host: For each input, whether the model takes the input from the host.
        request: The load request, which states whether inputs and outputs are copied.
        spec: The model's specs, whose largest sizes say how much pinned memory copies need.
    """

    def __init__(
        self,
        device: StreamDevice,
        stream: Stream,
        on_host: Sequence[bool],
        request: LoadRequest,
        spec: ModelSpec | None = None,
    ) -> None:
        self.device = device
        self.stream = stream
        self._on_host = on_host
        self._copies = request.copy_inputs
        self.copies_home = request.copy_outputs == "cpu"
        self.native: _native.Stream | None = None
        functions = device.native_functions()
        self._native_events = "make_event" in functions
        self.records_uses = bool(device.address(RECORD_USE)) and not self.copies_home
        """Whether native code records the uses of outputs."""
        fence = stream.native_fence()
        if device.native is not None and (fence.get("fence") or fence.get("wait")):
            from aoti_sched.backends.native import _native

            brought = [self._copies and not here for here in on_host]
            inputs = [] if spec is None else _tensors(spec.inputs)
            outputs = [] if spec is None or not self.copies_home else _tensors(spec.outputs)
            self.native = _native.Stream(
                device.native,
                handle=stream.handle,
                brought=brought,
                home=self.copies_home,
                bytes_in=pinned_bytes(compress(inputs, brought)),
                bytes_out=pinned_bytes(outputs),
                **fence,
            )

    def begin(self, work: Work) -> None:
        """Let the slot's stream wait for everything that a work's inputs depend on. Does not block.

        Raises:
            DeviceLostError: Nothing runs on the device any more.
        """
        self.device.check_alive()
        for inputs in _arrivals(work):
            event = getattr(inputs, "event", None)
            if event is not None:
                try:
                    self.stream.wait_for(event)
                except RuntimeError as error:
                    raise self.device.classify(error) from None

    def begin_natively(self, work: Work) -> _native.Arrival | None:
        """Return what native code lets the slot's stream wait for, before the work.

        Where native code knows no events, the wait is enqueued here. A batch of native code comes
        from the host, and depends on nothing.

        Raises:
            DeviceLostError: Nothing runs on the device any more.
        """
        self.device.check_alive()
        event = getattr(work.inputs, "event", None)
        if event is None or self._native_events:
            return event
        self.stream.wait_for(event)
        return None

    def consumers(self, work: Work) -> list[int | None] | None:
        """Return torch's ids of the streams that use the outputs, for each member of a batch.

        Native code records their use. None where outputs go to the host, and where that is left to
        `hand_over`.
        """
        if not self.records_uses:
            return None
        streams = [getattr(inputs, "consumer", None) for inputs in _arrivals(work)]
        return [None if stream is None else stream.stream_id for stream in streams]

    def hand_over(self, work: Work, outputs: list[Any]) -> None:
        """Record outputs on the stream of their caller, which uses them next.

        For a batch, `outputs` has a list for each member.
        """
        if self.copies_home:
            return
        each = outputs if work.batch is not None else [outputs]
        for inputs, own in zip(_arrivals(work), each, strict=True):
            consumer = getattr(inputs, "consumer", None)
            for tensor in own if consumer is not None else ():
                if tensor is not None and not tensor.is_cpu:
                    tensor.record_stream(consumer)

    def brought(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the inputs on the device that the model expects.

        Call this inside `stream.current()`.
        """
        if not self._copies:
            return list(inputs)
        return [
            self._bring(tensor) if tensor.is_cpu and not here else tensor
            for tensor, here in zip(inputs, self._on_host, strict=True)
        ]

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        return copied(tensor.detach(), self.device.name)

    def home(self, outputs: list[Any]) -> list[Any]:
        """Return the outputs, copied to the host if the load request asks for that."""
        return each_once(outputs, torch.Tensor.cpu) if self.copies_home else outputs

    @contextmanager
    def run(self, work: Work) -> Iterator[None]:
        """Run the block's work on the slot's stream.

        At the end of the block the device has completed the work, even after a failure.
        """
        with self.device.turn(), torch.no_grad():
            self.begin(work)
            try:
                with self.stream.current():
                    yield
            except BaseException:
                try:
                    self._fence(work)
                except RuntimeError:
                    log.debug("the device failed after its run", device=self.device.name)
                raise
            self._fence(work)

    def _fence(self, work: Work) -> None:
        try:
            self.stream.fence()
        except RuntimeError:
            if not self.device.is_lost():
                self.device.abandon([list(inputs) for inputs in _arrivals(work)])
            raise


def _tensors(leaves: Iterable[object]) -> list[TensorSpec]:
    return [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]


def copied(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return a copy of a tensor on a device, with the same strides."""
    there = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    write(there, tensor)
    return there


def write(to: torch.Tensor, given: torch.Tensor) -> None:
    """Copy the elements of `given` to the tensor `to`.

    Along a dimension of stride 0, all elements of `to` share one memory location. Torch refuses to
    write to one location several times, so only the first element is copied.
    """
    for dim, step in enumerate(to.stride()):
        if step == 0 and to.size(dim) > 1:
            to, given = to.narrow(dim, 0, 1), given.narrow(dim, 0, 1)
    to.copy_(given)


def _arrivals(work: Work) -> Sequence[Sequence[Any]]:
    return work.batch.members if work.batch is not None else (work.inputs,)
