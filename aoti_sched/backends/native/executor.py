"""`NativeExecutor`: the executor's contract on native lanes.

A container without a C function (torch's own runner) runs on a Python thread instead of a native
lane.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch._C._aoti import (
    alloc_tensors_by_stealing_from_void_ptrs,
    unsafe_alloc_void_ptrs_from_tensors,
)

from aoti_sched.at_exit import close_at_exit
from aoti_sched.backends.aoti.c_abi import explain_failure, libtorch
from aoti_sched.backends.aoti.handles import DTYPES
from aoti_sched.backends.aoti.handles import address_of as _address
from aoti_sched.backends.contracts import Completion, CRun, Work
from aoti_sched.backends.executors.batches import Batch, gather, split
from aoti_sched.backends.executors.inline import refused, run_here, without_frames
from aoti_sched.backends.executors.threads import DRAIN_LIMIT, ThreadsExecutor
from aoti_sched.backends.native import _native
from aoti_sched.errors import AotiSchedError, ResourcesError, RunError, UnsupportedLoopError
from aoti_sched.model.batch_plan import BatchPlan

WRAP = "_Z16THPVariable_WrapRKN2at10TensorBaseE"
"""`THPVariable_Wrap(const at::TensorBase&)`: torch's function that wraps a C++ tensor."""

SHIM = (
    "get_data_ptr",
    "get_dim",
    "get_sizes",
    "get_strides",
    "get_dtype",
    "dtype_element_size",
    "empty_strided",
    "_reinterpret_tensor",
    "clone",
    "delete_tensor_object",
)
"""The functions of torch's `shim.h` for batches. Each name begins with `aoti_torch_`."""


WAKE_UP = 60e-6
"""Seconds that a sleep and a wake-up cost, about. A longer poll would cost more than sleeping."""

MOST_VAIN = 1023
"""The most submits in a row for which polling is skipped, while polling finds no completion.

Polling finds none where lanes sleep or other processes have their cores.
"""


_OnStream: TypeAlias = (
    "tuple[_native.Stream | None, _native.Graph | None, _native.Arrival | None, "
    "list[int | None] | None]"
)
"""A run's stream, its graph, what it comes after, and the streams that use its outputs.

A plain tuple is the cheapest.
"""

_NO_STREAM: _OnStream = (None, None, None, None)
"""What a run on the CPU has."""


