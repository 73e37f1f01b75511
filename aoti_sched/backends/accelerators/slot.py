"""Slots: a container's streams, and what is done on a stream before and after a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from aoti_sched.backends.aoti.handles import each_once
from aoti_sched.backends.contracts import LoadRequest, Work
from aoti_sched.events import log

if TYPE_CHECKING:
    from aoti_sched.backends.accelerators.streams import Stream, StreamDevice
    from aoti_sched.backends.native import _native


class Arrived(list[Any]):
    """A request's inputs, and what was current when the request came.

    Attributes:
        event: Recorded after everything that the inputs depend on.
        consumer: The stream that will use the outputs.
    """

    __slots__ = ("consumer", "event")

    def __init__(self, inputs: Sequence[Any], event: Any, consumer: Any) -> None:
        super().__init__(inputs)
        self.event = event
        self.consumer = consumer


class Slot:
    """One of a container's slots: a stream of its own, and what is done around a run on it.

    Args:
        device: The container's.
        stream: No other slot uses it.
        on_host: For each input, whether the model takes it from the host.
        request: Says whether inputs and outputs are copied.
    """

    def __init__(
        self, device: StreamDevice, stream: Stream, on_host: Sequence[bool], request: LoadRequest
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
        """Let the slot's stream wait for everything that a work's inputs depend on. Does not block.

        Raises:
            DeviceLostError: Nothing runs on the device any more.
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
        """Record outputs on their caller's stream, which uses them from now on.

        The outputs of a batch are those of each member.
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
        """Return the inputs where the model wants them. Called inside `stream.current()`."""
        if not self._copies:
            return list(inputs)
        return [
            self._bring(tensor) if tensor.is_cpu and not here else tensor
            for tensor, here in zip(inputs, self._on_host, strict=True)
        ]

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        return copied(tensor.detach(), self.device.name)

    def home(self, outputs: list[Any]) -> list[Any]:
        """Return the outputs where the caller wants them."""
        return each_once(outputs, torch.Tensor.cpu) if self.copies_home else outputs

    @contextmanager
    def run(self, work: Work) -> Iterator[None]:
        """Run Python code on the stream in the block.

        When the block ends, the device is done, even after a failure.
        """
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


def copied(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return a copy on a device with the same strides, whatever these are."""
    there = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    write(there, tensor)
    return there


def write(to: torch.Tensor, given: torch.Tensor) -> None:
    """Copy the elements of `given` to a tensor.

    Along a dimension of stride 0, several elements of `to` are one in memory; the first is copied.
    Torch refuses to write to one element several times.
    """
    for dim, step in enumerate(to.stride()):
        if step == 0 and to.size(dim) > 1:
            to, given = to.narrow(dim, 0, 1), given.narrow(dim, 0, 1)
    to.copy_(given)


def _arrivals(work: Work) -> Sequence[Sequence[Any]]:
    return work.batch.members if work.batch is not None else (work.inputs,)
