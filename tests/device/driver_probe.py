"""What CUDA's driver does with threads that wait, calls that are made, and captures of others.

Each finding is one that the backends rely on, or want to know before they do.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_uint, c_void_p
from pathlib import Path

import torch

from tests.device.report import Findings

found = Findings()
library = sys.argv[1] if len(sys.argv) > 1 else "libcuda.so.1"
cuda = ctypes.CDLL(library)
held = ctypes.PyDLL(library)  # keeps the GIL
BLOCKING_SYNC, DISABLE_TIMING, NON_BLOCKING = 1, 2, 1
THREADS = 8

torch.ones(1, device="cuda")
context = c_void_p()
cuda.cuCtxGetCurrent(byref(context))


def stream(flags: int = NON_BLOCKING) -> c_void_p:
    made = c_void_p()
    assert cuda.cuStreamCreate(byref(made), c_uint(flags)) == 0
    return made


def event(flags: int) -> c_void_p:
    made = c_void_p()
    assert cuda.cuEventCreate(byref(made), c_uint(flags)) == 0
    return made


def in_a_thread(work: Callable[[], object]) -> object:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    thread.join(30)
    return answers[0] if answers else "did not return within 30 s"


def waiting() -> None:
    """CPU seconds for each second that eight threads wait for the device."""
    torch.cuda._sleep(1_000_000)
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(20_000_000)
    torch.cuda.synchronize()
    cycles = int(20_000_000 * 0.05 / (time.perf_counter() - began))
    streams = [stream() for _ in range(THREADS)]
    outside = [torch.cuda.ExternalStream(one.value) for one in streams]

    def fence(one: c_void_p, own: c_void_p) -> None:
        cuda.cuStreamSynchronize(one)

    def block(one: c_void_p, own: c_void_p) -> None:
        cuda.cuEventRecord(own, one)
        cuda.cuEventSynchronize(own)

    def spin_first(one: c_void_p, own: c_void_p) -> None:
        cuda.cuEventRecord(own, one)
        until = time.perf_counter() + 50e-6
        while cuda.cuEventQuery(own) == 600 and time.perf_counter() < until:
            pass
        cuda.cuEventSynchronize(own)

    for name, how in (
        ("stream synchronize", fence),
        ("blocking event", block),
        ("spin, then block", spin_first),
    ):
        events = [event(BLOCKING_SYNC | DISABLE_TIMING) for _ in streams]

        def lane(
            number: int, how: Callable[..., None] = how, events: list[c_void_p] = events
        ) -> None:
            cuda.cuCtxSetCurrent(context)
            for _ in range(4):
                with torch.cuda.stream(outside[number]):
                    torch.cuda._sleep(cycles)
                how(streams[number], events[number])

        threads = [threading.Thread(target=lane, args=(n,)) for n in range(THREADS)]
        wall, cpu = time.perf_counter(), time.process_time()
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        wall = time.perf_counter() - wall
        found[f"wait: {name}: CPU s per s, {THREADS} threads"] = round(
            (time.process_time() - cpu) / wall, 3
        )
        # How long after the device is done one waiting thread goes on.
        one, own = streams[0], events[0]
        late = []
        for _ in range(200):
            with torch.cuda.stream(outside[0]):
                torch.cuda._sleep(cycles // 500)  # about 100 us
            began = time.perf_counter()
            how(one, own)
            late.append(time.perf_counter() - began)
        found[f"wait: {name}: us for a kernel of 100 us, median"] = round(
            sorted(late)[100] * 1e6, 1
        )


def costs() -> None:
    """Nanoseconds of a call, through ctypes that gives up the GIL and that keeps it."""
    one, own, where = stream(), event(DISABLE_TIMING), c_void_p()
    calls = {
        "cuStreamQuery": (one,),
        "cuStreamIsCapturing": (one, byref(c_int())),
        "cuEventQuery": (own,),
        "cuCtxGetCurrent": (byref(where),),
        "cuCtxSetCurrent": (context,),
        "cuEventRecord": (own, one),
        "cuStreamWaitEvent": (one, own, c_uint(0)),
    }
    for busy in (0, 4):
        stop = threading.Event()

        def work(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                sum(range(100))

        others = [threading.Thread(target=work) for _ in range(busy)]
        for thread in others:
            thread.start()
        for kind, handle in (("CDLL", cuda), ("PyDLL", held)):
            for name, arguments in calls.items():
                function = getattr(handle, name)
                times = 20_000 if not busy else 100
                began = time.perf_counter()
                for _ in range(times):
                    function(*arguments)
                found[f"ns: {name}, {kind}, {busy} busy threads"] = round(
                    (time.perf_counter() - began) / times * 1e9
                )
        stop.set()
        for thread in others:
            thread.join()


PTX = b""".version 7.0
.target sm_70
.address_size 64
.visible .entry nothing() { ret; }
\0"""


def captures() -> None:
    """What another thread may do while a stream is captured: its status, and the capture's own
    at its end.
    """
    other, ready, pinned = stream(), event(DISABLE_TIMING), c_void_p()
    cuda.cuMemAllocHost_v2(byref(pinned), 4096)
    cuda.cuEventRecord(ready, other)
    torch.cuda.synchronize()

    def alloc_host() -> int:
        return cuda.cuMemAllocHost_v2(byref(c_void_p()), 1 << 20)

    def free_host() -> int:
        return cuda.cuMemFreeHost(pinned)

    def malloc() -> int:
        return cuda.cuMemAlloc_v2(byref(c_void_p()), ctypes.c_size_t(1 << 20))

    def load_module() -> int:
        return cuda.cuModuleLoadData(byref(c_void_p()), PTX)

    def torch_alloc() -> str:
        try:
            torch.empty(3 << 28, dtype=torch.uint8, device="cuda")
        except RuntimeError as error:
            return str(error)[:80]
        return "0"

    operations: dict[str, Callable[[], object]] = {
        "cuStreamQuery": lambda: cuda.cuStreamQuery(other),
        "cuStreamSynchronize": lambda: cuda.cuStreamSynchronize(other),
        "cuEventQuery": lambda: cuda.cuEventQuery(ready),
        "cuEventSynchronize": lambda: cuda.cuEventSynchronize(ready),
        "cuEventRecord": lambda: cuda.cuEventRecord(ready, other),
        "cuStreamWaitEvent": lambda: cuda.cuStreamWaitEvent(other, ready, c_uint(0)),
        "cuStreamCreate": lambda: cuda.cuStreamCreate(byref(c_void_p()), NON_BLOCKING),
        "cuEventCreate": lambda: cuda.cuEventCreate(byref(c_void_p()), DISABLE_TIMING),
        "cuMemAllocHost": alloc_host,
        "cuMemFreeHost": free_host,
        "cuMemAlloc": malloc,
        "cuModuleLoadData": load_module,
        "cuStreamQuery of NULL": lambda: cuda.cuStreamQuery(None),
        "cuStreamSynchronize of NULL": lambda: cuda.cuStreamSynchronize(None),
        "cuCtxSynchronize": cuda.cuCtxSynchronize,
        "torch allocates 768 MiB": torch_alloc,
    }
    modes = {"global": 0, "thread-local": 1}
    for mode, number in modes.items():
        for exchanged in (False, True):
            for name, operation in operations.items():
                captured, graph = stream(), c_void_p()
                if name == "cuMemFreeHost":
                    cuda.cuMemAllocHost_v2(byref(pinned), 4096)
                assert cuda.cuStreamBeginCapture_v2(captured, c_uint(number)) == 0

                def there(
                    operation: Callable[[], object] = operation, exchanged: bool = exchanged
                ) -> object:
                    cuda.cuCtxSetCurrent(context)
                    if exchanged:
                        cuda.cuThreadExchangeStreamCaptureMode(byref(c_int(1)))
                    return operation()

                status = in_a_thread(there)
                ended = cuda.cuStreamEndCapture(captured, byref(graph))
                if graph.value:
                    cuda.cuGraphDestroy(graph)
                how = (
                    f"capture {mode}{', other thread is thread-local' if exchanged else ''}: {name}"
                )
                found[how] = f"{status}, the capture {ended}"
                cuda.cuStreamDestroy_v2(captured)
        torch.cuda.empty_cache()


def blocking() -> None:
    """What may be asked while a stream is captured that the default stream waits for."""
    idle, ready = stream(), event(DISABLE_TIMING)
    operations: dict[str, Callable[[], int]] = {
        "cuStreamQuery of an idle stream": lambda: cuda.cuStreamQuery(idle),
        "cuStreamIsCapturing of NULL": lambda: cuda.cuStreamIsCapturing(None, byref(c_int())),
        "cuStreamQuery of NULL": lambda: cuda.cuStreamQuery(None),
        "cuEventRecord on NULL": lambda: cuda.cuEventRecord(ready, None),
    }
    for mode, number in {"global": 0, "thread-local": 1, "relaxed": 2}.items():
        for name, operation in operations.items():
            for own in (True, False):
                captured, graph = stream(0), c_void_p()
                assert cuda.cuStreamBeginCapture_v2(captured, c_uint(number)) == 0

                def ask(operation: Callable[[], int] = operation) -> int:
                    cuda.cuCtxSetCurrent(context)
                    before = c_int(2)
                    cuda.cuThreadExchangeStreamCaptureMode(byref(before))
                    status = operation()
                    cuda.cuThreadExchangeStreamCaptureMode(byref(before))
                    return status

                status = ask() if own else in_a_thread(ask)
                ended = cuda.cuStreamEndCapture(captured, byref(graph))
                if graph.value:
                    cuda.cuGraphDestroy(graph)
                thread = "the same" if own else "another"
                how = f"capture {mode} of a blocking stream, {thread} thread is relaxed: {name}"
                found[how] = f"{status}, the capture {ended}"
                if "idle" in name:
                    found.check(f"{how}: allowed", status == 0 and ended == 0, (status, ended))
                cuda.cuStreamDestroy_v2(captured)


def contexts() -> None:
    """What a fresh thread is in, and what the primary context's flags are."""
    loaded = [p for p in Path("/proc/self/maps").read_text().split() if "libcudart" in p]

    def device() -> object:
        before = c_void_p()
        cuda.cuCtxGetCurrent(byref(before))
        cuda.cuCtxSetCurrent(context)
        number = c_int(-1)
        status = ctypes.CDLL(loaded[0]).cudaGetDevice(byref(number)) if loaded else "not loaded"
        return f"context before {before.value}, cudaGetDevice {status}: {number.value}"

    found["a fresh thread"] = in_a_thread(device)
    flags, active = c_uint(), c_int()
    ordinal = c_int()
    cuda.cuDeviceGet(byref(ordinal), 0)
    cuda.cuDevicePrimaryCtxGetState(ordinal, byref(flags), byref(active))
    found["flags of the primary context"] = flags.value
    least, most = c_int(), c_int()
    cuda.cuCtxGetStreamPriorityRange(byref(least), byref(most))
    found["stream priorities, least and greatest"] = (least.value, most.value)
    version = c_int()
    cuda.cuDriverGetVersion(byref(version))
    found["driver's CUDA version"] = version.value


for part in (contexts, waiting, costs, captures, blocking):
    with found.part(part.__name__):
        part()
found.end()
