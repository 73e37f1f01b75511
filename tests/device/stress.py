"""Serve and exchange weights while others use the device, and compare each result with the
module's.

python -m tests.device.stress DEVICE FOLDER SECONDS [graphs] [global] [launchers]

`global`: a user's thread records CUDA graphs of its own in mode "global" meanwhile. `launchers`:
one launcher for all lanes.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from aoti_sched import Batching, DeviceConfig, Scheduler, SchedulerConfig
from tests.device.models import definition, to
from tests.device.report import Findings

found = Findings()
device, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
options = sys.argv[4:]
graphs = {"cuda_graphs": True} if "graphs" in options else {}
kind = getattr(torch, device.partition(":")[0])
counts: Counter[str] = Counter()


def draw(stop: threading.Event) -> None:
    """A user who draws random numbers, and clears cuBLAS's workspaces beside graphs."""
    while not stop.is_set():
        try:
            torch.rand(64, device=device)
            if graphs:
                torch._C._cuda_clearCublasWorkspaces()
            counts["a user's random numbers"] += 1
        except RuntimeError as error:
            counts[f"a user's random numbers: {error}"[:120]] += 1
        time.sleep(0.002)


def record(stop: threading.Event) -> None:
    """A user who records graphs in the mode that forbids others."""
    x = torch.randn(64, 64, device=device)
    while not stop.is_set():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                x @ x
            counts["a user's recordings"] += 1
        except RuntimeError as error:
            counts[f"a user's recording: {error}"[:120]] += 1
        time.sleep(0.01)


async def serve(
    name: str, runner: Any, modules: list[Any], inputs: list[torch.Tensor], where: str, stop: float
) -> None:
    """One client. A result is right when it is the result of one of the sets of weights."""
    wanted = [[module(x).cpu() for module in modules] for x in inputs]
    number = 0
    while time.monotonic() < stop:
        number += 1
        which = number % len(inputs)
        x = inputs[which]
        try:
            got = (await runner.run(x.cpu() if where == "host" else x)).cpu()
        except Exception as error:  # noqa: BLE001 -- it is counted
            counts[f"{name}: {type(error).__name__}: {error}"[:160]] += 1
            await asyncio.sleep(0.001)
            continue
        right = any(torch.allclose(got, want, atol=1e-2, rtol=1e-2) for want in wanted[which])
        counts[f"{name}: right"] += right
        if not right:
            counts[f"{name}: WRONG"] += 1


async def main() -> None:
    launchers = 1 if "launchers" in options else None
    config = SchedulerConfig(devices={device: DeviceConfig(lanes=4, launchers=launchers)})
    if device == "cpu":
        config = SchedulerConfig()
    stop, ends = threading.Event(), time.monotonic() + seconds
    threads = [] if device == "cpu" else [threading.Thread(target=draw, args=(stop,))]
    if "global" in options:
        threads.append(threading.Thread(target=record, args=(stop,)))
    with torch.no_grad():
        async with Scheduler(config) as scheduler:
            clients, updated = [], []
            for name in ("mlp", "wide"):
                made = definition(name)
                modules = [made.module().to(device), made.module().to(device)]
                for parameter in modules[1].parameters():
                    parameter.mul_(0.5)
                width = made.args[0].shape[1]
                inputs = [torch.randn(rows, width, device=device) for rows in (1, 3, 8, 17)]
                for instances, where, batching in (
                    (1, "device", None),
                    (4, "host", None),
                    (4, "device", Batching(dim=0)),
                ):
                    runner = await scheduler.load(
                        folder / f"{name}.pt2",
                        name=f"{name}-{'batches' if batching else where}",
                        device=device,
                        instances=instances,
                        batching=batching,
                        copy_inputs=device != "cpu",
                        **graphs,
                    )
                    updated.append((runner, modules))
                    clients += [
                        asyncio.ensure_future(
                            serve(runner.name, runner, modules, inputs, where, ends)
                        )
                        for _ in range(3)
                    ]
            number = 0
            while time.monotonic() < ends:
                number += 1
                for runner, modules in updated:
                    weights = modules[number % 2].state_dict()
                    if number % 3 == 0:
                        weights = to("cpu", weights)
                    try:
                        if number % 4 == 3:
                            await runner.stage(weights)
                            await asyncio.sleep(0.05)
                            await runner.commit(keep_previous=False)
                        else:
                            await runner.update(weights, keep_previous=number % 4 == 1)
                        counts["updates"] += 1
                    except Exception as error:  # noqa: BLE001 -- it is counted
                        counts[
                            f"update of {runner.name}: {type(error).__name__}: {error}"[:200]
                        ] += 1
                await asyncio.sleep(0.05)
            await asyncio.gather(*clients)
            found["graphs recorded"] = {
                runner.name: runner.info.cuda_graphs for runner, _ in updated
            }
    stop.set()
    for thread in threads:
        thread.join()
    for what, count in sorted(counts.items()):
        found[what] = count
    found.check("no result is wrong", not any("WRONG" in what for what in counts))
    found.check("no request failed", not any("Error" in what for what in counts))


with found.part("stress"):
    asyncio.run(main())
found.end()