class NativeExecutor:
    """Lanes as native threads.

    Args:
        name: The device's name; lane threads are named `aoti:<name>:<lane>`.
        lanes: The number of lanes.
        cores: Cores that the process may use. Lanes spin for work only while a core is free.
        set_threads: As in `ThreadsExecutor`, for the Python threads.
        affinity: A core for each lane; None leaves the choice to the system.
        launchers: The number of threads for all lanes; None for one thread per lane. Only lanes of
            accelerators can share threads.
        most: The most lanes that `grow` opens; None for `lanes`.
    """

    kind = "native"

    def __init__(
        self,
        name: str,
        lanes: int,
        cores: int,
        set_threads: Callable[[int], None],
        affinity: Sequence[int] | None = None,
        *,
        launchers: int | None = None,
        most: int | None = None,
    ) -> None:
        self.lanes = lanes
        self._most = max(lanes, most or 0)
        self._name = name
        self._set_threads = set_threads
        self._affinity = affinity
        try:
            self._native = self._open(lanes, cores, affinity, launchers)
        except (RuntimeError, MemoryError) as error:
            raise ResourcesError(
                f"device {name!r}: its {lanes} lanes can't be opened: {error}. Nothing has "
                "changed. End threads, close files, or raise the limit."
            ) from error
        # The lanes refer to no Python object, so works and members of batches are kept here.
        self._works: dict[int, Work] = {}
        self._members: dict[int, object] = {}
        self._shim = shim_of_torch()
        self.lost: Callable[[], str] = str  # a device sets its own function
        self.workspace: Callable[[], int] = int  # likewise
        self._may_poll = cores > 1
        self._last_seconds = math.inf  # duration of the last run that was drained
        self._polls_to_skip = 0  # grows while polling finds no completion
        self._polls_skipped = 0
        self._count = 0
        self._stand_in: ThreadsExecutor | None = None
        # The works under way on each lane of a device, by thread. The slot of a lane that has work
        # on both threads would have two runs at once.
        self._natively: dict[int, int] = {}  # the lanes, by the numbers of their works
        self._standing_in: dict[int, Work] = {}  # by lane
        close_at_exit(self)

    def _open(
        self, lanes: int, cores: int, affinity: Sequence[int] | None, launchers: int | None
    ) -> _native.Lanes:
        return _native.Lanes(
            [f"aoti:{self._name}:{lane}" for lane in range(self._most)],
            affinity or (),
            cores,
            _tensors(),
            delete_tensor=_address("aoti_torch_delete_tensor_object"),
            root_cause=_address("torch_exception_get_what_without_backtrace"),
            get_threads=_address("_ZN2at15get_num_threadsEv"),
            set_omp_threads=_address("omp_set_num_threads"),
            set_mkl_threads=_address("MKL_Set_Num_Threads_Local"),
            new_handle=_address("aoti_torch_new_tensor_handle"),
            threads=launchers or 0,
            open=lanes,
        )

    def grow(self, lanes: int) -> None:
        if lanes > self._most:
            raise ValueError(f"device {self._name!r}: {lanes} lanes are more than {self._most}")
        try:
            self._native.grow(lanes)
        except (RuntimeError, MemoryError) as error:
            raise ResourcesError(
                f"device {self._name!r}: its {lanes} lanes can't be opened: {error}. The "
                f"{self.lanes} that are open go on. End threads, or raise the limit."
            ) from error
        self.lanes = self._native.count()

    def submit(self, lane: int, work: Work) -> bool:
        run = work.container.c_run
        if run is None:
            return self._submit_to_python(lane, work)
        where = self._on_stream(work, run) if run.slots else _NO_STREAM
        if where is None:
            return self._submit_to_python(lane, work)
        on, graph, after, consumers = where
        if lane in self._standing_in:
            raise _busy(self._name, lane)
        self._count = token = self._count + 1
        self._works[token] = work
        batch = work.batch
        try:
            model = run.native or _prepare(run)
            if batch is None:
                self._native.submit(
                    lane, token, model, work.inputs, work.threads, on, graph, after, consumers
                )
            elif self._shim is None:
                # New memory, since the slot's running work may still read the slot's own memory.
                inputs = gather(run.name, batch)
                self._native.submit(lane, token, model, inputs, work.threads)
            else:
                self._members[token] = self._native.submit_batch(
                    lane,
                    token,
                    model,
                    _plan(self._shim, run, batch),
                    batch.members,
                    batch.rows,
                    batch.padded_rows,
                    batch.slot,
                    work.threads,
                    on,
                    graph,
                    consumers,
                )
        except Exception as error:  # noqa: BLE001 -- raised again as an error of this package
            del self._works[token]
            raise self._plain(error) from None
        if on is not None:
            self._natively[token] = lane
        # With several works, completions come in bursts. One wake-up for a burst is cheaper than a
        # poll for each completion.
        if not self._may_poll or len(self._works) != 1 or self._last_seconds > WAKE_UP:
            return False
        self._polls_skipped += 1
        return self._polls_skipped > self._polls_to_skip

    def run_here(self, work: Work) -> Completion:
        run, batch = work.container.c_run, work.batch
        if run is None:
            return run_here(work)
        try:
            where = self._on_stream(work, run) if run.slots else _NO_STREAM
            if where is None:
                return run_here(work)
            on, graph, after, consumers = where
            if batch is None:
                model = run.native or _prepare(run)
                taken = self._native.run_here(
                    model, work.inputs, work.threads, on, graph, after, consumers
                )
            elif self._shim is None:
                return run_here(work)
            else:
                taken = self._native.run_batch_here(
                    run.native or _prepare(run),
                    _plan(self._shim, run, batch),
                    batch.members,
                    batch.rows,
                    batch.padded_rows,
                    batch.slot,
                    work.threads,
                    on,
                    graph,
                    consumers,
                )
        except Exception as error:  # noqa: BLE001 -- it is the request's
            return refused(work, self._plain(error))
        return self._completion(work, taken)

    def _on_stream(self, work: Work, run: CRun) -> _OnStream | None:
        """Return how native code runs the work on its slot's stream; None if Python runs it.

        Raises:
            DeviceLostError: The slot's device is lost.
        """
        if not self._can_gather(work):
            return None
        graph = None
        if run.graph_of is not None and (graph := run.graph_of(work)) is None:
            return None
        slot = run.slots[work.slot]
        return slot.native, graph, slot.begin_natively(work), slot.consumers(work)

    def poll(self) -> bool:
        if len(self._works) != 1:
            return False
        began = time.monotonic()
        there = self._native.poll(WAKE_UP)
        # A completion is found late when another process had this thread's core, or the lane's.
        in_time = there and time.monotonic() - began < WAKE_UP
        self._polls_skipped = 0
        self._polls_to_skip = 0 if in_time else min(2 * self._polls_to_skip + 1, MOST_VAIN)
        return there

    def drain(self) -> list[Completion]:
        completions = [self._drained(taken) for taken in self._native.drain(DRAIN_LIMIT)]
        if self._stand_in is not None:
            ended = self._stand_in.drain()
            tokens = {id(completion.token) for completion in ended}
            self._standing_in = {
                lane: work
                for lane, work in self._standing_in.items()
                if id(work.token) not in tokens
            }
            completions += ended
        return completions

    def fileno(self) -> int:
        return self._native.fileno()

    def close(self) -> None:
        if self._stand_in is not None:  # first, since its threads use the lanes' descriptor
            self._stand_in.close()
        self._native.hang_up()

    def _drained(self, taken: _native.Taken) -> Completion:
        work = self._works.pop(taken[0])
        self._natively.pop(taken[0], None)
        self._last_seconds = taken[3] - taken[2]
        if work.batch is not None:
            self._members.pop(taken[0], None)
        return self._completion(work, taken)

    def _completion(self, work: Work, taken: _native.Taken) -> Completion:
        _, result, started, finished = taken
        run: Any = work.container.c_run
        if isinstance(result, tuple):
            error: BaseException = RunError(
                f"{run.name}: the run failed: {explain_failure(*result)}"
            )
            if run.slots:
                error = run.slots[work.slot].device.classify(error)
            return Completion(work.token, None, error, started, finished)
        try:
            outputs = (
                work.container.detach_outputs([*result] if run.slots else result)
                if work.batch is None
                else self._member_outputs(work, work.batch, result)
            )
            if run.slots:
                slot = run.slots[work.slot]
                if not (slot.records_uses and _are_kept(work, result, outputs)):
                    slot.hand_over(work, outputs)
        except Exception as caught:  # noqa: BLE001 -- this request's error; the other completions go on
            return Completion(work.token, None, without_frames(caught), started, finished)
        return Completion(work.token, outputs, None, started, finished)

    def _member_outputs(self, work: Work, batch: Batch, result: list[Any]) -> list[Any]:
        """Return the outputs of each member of a batch, without memory shared with the weights."""
        container = work.container
        run: Any = container.c_run
        if self._shim is None:
            return split(run.name, batch, container.detach_outputs(result))
        whole: list[Any] = result[0]
        members: list[Any] = result[1]
        if not batch.plan.detach_rows:
            own = container.detach_outputs(list(whole))
            if any(one is not other for one, other in zip(own, whole, strict=True)):
                return split(run.name, batch, own)
        return members

    def _can_gather(self, work: Work) -> bool:
        """Return whether a device's lane can gather the work's batch.

        Lanes gather batches in the host's memory, so each member must be there.
        """
        batch = work.batch
        if batch is None:
            return True
        if self._shim is None or batch.plan.detach_rows:
            return False
        return all(tensor.is_cpu for member in batch.members for tensor in member)

    def _submit_to_python(self, lane: int, work: Work) -> bool:
        """Submit a work that native code can't run to a lane whose thread is Python's."""
        if lane in self._natively.values():
            raise _busy(self._name, lane)
        self._standing_in[lane] = work
        return self._stand_in_lanes().submit(lane, work)

    def _stand_in_lanes(self) -> ThreadsExecutor:
        if self._stand_in is None:
            self._stand_in = ThreadsExecutor(
                self._name, self.lanes, self._set_threads, self._affinity, wake=self._native.wake
            )
        if self._stand_in.lanes < self.lanes:
            self._stand_in.grow(self.lanes)
        return self._stand_in

    def _plain(self, error: Exception) -> Exception:
        """Return an error of the native code as an error of this package."""
        if isinstance(error, _native.ForkedError):
            return UnsupportedLoopError(f"device {self._name}: {error}")
        if isinstance(error, MemoryError):
            return ResourcesError(
                f"device {self._name}: no memory is left for the run. Free some and try again."
            )
        if isinstance(error, RuntimeError) and not isinstance(error, AotiSchedError):
            return RuntimeError(f"device {self._name}: {error}")
        return error


