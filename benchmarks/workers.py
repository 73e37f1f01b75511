"""Each entrant in a process of its own, opened once, measured in turn with the others, idle in
between.

A fresh process, because an event loop, an environment variable and the thread pools of OpenMP, ONNX
Runtime and OpenVINO stay for good once they are there.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Coroutine
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from .plan import Entrant, Measured, Scale
from .workloads import programme

if TYPE_CHECKING:
    from typing_extensions import Self

PATIENCE = 900.0
"""Seconds for one answer of a process.

The slowest million requests took an eighth of that on two cores.
"""


class Worker:
    """The parent's side of one entrant's process. Use it as a context manager."""

    def __init__(self, key: str, name: str, scale: Scale) -> None:
        self.name = name
        context = multiprocessing.get_context("forkserver" if scale.forked else "spawn")
        context.set_forkserver_preload([__name__, "torch"])  # `spawn` does not ask for it
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, key, name, scale), daemon=True)
        self._process.start()
        theirs.close()

    def opened(self) -> tuple[float, ...]:
        """Wait until it is ready; the beginning of its answer."""
        answer: tuple[float, ...] = self._answer()
        return answer

    def measure(self, seconds: float) -> Measured:
        """One repetition, and what share of the cores others took meanwhile."""
        import psutil

        def others() -> float:
            machine, own = psutil.cpu_times(), process.cpu_times()
            # What a guest of this machine uses is in `user` already.
            busy = (
                sum(machine)
                - machine.idle
                - getattr(machine, "iowait", 0.0)
                - getattr(machine, "guest", 0.0)
            )
            return busy - own.user - own.system

        process = psutil.Process(self._process.pid)
        before, started = others(), time.perf_counter()
        self._pipe.send(seconds)
        measured: Measured = self._answer()
        cores_seconds = (time.perf_counter() - started) * (os.cpu_count() or 1)
        return replace(measured, others=max(0.0, others() - before) / cores_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # which it takes for the end
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(PATIENCE):
                self._process.kill()
                raise RuntimeError(f"{self.name} did not answer for {PATIENCE:g} s")
            fault, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            fault = f"its process ended with {self._process.exitcode}"
        if fault is not None:
            raise RuntimeError(f"{self.name}: {fault}")
        return answer


def _serve(pipe: Connection, key: str, name: str, scale: Scale) -> None:
    """The process's side: open the entrant, then measure as often as asked."""
    import structlog

    # The library logs each load and close; here the tables speak.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    try:
        entrant = next(
            entrant for entrant in programme()[key].entrants(scale) if entrant.name == name
        )
        os.environ.update(entrant.environment)
        _run(_measure(pipe, entrant), uvloop=entrant.uvloop)
    except (EOFError, ConnectionError):
        pass  # the parent is through, or gone
    except Exception:  # noqa: BLE001 -- the parent raises it
        pipe.send((traceback.format_exc(), None))


async def _measure(pipe: Connection, entrant: Entrant) -> None:
    async with entrant.open() as opened:
        pipe.send((None, opened.answer))
        while True:
            seconds = pipe.recv()  # blocks the loop: nothing else is on it between two measurements
            pipe.send((None, await opened.measure(seconds)))


def _run(main: Coroutine[Any, Any, None], *, uvloop: bool) -> None:
    if uvloop:
        import uvloop as faster

        faster.run(main)
    else:
        asyncio.run(main)
