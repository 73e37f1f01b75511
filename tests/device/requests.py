"""A few requests and an update, for `compute-sanitizer` to watch: `python -m
tests.device.requests DEVICE FOLDER`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch

from aoti_sched import Scheduler
from tests.device.models import definition, to
from tests.device.report import Findings

found = Findings()
device, folder = sys.argv[1], Path(sys.argv[2])


async def main() -> None:
    made = definition("mlp")
    graphs = {"cuda_graphs": True} if device.startswith("cuda") else {}
    (x,) = to(device, made.args)
    module = made.module().to(device)
    async with Scheduler() as scheduler:
        runner = await scheduler.load(folder / "mlp.pt2", device=device, instances=2, **graphs)
        for _ in range(2):
            with torch.no_grad():
                want = module(x)
            for got in await asyncio.gather(*(runner.run(x) for _ in range(15))):
                found.check("right", torch.allclose(got, want, atol=1e-2, rtol=1e-2))
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(0.5)
            await runner.update(module.state_dict())


with found.part("requests"):
    asyncio.run(main())
found.end()
