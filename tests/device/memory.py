"""What stays on the device and in the process: `python -m tests.device.memory DEVICE FOLDER`.

Loads and closes, updates on a device whose memory torch's cache holds, and workspaces for each
number of lanes.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from aoti_sched import DeviceConfig, Scheduler, SchedulerConfig
from aoti_sched.backends.devices import open_device
from tests.device.models import definition, to
from tests.device.report import Findings

found = Findings()
device, folder = sys.argv[1], Path(sys.argv[2])
cuda = device.startswith("cuda")


def used() -> int:
    """MiB of the device's memory, of torch's cache and of everything else."""
    if not cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) >> 20


def in_process() -> dict[str, int]:
    return {
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


async def loads() -> None:
    (x,) = to(device, definition("wide").args)
    for graphs in ({}, {"cuda_graphs": True}) if cuda else ({},):
        async with Scheduler() as scheduler:
            seen = []
            for _ in range(12):
                runner = await scheduler.load(
                    folder / "wide.pt2", device=device, instances=4, **graphs
                )
                await asyncio.gather(*(runner.run(x) for _ in range(16)))
                await runner.aclose()
                seen.append(used())
            name = f"load and close, {graphs or 'no graphs'}"
            found[f"{name}: MiB of the device after each"] = seen
            found[f"{name}: in the process"] = in_process()
            found.check(
                f"{name}: flat from the third on", seen[-1] - seen[2] <= 8, seen[-1] - seen[2]
            )


async def full() -> None:
    """An update while torch's cache holds all the device's memory."""
    made = definition("wide")
    async with Scheduler() as scheduler:
        runner = await scheduler.load(folder / "wide.pt2", device=device)
        blocks = []
        try:
            while True:
                blocks.append(torch.empty(1 << 30, dtype=torch.uint8, device=device))
        except torch.cuda.OutOfMemoryError:
            pass
        try:
            while True:
                blocks.append(torch.empty(2 << 20, dtype=torch.uint8, device=device))
        except torch.cuda.OutOfMemoryError:
            pass
        blocks.clear()
        try:
            await runner.update(made.module().state_dict())
            found["an update while torch's cache holds everything"] = "works"
        except Exception as error:  # noqa: BLE001 -- it is the finding
            found["an update while torch's cache holds everything"] = (
                f"{type(error).__name__}: {error}"[:300]
            )
        try:
            torch.ones(4, device=device).sum().item()
            found["torch's next kernel after it"] = "works"
        except RuntimeError as error:
            found["torch's next kernel after it"] = str(error)[:200]
        torch.cuda.empty_cache()
        await runner.update(made.module().state_dict())
        found["an update after empty_cache"] = "works"


async def workspaces() -> None:
    (x,) = to(device, definition("wide").args)
    for lanes in (4, 16, None):  # by default, one for each instance
        torch.cuda.empty_cache()
        config = SchedulerConfig(devices={device: DeviceConfig(lanes=lanes)})
        async with Scheduler(config) as scheduler:
            before = torch.cuda.memory_allocated()
            runner = await scheduler.load(folder / "wide.pt2", device=device, instances=4)
            for _ in range(50):
                await asyncio.gather(*(runner.run(x) for _ in range(20)))
            found[f"MiB allocated by 1,000 runs, 4 instances, {lanes} lanes"] = (
                torch.cuda.memory_allocated() - before
            ) >> 20
            await runner.aclose()
            found[f"of which remain after its close, {lanes} lanes"] = (
                torch.cuda.memory_allocated() - before
            ) >> 20


async def threads_cpu() -> None:
    """CPU seconds while nothing runs, and while the device computes."""
    async with Scheduler() as scheduler:
        await scheduler.load(folder / "wide.pt2", device=device, instances=8)
        before = os.times()
        await asyncio.sleep(1)
        now = os.times()
        found["CPU s of an idle second"] = round(
            now.user + now.system - before.user - before.system, 3
        )
        found["threads"] = threading.active_count()


def arrivals() -> None:
    """Nanoseconds of what a request with inputs on the device costs the loop's thread."""
    opened: Any = open_device(device)
    stream = opened.current_stream()
    for busy in (0, 4):
        stop = threading.Event()

        def work(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                sum(range(100))

        others = [threading.Thread(target=work) for _ in range(busy)]
        for thread in others:
            thread.start()
        times = 20_000 if not busy else 1_000
        began = time.perf_counter()
        for _ in range(times):
            opened.record(stream)
        found[f"ns of a request's event, {busy} busy threads"] = round(
            (time.perf_counter() - began) / times * 1e9
        )
        stop.set()
        for thread in others:
            thread.join()


with found.part("threads"):
    asyncio.run(threads_cpu())
with found.part("loads"):
    asyncio.run(loads())
if cuda:
    with found.part("arrivals"):
        arrivals()
    with found.part("workspaces"):
        asyncio.run(workspaces())
    with found.part("full"):
        asyncio.run(full())
found.end()
