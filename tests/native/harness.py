"""What tests of the lanes share: lanes over the C model library, works of fake tensors, and how
completions come.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from aoti_sched.backends.native import _native
from tests.native.library import Container, Fence, capsule, library, new_prefix, pointer

FOREVER = 60.0
"""Seconds after which a test that waits in vain fails; no test that passes comes near."""


# Lanes hold no Python object: models and their containers must live as long as there may be works
# of theirs.
_kept: list[tuple[_native.Model, Container]] = []


class Done(NamedTuple):
    """One completion; outputs as plain handles."""

    token: int
    outputs: list[int | None] | None
    error: tuple[str, str] | None
    started: float
    finished: float


def tries() -> Iterator[None]:
    """Try again and again, letting others have the core between; in vain for ever is a failure."""
    until = time.monotonic() + FOREVER
    while time.monotonic() < until:
        yield
        os.sched_yield()
    raise AssertionError("it never came to be")


def numbers() -> _native.Tensors:
    """Handles of the C library's tensors as plain numbers; those that a run gives are the
    test's own.
    """
    return _native.Tensors(
        int, lambda handles: [*map(capsule, handles)], lambda capsules: [*map(pointer, capsules)]
    )


def open_lanes(
    count: int = 1,
    cores: int = 2,
    prefix: str | None = None,
    tensors: _native.Tensors | None = None,
) -> _native.Lanes:
    c = library()
    prefix = prefix or new_prefix()
    return _native.Lanes(
        [f"{prefix}{lane}" for lane in range(count)],
        [],
        cores,
        tensors or numbers(),
        delete_tensor=c.address("torch_delete_tensor"),
        root_cause=c.address("torch_root_cause"),
        get_threads=c.address("torch_get_threads"),
        set_omp_threads=c.address("torch_set_omp_threads"),
        set_mkl_threads=c.address("torch_set_mkl_threads"),
        new_handle=c.address("torch_another_handle"),
    )


SHIM = (
    "get_data_ptr",
    "get_dim",
    "get_sizes",
    "get_strides",
    "get_dtype",
    "dtype_element_size",
    "empty_strided",
    "reinterpret_tensor",
    "clone",
    "delete_tensor",
)


def stream(fence: Fence, handle: int = 0) -> _native.Stream:
    """A stream whose device's only step is this fence."""
    c = library()
    functions = {
        "new_handle": "torch_another_handle",
        "get_device_type": "torch_get_device_type",
        "copy": "torch_copy",
    }
    device = _native.Device(
        _native.Shim(**{name: c.address(f"torch_{name}") for name in SHIM}, cpu=0),
        type=0,
        index=0,
        one_at_a_time=False,
        functions={name: c.address(function) for name, function in functions.items()},
    )
    return _native.Stream(
        device,
        handle=handle,
        fence=c.address("device_fence"),
        argument=fence.address,
        brought=[],
        home=False,
    )


def model(container: Container, inputs: int = 0, outputs: int = 0, **others: int) -> _native.Model:
    c = library()
    made = _native.Model(
        run=c.address("model_run"),
        container=container.address,
        num_inputs=inputs,
        num_outputs=outputs,
        last_error=c.address("model_last_error"),
        **others,
    )
    _kept.append((made, container))
    return made


def tensors(count: int) -> list[int]:
    return [library().new_tensor() for _ in range(count)]


def submit(
    lanes: _native.Lanes,
    one: _native.Model,
    inputs: list[int] | None = None,
    *,
    lane: int = 0,
    token: int = 0,
    threads: int = 1,
) -> None:
    lanes.submit(lane, token, one, inputs or [], threads)


def run_here(
    lanes: _native.Lanes, one: _native.Model, inputs: list[int] | None = None, *, threads: int = 1
) -> Done:
    return done(lanes.run_here(one, inputs or [], threads))


def submit_when_there_is_room(lanes: _native.Lanes, one: _native.Model, *, token: int = 0) -> None:
    """Submit a work without inputs, as soon as the lane takes it."""
    for _ in tries():
        with contextlib.suppress(RuntimeError):
            submit(lanes, one, token=token)
            return


def readable(lanes: _native.Lanes) -> bool:
    return bool(select.select([lanes], [], [], 0)[0])


def drain(lanes: _native.Lanes, limit: int = 256) -> list[Done]:
    return [done(one) for one in lanes.drain(limit)]


def done(taken: Any) -> Done:
    token, result, started, finished = taken
    if isinstance(result, tuple):
        return Done(token, None, result, started, finished)
    return Done(token, result, None, started, finished)


def collect(lanes: _native.Lanes, count: int) -> list[Done]:
    """The next `count` completions, waited for through the descriptor as an event loop does."""
    completions: list[Done] = []
    while len(completions) < count:
        assert select.select([lanes], [], [], FOREVER)[0], (
            f"{len(completions)} of {count} completions came"
        )
        completions += drain(lanes)
    return completions
