"""`NativeExecutor`: the executor's contract on native lanes.

A container that has no C function to call (torch's own runner) runs on a Python thread that stands in for its lane.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from torch._C._aoti import alloc_tensors_by_stealing_from_void_ptrs as steal_all
from torch._C._aoti import unsafe_alloc_void_ptrs_from_tensors as handles_of

from aoti_sched.backends.at_exit import close_at_exit
from aoti_sched.backends.base import Completion, CRun, Work
from aoti_sched.backends.c_abi import explain_failure, libtorch
from aoti_sched.backends.native import _native
from aoti_sched.backends.threads import DRAIN_LIMIT, ThreadsExecutor
from aoti_sched.errors import RunError, UnsupportedLoopError


class NativeExecutor:
    """Lanes as native threads.

    Args:
        name: The device's name; lane threads are named `aoti:<name>:<lane>`.
        lanes: How many.
        cores: Cores the process may use; lanes spin for work only while some are left.
        set_threads: For the stand-in threads, as in `ThreadsExecutor`.
    """

    kind = "native"

    def __init__(self, name: str, lanes: int, cores: int, set_threads: Callable[[int], None]) -> None:
        self.lanes = lanes
        self._name = name
        self._set_threads = set_threads
        self._native = _native.Lanes(
            [f"aoti:{name}:{lane}" for lane in range(lanes)],
            [],
            cores,
            delete_tensor=_address("aoti_torch_delete_tensor_object"),
            root_cause=_address("torch_exception_get_what_without_backtrace"),
            init_threads=_address("_ZN2at15get_num_threadsEv"),
            set_omp_threads=_address("omp_set_num_threads"),
            set_mkl_threads=_address("MKL_Set_Num_Threads_Local"),
        )
        self._models: dict[tuple[int, int, int], _native.Model] = {}
        self._works: dict[int, tuple[Work, CRun]] = {}
        self._count = 0
        self._stand_in: ThreadsExecutor | None = None
        close_at_exit(self)

    def submit(self, lane: int, work: Work) -> None:
        run = work.container.c_run
        if run is None:
            if self._stand_in is None:
                self._stand_in = ThreadsExecutor(
                    self._name, self.lanes, self._set_threads, ring=self._native.ring
                )
            self._stand_in.submit(lane, work)
            return
        self._count = token = self._count + 1
        model = self._model(run, work.threads)
        capsules = handles_of(list(work.inputs))
        try:
            self._native.submit(lane, token, model, capsules)
        except BaseException as error:
            steal_all(capsules)  # nothing was taken: the handles are ours to free
            if isinstance(error, RuntimeError):
                raise UnsupportedLoopError(f"device {self._name}: {error}") from error
            raise
        self._works[token] = work, run

    def drain(self) -> list[Completion]:
        taken = self._native.drain(DRAIN_LIMIT)
        completions = [self._completion(*one) for one in taken]
        if self._stand_in is not None:
            completions += self._stand_in.drain()
        return completions

    def fileno(self) -> int:
        return self._native.fileno()

    def close(self) -> None:
        self._native.close()
        if self._stand_in is not None:
            self._stand_in.close()

    def _completion(
        self,
        token: int,
        capsules: list[Any] | None,
        failure: tuple[str, str] | None,
        started: float,
        finished: float,
    ) -> Completion:
        work, run = self._works.pop(token)
        if capsules is None:
            own, cause = failure or ("", "")
            error = RunError(f"{run.name}: the run failed: {explain_failure(own, cause)}")
            return Completion(work.token, None, error, started, finished)
        outputs = steal_all(capsules) if None not in capsules else [c and steal_all([c])[0] for c in capsules]
        try:
            outputs = work.container.own(outputs)
        except Exception as error:  # noqa: BLE001 -- it is the request's; the others drained with it go on
            return Completion(work.token, None, error, started, finished)
        return Completion(work.token, outputs, None, started, finished)

    def _model(self, run: CRun, threads: int) -> _native.Model:
        key = run.run, run.container, threads  # another model may come to lie where a closed one lay
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = _native.Model(
                run=run.run,
                container=run.container,
                num_inputs=run.num_inputs,
                num_outputs=run.num_outputs,
                last_error=run.last_error,
                threads=threads,
            )
        return model


def _address(name: str) -> int:
    """The address of one of torch's functions; 0 where this torch has none of that name."""
    function = getattr(libtorch, name, None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0
