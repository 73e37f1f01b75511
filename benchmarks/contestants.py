"""The ways of running a model from asyncio that are held against each other, each as its users
would write it.

A contestant, opened, gives a function without arguments that runs the model once on
`models.example`. All take one intra-op thread per run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import aoti_sched
from aoti_sched.backends.executors.choose import CHOICE
from aoti_sched.package import open_package

from . import models

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[[], Any]
"""Runs the model once: returns an awaitable, or, where the contestant blocks, the answer."""


@dataclass(frozen=True)
class Setting:
    """What a contestant is asked to serve: a model, with so many runs at once, to so many
    clients.
    """

    model: str
    instances: int
    clients: int
    kind: str = "pt2"


@dataclass(frozen=True)
class Contestant:
    """A name for the table, a sentence for the reader, and how to get ready to run."""

    name: str
    note: str
    open: Callable[[Setting], AbstractAsyncContextManager[Run]]
    kind: str = "pt2"
    environment: Mapping[str, str] = field(default_factory=dict)
    uvloop: bool = False
    blocking: bool = False
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        needs = [*self.needs, "uvloop"] if self.uvloop else self.needs
        return [package for package in needs if importlib.util.find_spec(package) is None]

    def frozen(self) -> Contestant:
        """The same, over a package whose weights are part of the code."""
        return replace(self, name=f"{self.name}, frozen", kind="frozen.pt2")


def beginning(answer: Any) -> tuple[float, ...]:
    """The first numbers of a model's answer, in whichever form the contestant gives it."""
    first = answer[0] if isinstance(answer, list) else answer
    return tuple(float(value) for value in first.reshape(-1)[:4])


# --- the stock runner -----------------------------------------------------------------------------


def stock_runner(setting: Setting) -> Callable[[list[Tensor]], list[Tensor]]:
    """torch's own container runner, the quickest of the stock ways: `aoti_load_package` adds 10
    µs of pytrees.
    """
    import torch
    from torch._C._aoti import AOTIModelContainerRunnerCpu

    torch.set_num_threads(1)  # of this thread and those born later
    library = open_package(models.ensure(setting.model, setting.kind)).extract().library
    run: Callable[[list[Tensor]], list[Tensor]] = AOTIModelContainerRunnerCpu(
        str(library), setting.instances
    ).run
    return run


def _stock(setting: Setting) -> Callable[[], list[Tensor]]:
    run, x = stock_runner(setting), models.example(setting.model)
    return lambda: run([x])


@asynccontextmanager
async def bare_loop(setting: Setting) -> AsyncIterator[Run]:
    yield _stock(setting)


@asynccontextmanager
async def to_thread(setting: Setting) -> AsyncIterator[Run]:
    yield partial(asyncio.to_thread, _stock(setting))


@asynccontextmanager
async def thread_pool(setting: Setting) -> AsyncIterator[Run]:
    with ThreadPoolExecutor(setting.instances) as pool:
        yield partial(asyncio.get_running_loop().run_in_executor, pool, _stock(setting))


# --- this library ---------------------------------------------------------------------------------


def scheduled(
    placement: Literal["auto", "lane"], batching: aoti_sched.Batching | None = None
) -> Callable[[Setting], AbstractAsyncContextManager[Run]]:
    @asynccontextmanager
    async def open_runner(setting: Setting) -> AsyncIterator[Run]:
        async with aoti_sched.Scheduler() as scheduler:
            package = models.ensure(setting.model, setting.kind)
            runner = await scheduler.load(
                package, instances=setting.instances, placement=placement, batching=batching
            )
            x = models.example(setting.model)
            # As in applications, no two requests share a tensor.
            inputs = itertools.cycle([x.clone() for _ in range(2 * setting.clients)])
            yield lambda: runner.run(next(inputs))

    return open_runner


# --- other runtimes, on the same network ----------------------------------------------------------


@asynccontextmanager
async def openvino(setting: Setting) -> AsyncIterator[Run]:
    """`AsyncInferQueue`, with a request for each client, so that starting one never waits."""
    import openvino as ov

    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "THROUGHPUT"}
    if setting.model == "tiny":
        hints |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": "1"}
    compiled = ov.Core().compile_model(models.ensure(setting.model, setting.kind), "CPU", hints)
    requests = ov.AsyncInferQueue(compiled, setting.clients)
    loop = asyncio.get_running_loop()
    x = models.example(setting.model).numpy()

    def done(request: Any, future: asyncio.Future[Any]) -> None:  # on a thread of OpenVINO's
        loop.call_soon_threadsafe(future.set_result, request.get_output_tensor(0).data.copy())

    def run() -> asyncio.Future[Any]:
        future = loop.create_future()
        requests.start_async([x], future)
        return future

    requests.set_callback(done)
    yield run


@asynccontextmanager
async def onnx_runtime(setting: Setting) -> AsyncIterator[Run]:
    """Serve by `run_async`, which runs on the session's pool.

    The pool has one thread fewer than its setting, and needs at least one.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.instances + 1
    session = ort.InferenceSession(
        models.ensure(setting.model, setting.kind), options, providers=["CPUExecutionProvider"]
    )
    loop = asyncio.get_running_loop()
    feed = {"x": models.example(setting.model).numpy()}

    def resolve(future: asyncio.Future[Any], answer: Any, error: str) -> None:
        if error:
            future.set_exception(RuntimeError(error))
        else:
            future.set_result(answer)

    def done(
        answer: Any, future: asyncio.Future[Any], error: str
    ) -> None:  # on a thread of the pool
        loop.call_soon_threadsafe(resolve, future, answer, error)

    def run() -> asyncio.Future[Any]:
        future = loop.create_future()
        session.run_async(None, feed, done, future)
        return future

    yield run


# --- the field ------------------------------------------------------------------------------------

BARE = Contestant(
    "bare loop", "AOTIModelContainerRunnerCpu, called directly: the floor", bare_loop, blocking=True
)
TO_THREAD = Contestant("to_thread", "asyncio.to_thread over the same", to_thread)
POOL = Contestant(
    "thread pool", "run_in_executor over the same, a thread per instance", thread_pool
)
THREADS = Contestant(
    "thread lanes",
    "aoti_sched, lanes are Python threads",
    scheduled("lane"),
    environment={CHOICE: "threads"},
)
NATIVE = Contestant(
    "native lanes",
    "aoti_sched, lanes are native threads",
    scheduled("lane"),
    environment={CHOICE: "native"},
)
AUTO = Contestant(
    "auto", "aoti_sched as it comes: lanes, or inline when runs are short", scheduled("auto")
)
NATIVE_UVLOOP = replace(
    NATIVE, name="native, uvloop", note="aoti_sched, native lanes, under uvloop", uvloop=True
)
AUTO_UVLOOP = replace(
    AUTO, name="auto, uvloop", note="aoti_sched as it comes, under uvloop", uvloop=True
)
OPENVINO = Contestant(
    "OpenVINO",
    "AsyncInferQueue; its callback wakes the loop",
    openvino,
    kind="onnx",
    needs=("openvino", *models.EXPORTERS),
)
ONNX_RUNTIME = Contestant(
    "ONNX Runtime",
    "run_async; its callback wakes the loop",
    onnx_runtime,
    kind="onnx",
    needs=("onnxruntime", *models.EXPORTERS),
)
EVERYONE = (
    BARE,
    TO_THREAD,
    POOL,
    THREADS,
    NATIVE,
    NATIVE_UVLOOP,
    AUTO,
    AUTO_UVLOOP,
    OPENVINO,
    ONNX_RUNTIME,
)
