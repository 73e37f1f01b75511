"""CUDA graphs: runs that are recorded once per slot and input sizes, then launched as one graph.

A graph reads and writes the memory that the run was recorded with.

- A graph has inputs and outputs of its own. A request's tensors are copied to and from them, on the
  slot's stream.
- Intermediate results lie in a memory pool of the slot. Graphs of one slot never run at once, so
  they share the pool (`cuda_capture.py`).
- A graph reads the weights of one of the container's two buffers, so each buffer has its own
  graphs. A swap keeps the graphs of both buffers. The graphs of a buffer are dropped when the
  buffer's memory is freed.

The first run with new sizes launches one kernel after the other, and is recorded afterwards. The
runtime's `Run` can't be recorded, since `Run` records events and takes locks. `RunSingleThreaded`
can be recorded, but always takes the first free instance, and `Run` leaves no instance free
(`pending_models_` in model_container.h). So a container has one instance here, which only
`RunSingleThreaded` takes, one launch at a time. Slots still run concurrently on the device, because
an instance holds only loaded kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from aoti_sched.backends.accelerators.cuda_capture import Executable, Recorder
from aoti_sched.backends.accelerators.slot import Slot, write
from aoti_sched.backends.accelerators.stream_container import StreamContainer
from aoti_sched.backends.aoti.constant_map import UPDATE_PAIRS
from aoti_sched.backends.aoti.container import CAbiContainer
from aoti_sched.backends.aoti.handles import each_once, handles_of
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.backends.contracts import LoadRequest, StagedSet, Work
from aoti_sched.backends.executors.batches import whole_shapes
from aoti_sched.backends.reading import Abandoned, Reading
from aoti_sched.errors import ConfigError
from aoti_sched.events import log
from aoti_sched.model.specs import ModelSpec
from aoti_sched.package import Extracted

if TYPE_CHECKING:
    from aoti_sched.backends.accelerators.cuda import CudaDevice
    from aoti_sched.backends.native import _native

MOST_GRAPHS = 32
"""The most graphs of a slot for each buffer; each graph is for other input sizes.

Runs with further sizes launch one kernel after the other.
"""

ATTEMPTS = 3
"""The most recordings for the same sizes.