def _are_kept(work: Work, result: list[Any], outputs: list[Any]) -> bool:
    """Return whether all outputs are those that the lane has returned, and none is a copy."""
    if work.batch is not None:
        return outputs is result[1]
    return all(one is other for one, other in zip(result, outputs, strict=True))


def _busy(name: str, lane: int) -> RuntimeError:
    return RuntimeError(
        f"device {name}: lane {lane} has a work under way on its other thread; nothing was "
        "submitted"
    )


def _prepare(run: CRun) -> _native.Model:
    """Return the native record of a model, and keep the record in the container's `CRun`."""
    run.native = model = _native.Model(
        run=run.run,
        container=run.container,
        num_inputs=run.num_inputs,
        num_outputs=run.num_outputs,
        last_error=run.last_error,
        proxy_executor=run.proxy_executor,
    )
    return model


class _Prepared(NamedTuple):
    """A plan with its native record. The padding of ragged inputs depends on their dtypes."""

    plan: BatchPlan
    ragged: tuple[int, ...]
    dtypes: list[torch.dtype]
    native: _native.Plan


def _plan(shim: _native.Shim, run: CRun, batch: Batch) -> _native.Plan:
    """Return the native record of a batch's plan. The last plan is kept with the model."""
    known: _Prepared | None = run.native_plan
    if (
        known is None
        or known.plan is not batch.plan
        or (known.ragged and known.dtypes != _dtypes(known.ragged, batch))
    ):
        plan = batch.plan
        ragged = tuple(index for index, one in enumerate(plan.inputs) if one.ragged)
        dtypes = _dtypes(ragged, batch)
        pads = {
            index: _pad(plan.inputs[index].pad, dtype)
            for index, dtype in zip(ragged, dtypes, strict=False)
        }
        native = _native.Plan(
            shim,
            [
                (one.dim, one.order, one.ragged, pads.get(index, {}))
                for index, one in enumerate(plan.inputs)
            ],
            [
                (one.dim, [(cut.dim, cut.input, cut.input_dim) for cut in one.ragged])
                for one in plan.outputs
            ],
            plan.detach_rows,
        )
        run.native_plan = known = _Prepared(plan, ragged, dtypes, native)
    return known.native


