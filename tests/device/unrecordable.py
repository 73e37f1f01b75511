"""Models whose runs can't be recorded run as ever, and spoil nothing: `python -m
tests.device.unrecordable DEVICE FOLDER`.
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
    async with Scheduler() as scheduler:
        for name in ("item", "noisy"):
            with found.part(name):
                made = definition(name)
                (x,) = to(device, made.args)
                module = made.module().to(device)
                runner = await scheduler.load(
                    folder / f"{name}.pt2", device=device, instances=2, cuda_graphs=True
                )
                if name == "item":
                    for _ in range(20):
                        with torch.no_grad():
                            want = module(x)
                        got = await runner.run(x)
                        assert torch.allclose(got, want, atol=1e-2, rtol=1e-2), (got, want)
                else:
                    results = await asyncio.gather(*(runner.run(x) for _ in range(20)))
                    different = len({tuple(one.flatten().tolist()) for one in results})
                    found.check("each run draws its own numbers", different == 20, different)
                found[f"{name}: graphs"] = runner.info.cuda_graphs
                with found.part(f"{name}: random numbers of the user afterwards"):
                    torch.rand(4, device=device).sum().item()
                torch.cuda.synchronize()
                before = torch.cuda.memory_reserved()
                for _ in range(1000):
                    await runner.run(x)
                grown = torch.cuda.memory_reserved() - before
                found.check(f"{name}: memory stays over 1,000 runs", grown <= 2 << 20, grown)
                torch.cuda.empty_cache()
                found[f"{name}: 1,000 runs and empty_cache"] = "work"


with found.part("unrecordable"):
    asyncio.run(main())
found.end()
