"""Inline runs: runs on the calling thread, and the cleaning of a run's error.

A run that is shorter than a hop to a lane is cheaper on its caller's thread. Such a run keeps the
GIL: to release the GIL around a call of 5 µs costs more than the call when other threads want it.
"""

from __future__ import annotations

import ctypes
import functools
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int32, c_size_t, c_void_p
from typing import Any

import torch

from aoti_sched.backends.aoti.c_abi import explain_failure, libtorch
from aoti_sched.backends.aoti.handles import free, handles_of, tensors_of
from aoti_sched.backends.contracts import Completion, CRun, Work
from aoti_sched.errors import AotiSchedError, InputMismatchError, RunError
from aoti_sched.foreign import out_of_resources, said

# The functions as `c_abi` describes them, but with the GIL kept. Made once for each address.
_run_at = functools.lru_cache(1024)(
    ctypes.PYFUNCTYPE(c_int32, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p)
)
_last_error_at = functools.lru_cache(1024)(ctypes.PYFUNCTYPE(c_int32, POINTER(c_char_p)))

_torchs_words = getattr(
    libtorch, "torch_exception_get_what_without_backtrace", None
)  # since torch 2.13
if _torchs_words is not None:
    _torchs_words.restype = c_char_p
_set_openmp = getattr(libtorch, "omp_set_num_threads", None)
# The function returns the previous count; 0 stands for the process's count.
_set_mkl = getattr(libtorch, "MKL_Set_Num_Threads_Local", None)


def run_here(work: Work) -> Completion:
    """Run a work on the calling thread, as `Executor.run_here` does, but in Python."""
    outputs: list[Any] | None = None
    error: BaseException | None = None
    started = time.monotonic()
    try:
        with intra_op_threads(work.threads):
            run = work.container.c_run
            if run is None or run.slots:
                outputs = run_raw(work)
            elif work.batch is None:
                outputs = _call_own(work, run, work.inputs)
            else:
                outputs = work.container.staging.run(
                    work.batch, functools.partial(_call_own, work, run)
                )
    except BaseException as caught:  # noqa: BLE001 -- it is the request's
        error = without_frames(caught)
    return Completion(work.token, outputs, error, started, time.monotonic())


def run_raw(work: Work) -> list[Any]:
    """Run a work of one request or of a batch by the container's own `run_work`."""
    return work.container.run_work(work)


def refused(work: Work, error: BaseException) -> Completion:
    """Return the completion of a work that was refused before it began."""
    now = time.monotonic()
    return Completion(work.token, None, without_frames(error), now, now)


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Set the calling thread's OpenMP and MKL thread counts for the block, then restore them."""
    # Torch sets a thread's count when first asked for it. Ask now, so that torch does not overwrite
    # the new count later.
    before = torch.get_num_threads()
    set_threads = torch.set_num_threads if _set_openmp is None else _set_openmp
    set_threads(count)
    mkl_before = None if _set_mkl is None else _set_mkl(count)
    try:
        yield
    finally:
        set_threads(before)
        if _set_mkl is not None:
            _set_mkl(mkl_before)


class Origin(Exception):  # noqa: N818 -- never raised or caught
    """The traceback of an error as text, shown above the error as its cause."""


def without_frames(error: BaseException) -> BaseException:
    """Return the error of a run without frames, whose local variables would keep the run's tensors.

    The errors of this package need no traceback. Another error keeps its traceback as text, in an
    `Origin`. An error that can't be changed is replaced by a RunError that names its type.
    """
    try:
        return _without_frames(out_of_resources(error, "the run") or error)
    except BaseException as fault:  # noqa: BLE001 -- a foreign error's own methods may raise anything
        return RunError(
            f"the run raised {type(error).__name__}, which can't be passed on: {said(fault)}"
        )


def _without_frames(error: BaseException) -> BaseException:
    if not isinstance(error, AotiSchedError):
        error.__cause__ = Origin("\n" + "".join(traceback.format_exception(error)))
        error.__context__ = None
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _call_own(work: Work, run: CRun, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    return work.container.detach_outputs(_call(run, list(tensors)))


def _call(run: CRun, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
    if len(tensors) != run.num_inputs:  # the runtime throws across the C boundary for this
        raise InputMismatchError(run.name, "", f"{run.num_inputs} tensors", f"{len(tensors)}")
    inputs = (c_void_p * run.num_inputs)(*handles_of(tensors))
    outputs = (c_void_p * run.num_outputs)()
    if (
        _run_at(run.run)(
            run.container,
            inputs,
            run.num_inputs,
            outputs,
            run.num_outputs,
            None,
            run.proxy_executor,
        )
        == 0
    ):
        return tensors_of(outputs)
    own = c_char_p()
    if run.last_error:
        _last_error_at(run.last_error)(ctypes.byref(own))
    torchs = _torchs_words() if _torchs_words is not None else None
    free(inputs)  # stolen handles are null now; the caller still owns the rest
    free(outputs)
    raise RunError(
        f"{run.name}: the run failed: {explain_failure(_text(own.value), _text(torchs))}"
    )


def _text(words: bytes | None) -> str:
    return (words or b"").decode(errors="replace")