def _dtypes(inputs: Sequence[int], batch: Batch) -> list[torch.dtype]:
    return [batch.members[0][index].dtype for index in inputs] if batch.members else []


def _pad(value: float, dtype: torch.dtype) -> dict[int, bytes]:
    """Return the bytes of an element of this value, by the number of its dtype.

    The result is empty where the dtype has no such value.
    """
    try:
        element = torch.empty(1, dtype=dtype).fill_(value)
    except RuntimeError:
        return {}
    return {
        code: bytes(element.view(torch.uint8).tolist())
        for code, known in DTYPES.items()
        if known == dtype
    }


def shim_of_torch() -> _native.Shim | None:
    """Return torch's functions for batches; None where this torch lacks one."""
    addresses = {name: _address(f"aoti_torch_{name}") for name in SHIM}
    if not all(addresses.values()):
        return None
    addresses["reinterpret_tensor"] = addresses.pop("_reinterpret_tensor")
    addresses["delete_tensor"] = addresses.pop("delete_tensor_object")
    return _native.Shim(**addresses, cpu=libtorch.aoti_torch_device_type_cpu())


def _tensors() -> _native.Tensors:
    """Return the conversion of tensors to handles and back, the direct one where torch has it."""
    new_handle, wrap = _address("aoti_torch_new_tensor_handle"), _address(WRAP)
    return _native.Tensors(
        torch.Tensor,
        unsafe_alloc_void_ptrs_from_tensors,
        alloc_tensors_by_stealing_from_void_ptrs,
        new_handle=new_handle if wrap else 0,
        wrap=wrap if new_handle else 0,
    )
