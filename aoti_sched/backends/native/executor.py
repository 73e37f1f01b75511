"""`NativeExecutor`: the executor's contract on native lanes.

A container that has no C function to call (torch's own runner) runs on a Python thread that stands in for its lane.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._aoti import alloc_tensors_by_stealing_from_void_ptrs, unsafe_alloc_void_ptrs_from_tensors

from aoti_sched.backends.at_exit import close_at_exit
from aoti_sched.backends.base import Completion, CRun, Work
from aoti_sched.backends.c_abi import explain_failure, libtorch
from aoti_sched.backends.native import _native
from aoti_sched.backends.run_here import refused, run_here, without_frames
from aoti_sched.backends.threads import DRAIN_LIMIT, ThreadsExecutor
from aoti_sched.errors import RunError, UnsupportedLoopError

WRAP = "_Z16THPVariable_WrapRKN2at10TensorBaseE"
"""`THPVariable_Wrap(const at::TensorBase&)`, by which torch's C++ makes a tensor one of Python's."""


class NativeExecutor:
    """Lanes as native threads.

    Args:
        name: The device's name; lane threads are named `aoti:<name>:<lane>`.
        lanes: How many.
        cores: Cores the process may use; lanes spin for work only while some are left.
        set_threads: For the stand-in threads, as in `ThreadsExecutor`.
        affinity: A core for each lane; None leaves them to the system.
    """

    kind = "native"

    def __init__(
        self,
        name: str,
        lanes: int,
        cores: int,
        set_threads: Callable[[int], None],
        affinity: Sequence[int] | None = None,
    ) -> None:
        self.lanes = lanes
        self._name = name
        self._set_threads = set_threads
        self._affinity = affinity
        self._native = _native.Lanes(
            [f"aoti:{name}:{lane}" for lane in range(lanes)],
            affinity or (),
            cores,
            _tensors(),
            delete_tensor=_address("aoti_torch_delete_tensor_object"),
            root_cause=_address("torch_exception_get_what_without_backtrace"),
            get_threads=_address("_ZN2at15get_num_threadsEv"),
            set_omp_threads=_address("omp_set_num_threads"),
            set_mkl_threads=_address("MKL_Set_Num_Threads_Local"),
        )
        self._works: dict[int, Work] = {}  # the lanes hold no Python object: what they work on lives here
        self._count = 0
        self._stand_in: ThreadsExecutor | None = None
        close_at_exit(self)

    def submit(self, lane: int, work: Work) -> None:
        run = work.container.c_run
        if run is None:
            self._stand_in_lanes().submit(lane, work)
            return
        self._count = token = self._count + 1
        self._works[token] = work
        try:
            self._native.submit(lane, token, run.native or _prepare(run), work.inputs, work.threads)
        except Exception as error:  # noqa: BLE001 -- it is raised again, in our words
            del self._works[token]
            raise self._plain(error) from None

    def run_here(self, work: Work) -> Completion:
        run = work.container.c_run
        if run is None:
            return run_here(work)
        try:
            taken = self._native.run_here(run.native or _prepare(run), work.inputs, work.threads)
        except Exception as error:  # noqa: BLE001 -- it is the request's
            return refused(work, self._plain(error))
        return _completion(work, taken)

    def drain(self) -> list[Completion]:
        pop = self._works.pop
        completions = [_completion(pop(taken[0]), taken) for taken in self._native.drain(DRAIN_LIMIT)]
        if self._stand_in is not None:
            completions += self._stand_in.drain()
        return completions

    def fileno(self) -> int:
        return self._native.fileno()

    def close(self) -> None:
        self._native.close()
        if self._stand_in is not None:
            self._stand_in.close()

    def _stand_in_lanes(self) -> ThreadsExecutor:
        if self._stand_in is None:
            self._stand_in = ThreadsExecutor(
                self._name, self.lanes, self._set_threads, self._affinity, ring=self._native.ring
            )
        return self._stand_in

    def _plain(self, error: Exception) -> Exception:
        """What the lanes refused, in the words of this package."""
        if isinstance(error, _native.ForkedError):
            return UnsupportedLoopError(f"device {self._name}: {error}")
        if isinstance(error, RuntimeError):
            return RuntimeError(f"device {self._name}: {error}")
        return error


def _prepare(run: CRun) -> _native.Model:
    """The model as the lanes know it; kept in the container's `CRun`, so it lives as long as the container."""
    run.native = model = _native.Model(
        run=run.run,
        container=run.container,
        num_inputs=run.num_inputs,
        num_outputs=run.num_outputs,
        last_error=run.last_error,
    )
    return model


def _completion(work: Work, taken: _native.Taken) -> Completion:
    _, result, started, finished = taken
    if isinstance(result, tuple):
        run: Any = work.container.c_run
        error = RunError(f"{run.name}: the run failed: {explain_failure(*result)}")
        return Completion(work.token, None, error, started, finished)
    try:
        outputs = work.container.own(result)
    except Exception as caught:  # noqa: BLE001 -- it is the request's; the others drained with it go on
        return Completion(work.token, None, without_frames(caught), started, finished)
    return Completion(work.token, outputs, None, started, finished)


def _tensors() -> _native.Tensors:
    """How tensors become handles and come back: directly, where this torch has what it takes."""
    new_handle, wrap = _address("aoti_torch_new_tensor_handle"), _address(WRAP)
    return _native.Tensors(
        torch.Tensor,
        unsafe_alloc_void_ptrs_from_tensors,
        alloc_tensors_by_stealing_from_void_ptrs,
        new_handle=new_handle if wrap else 0,
        wrap=wrap if new_handle else 0,
    )


def _address(name: str) -> int:
    """The address of one of torch's functions; 0 where this torch has none of that name."""
    function = getattr(libtorch, name, None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0