Another thread that waits for the whole device, or memory that is short, fails a recording as the
model's own code does.
"""

RUNS_BETWEEN = 100
"""Runs of the same sizes between two attempts."""

Shapes: TypeAlias = tuple[Sequence[int], ...]


class Unrecorded:
    """Sizes of which no run could be recorded yet.

    Attributes:
        attempts: How many recordings have failed.
    """

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self._runs_left = RUNS_BETWEEN

    def is_due(self) -> bool:
        """Count one run, and return whether the run is to be recorded."""
        if self.attempts >= ATTEMPTS:
            return False
        self._runs_left -= 1
        return self._runs_left <= 0


class Graph:
    """One recorded run.

    Args:
        device: The device on which the run was recorded.
        executable: The graph as the driver launches it.
        inputs: The tensors that the graph reads.
        outputs: The tensors that the graph writes; None where the model left an output out.
    """

    def __init__(
        self,
        device: CudaDevice,
        executable: Executable,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor | None],
    ) -> None:
        self._device = device
        self._executable = executable
        self._inputs = inputs
        self._outputs = outputs
        self.native: _native.Graph | None = None
        """The graph for native lanes; None where native lanes can't launch it."""
        if device.native is not None:
            from aoti_sched.backends.native import _native

            there = {id(tensor): tensor for tensor in outputs if tensor is not None}
            handles = dict(zip(there, handles_of([*there.values()]), strict=True))
            self.native = _native.Graph(
                device.native,
                executable=executable.handle,
                inputs=handles_of(inputs),
                outputs=[0 if tensor is None else handles[id(tensor)] for tensor in outputs],
            )

    def launch(self, slot: Slot, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Launch the graph on the slot's stream, which is the current one.

        The caller owns the outputs.
        """
        for own, given in zip(self._inputs, inputs, strict=True):
            write(own, given)
        self._device.launch_graph(self._executable.handle, slot.stream.handle)
        home = each_once(
            self._outputs,
            lambda tensor: tensor if slot.copies_home and not tensor.is_cpu else tensor.clone(),
        )
        return slot.home(home)

    def close(self) -> None:
        """Release the graph's memory. The graph must not be running."""
        self.native = None
        self._inputs, self._outputs = [], []
        self._executable.close()


class GraphContainer(StreamContainer):
    """A container on a CUDA device whose runs are recorded."""

    def __init__(
        self,
        device: CudaDevice,
        raw: RawContainer,
        request: LoadRequest,
        extracted: Extracted,
        on_host: Sequence[int],
        spec: ModelSpec | None = None,
    ) -> None:
        why = _why_not(raw, on_host)
        if why:
            raise ConfigError(
                f"load({str(request.path)!r}): cuda_graphs=True, but {why}. Leave cuda_graphs out."
            )
        self._cuda = device
        self._launching = threading.Lock()
        """Taken while the instance is in use."""
        # First for the active buffer, then for the inactive one: each slot's graphs by the sizes of
        # their inputs.
        self._graphs: list[list[dict[Shapes, Graph | Unrecorded]]] = [
            [{} for _ in range(request.instances)] for _ in range(2)
        ]
        self._recorders: list[Recorder | None] = [None] * request.instances
        super().__init__(device, raw, request, extracted, on_host, spec)

    @staticmethod
    def instances_for(request: LoadRequest) -> int:
        """Return 1: all slots share one instance."""
        del request
        return 1

    @property
    def graphs(self) -> int:
        return sum(
            isinstance(graph, Graph)
            for slots in self._graphs
            for known in slots
            for graph in known.values()
        )

    def _know_c_run(self) -> None:
        super()._know_c_run()
        self._c_run.graph_of = self._graph_of

    def _graph_of(self, work: Work) -> _native.Graph | None:
        """Return the graph for a work; None without one, so that Python launches the run."""
        batch = work.batch
        shapes = tuple([t.shape for t in work.inputs]) if batch is None else whole_shapes(batch)
        graph = self._graphs[0][work.slot].get(shapes)
        return graph.native if isinstance(graph, Graph) else None

    def _once(self, slot: Slot, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        number = self._slots.index(slot)
        known = self._graphs[0][number]
        shapes = tuple([tensor.shape for tensor in inputs])
        graph = known.get(shapes)
        if isinstance(graph, Graph):
            return graph.launch(slot, inputs)
        there = slot.brought(inputs)
        outputs = self._launch(there, slot.stream.handle)
        if graph is None and len(known) < MOST_GRAPHS:
            known[shapes] = self._recorded(number, there, 1)
            if len(known) == MOST_GRAPHS:
                log.warning(
                    "no more graphs are recorded", runner=self._name, slot=number, most=MOST_GRAPHS
                )
        elif graph is not None and graph.is_due():
            known[shapes] = self._recorded(number, there, graph.attempts + 1)
        return slot.home(CAbiContainer.detach_outputs(self, outputs))

    def _launch(self, inputs: Sequence[torch.Tensor], stream: int) -> list[torch.Tensor | None]:
        with self._launching:
            return self._raw.run_single_threaded(inputs, stream=stream)

    def _recorded(
        self, number: int, like: Sequence[torch.Tensor], attempt: int
    ) -> Graph | Unrecorded:
        """Return a graph of a run on inputs like these, if the run can be recorded.

        Args:
            number: The slot's number.
            like: Inputs that have been run before.
            attempt: How often these sizes have been tried, with this time.
        """
        if not all(tensor.numel() for tensor in like):
            return Unrecorded(ATTEMPTS)
        try:
            return self._record(number, like)
        except RuntimeError as error:
            log.warning(
                "run not recorded",
                runner=self._name,
                sizes=[list(t.shape) for t in like],
                error=str(error),
                attempt=attempt,
                most=ATTEMPTS,
            )
            self._cuda.forget_error()
        return Unrecorded(attempt)

    def _record(self, number: int, like: Sequence[torch.Tensor]) -> Graph:
        """Record a run on inputs like these. Recording executes nothing.

        Raises:
            RuntimeError: The model does something that can't be recorded, or the recording was
                disturbed.
        """
        # Keep the strides, which are compiled into the model's code.
        inputs = [
            torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=self._cuda.name)
            for t in like
        ]
        recorder = self._recorders[number]
        if recorder is None:
            recorder = self._recorders[number] = Recorder(self._cuda)
        try:
            executable, outputs = recorder.record(
                lambda: self._launch(inputs, recorder.stream.handle)
            )
        except BaseException:
            self._drop_spent_recorders()
            raise
        return Graph(self._cuda, executable, inputs, outputs)

    def warm_up(self, make_inputs: Callable[[], Sequence[torch.Tensor]]) -> None:
        """Let each slot record a run, then run the recorded graph."""
        for slot in [*range(self._instances)] * 2:
            self.run_work(Work(self, self.capture_stream(make_inputs()), 1, None, slot=slot))

    def close(self) -> None:
        if self._slots:
            self._forget()
        super().close()

    @property
    def updatable(self) -> str:
        why = super().updatable
        if not why and not self._raw.library.has(UPDATE_PAIRS):
            # `run_single_threaded` looks at the state of the first buffer, whichever serves.
            return (
                "a torch before 2.13 compiled it, whose code runs no new sizes while the second of "
                "its buffers serves and runs are recorded (pytorch/pytorch#184781); load it "
                "without cuda_graphs, or compile it again with torch 2.13 or newer"
            )
        return why

    # --- live weights: a graph is kept as long as the memory of the weights that it reads

    def stage(
        self,
        weights: object,
        *,
        partial: bool = False,
        strict: bool = True,
        check_finite: bool = False,
        reading: Reading | None = None,
    ) -> StagedSet:
        before = self._raw.constant_memory(inactive=True)
        try:
            written = super().stage(
                weights, partial=partial, strict=strict, check_finite=check_finite, reading=reading
            )
        except Abandoned:  # Nothing was written, and the container may be closed by now.
            raise
        except BaseException:
            self._see_inactive(before)
            raise
        self._see_inactive(before)
        return written

    def _see_inactive(self, before: Sequence[tuple[int, int]]) -> None:
        """Drop the inactive buffer's graphs unless the buffer still has the memory of `before`."""
        # Constants on the host were read when the graph was recorded, so its graphs are stale.
        if not before or self._raw.on_host or before != self._raw.constant_memory(inactive=True):
            self._forget(active=False)

    def swap(self) -> None:
        super().swap()
        self._graphs.reverse()

    def free_inactive(self) -> None:
        self._forget(active=False)
        super().free_inactive()

    def rebuild(self) -> None:
        self._forget()
        super().rebuild()

    def park(self) -> None:
        self._forget()
        super().park()

    def _forget(self, *, active: bool = True) -> None:
        with self._cuda.at_work():
            for slots in self._graphs if active else self._graphs[1:]:
                for known in slots:
                    for graph in known.values():
                        if isinstance(graph, Graph):
                            graph.close()
                    known.clear()
            self._drop_spent_recorders()

    def _drop_spent_recorders(self) -> None:
        for number, recorder in enumerate(self._recorders):
            if recorder is not None and recorder.is_spent:
                self._recorders[number] = None
                recorder.close()

    def _new_raw(self) -> RawContainer:
        return self._device.open_raw(self._raw.library, 1, self._raw.name)


def _why_not(raw: RawContainer, on_host: Sequence[int]) -> str:
    """Return why a model's runs can't be recorded; "" when they can."""
    if on_host:
        name = raw.input_names[on_host[0]]
        return (
            f"its input {name!r} lies in the host's memory, and a graph would keep the value that "
            "was recorded"
        )
    if any(constant.spec.folded for constant in raw.constants):
        return "the model computes constants from others, which needs a free instance"
    return ""
