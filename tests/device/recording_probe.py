"""What a recording that fails leaves behind, made by torch and made through the driver: `...

(torch|driver|reset)`.

A failed recording may spoil the process, so each way is tried in a process of its own.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import byref, c_uint, c_void_p

import torch

from tests.device.report import Findings

found = Findings()
cuda = ctypes.CDLL("libcuda.so.1")
x = torch.randn(64, 64, device="cuda")
w = torch.randn(64, 64, device="cuda")
side = torch.cuda.Stream()


def after(name: str) -> None:
    """What works after it: random numbers, cuBLAS, the allocator, with memory that stays."""
    with found.part(f"{name}: randn"):
        torch.randn(4, device="cuda").sum().item()
        found[f"{name}: randn"] = "works"
    with found.part(f"{name}: empty_cache"):
        torch.cuda.empty_cache()
        found[f"{name}: empty_cache"] = "works"
    with found.part(f"{name}: memory"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        for _ in range(1000):
            made = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
            made.record_stream(side)
            del made
        torch.cuda.synchronize()
        torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        grown = torch.cuda.memory_reserved() - before
        found.check(
            f"{name}: 1,000 blocks of 1 MiB used by another stream are given back",
            grown < 200 << 20,
            grown,
        )


def by_torch() -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            (x @ w).sum().item()
        except RuntimeError as error:
            found["torch: the failure"] = str(error)[:100]
        with suppress(RuntimeError):
            graph.capture_end()
    after("after a failed capture of torch's")


@contextmanager
def recording(pool: tuple[int, int], made: list[c_void_p]) -> Iterator[None]:
    """Record what the current stream is given, into an executable graph, through the driver."""
    stream = c_void_p(torch.cuda.current_stream().cuda_stream)
    graph = c_void_p()
    torch._C._cuda_beginAllocateCurrentStreamToPool(0, pool)
    try:
        status = cuda.cuStreamBeginCapture_v2(stream, c_uint(1))
        assert status == 0, status
        try:
            yield
        finally:
            status = cuda.cuStreamEndCapture(stream, byref(graph))
        if status != 0:
            raise RuntimeError(f"cuStreamEndCapture: {status}")
    finally:
        torch._C._cuda_endAllocateToPool(0, pool)
    executable = c_void_p()
    status = cuda.cuGraphInstantiateWithFlags(byref(executable), graph, ctypes.c_ulonglong(0))
    cuda.cuGraphDestroy(graph)
    assert status == 0, status
    made.append(executable)


def failing(name: str, work: Callable[[], object]) -> None:
    pool, made = torch.cuda.graph_pool_handle(), list[c_void_p]()
    with torch.cuda.stream(side):
        try:
            with recording(pool, made):
                work()
            found[f"driver: {name}"] = "recorded"
        except RuntimeError as error:
            found[f"driver: {name}"] = str(error)[:200]
        finally:
            torch._C._cuda_releasePool(0, pool)
    torch.cuda.synchronize()
    after(f"driver, after {name}")


def by_driver() -> None:
    pool, made = torch.cuda.graph_pool_handle(), list[c_void_p]()
    own, right = x.clone(), 0
    outputs = []
    with torch.cuda.stream(side):
        torch.relu(own @ w)  # loads the kernels, and makes cuBLAS's handle
        side.synchronize()
        reserved = torch.cuda.memory_reserved()
        with recording(pool, made):
            outputs.append(torch.relu(own @ w) + 1)
        with recording(pool, made):  # a second one in the same pool
            outputs.append(torch.relu(own @ w) + 2)
        for number in range(20):
            own.copy_(x * number)
            status = cuda.cuGraphLaunch(made[number % 2], c_void_p(side.cuda_stream))
            assert status == 0, status
            side.synchronize()
            want = torch.relu(x * number @ w) + 1 + number % 2
            right += torch.allclose(outputs[number % 2], want, atol=1e-3)
    found.check("driver: two graphs of one pool give the right values", right == 20, right)
    found["driver: bytes the pool took"] = torch.cuda.memory_reserved() - reserved
    outputs.clear()
    for executable in made:
        assert cuda.cuGraphExecDestroy(executable) == 0
        torch._C._cuda_releasePool(0, pool)  # each beginning counts as a use of the pool
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    found["driver: bytes reserved after the pool is released"] = (
        torch.cuda.memory_reserved() - reserved
    )
    failing(".item() in it", lambda: (x @ w).sum().item())
    failing("a random number in it", lambda: torch.randn(4, device="cuda"))

    def interrupted() -> None:
        torch.relu(x @ w)
        raise RuntimeError("the model's own error")

    failing("an error of the model in it", interrupted)


def reset() -> None:
    """Two graphs of one stream with products that need cuBLAS's workspace: close one, and run
    the other.
    """
    long = torch.randn(4, 65536, device="cuda")
    tall = torch.randn(65536, 64, device="cuda")
    graphs, outputs = [], []
    with torch.cuda.stream(side):
        long @ tall
        side.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for scale in (1, 2):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            outputs.append(long @ tall * scale)
            graph.capture_end()
            graphs.append(graph)
    wanted = (long @ tall) * 2
    torch.cuda.synchronize()
    found["reset: workspaces, bytes allocated"] = torch.cuda.memory_allocated()
    graphs[0].reset()
    torch.cuda.empty_cache()
    stranger = [torch.full((8 << 20,), 7.0, device="cuda") for _ in range(4)]
    for _ in range(50):
        with torch.cuda.stream(side):
            graphs[1].replay()
    torch.cuda.synchronize()
    found.check(
        "reset: the other graph still gives the right values",
        torch.allclose(outputs[1], wanted, atol=0.5, rtol=1e-2),
    )
    found.check(
        "reset: a stranger's memory is as it was", all(bool((one == 7).all()) for one in stranger)
    )


parts = {"torch": by_torch, "driver": by_driver, "reset": reset}
with found.part(sys.argv[1]):
    parts[sys.argv[1]]()
found.end()
