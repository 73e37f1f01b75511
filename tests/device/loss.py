"""Lose a device while its runners are busy: every request ends, the CPU serves on, and the
process ends well.

python -m tests.device.loss DEVICE FOLDER (runs|graphs|eager)

The device is lost to a model's own index out of range, without and with CUDA graphs beside it, or
to the user's.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

import torch

from aoti_sched import Scheduler
from tests.device.models import definition, to
from tests.device.report import Findings

found = Findings()


async def lose(device: str, folder: Path, how: str) -> None:
    mlp = definition("mlp")
    async with Scheduler() as scheduler:
        graphs = how == "graphs"
        there = [
            await scheduler.load(
                folder / "mlp.pt2", name=f"mlp{n}", device=device, instances=2, cuda_graphs=graphs
            )
            for n in range(2)
        ]
        gather = await scheduler.load(folder / "gather.pt2", device=device)
        here = await scheduler.load(folder / "mlp-cpu.pt2", name="here")
        (x,) = to(device, mlp.args)
        await there[0].run(x)
        futures = [runner.submit(x) for _ in range(100) for runner in there]
        if how == "eager":
            torch.zeros(4, device=device)[torch.tensor([100], device=device)]
        else:
            futures.append(gather.submit(torch.tensor([5, 1000, 3], device=device)))
        futures += [runner.submit(x) for _ in range(100) for runner in there]
        ended = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 60)
        found["how the requests ended"] = Counter(
            f"{type(one).__name__}: {one}"[:160] if isinstance(one, BaseException) else "a value"
            for one in ended
        )
        after = await asyncio.wait_for(
            asyncio.gather(*[r.run(x) for r in there], return_exceptions=True), 60
        )
        found["a request afterwards"] = [f"{type(one).__name__}: {one}"[:200] for one in after]
        found.check(
            "a request afterwards gets DeviceLostError",
            all(type(one).__name__ == "DeviceLostError" for one in after),
        )
        want = mlp.module()(*mlp.args)
        got = await here.run(*mlp.args)
        found.check("the CPU's runner serves on", torch.allclose(got, want, atol=1e-4))
    found["the scheduler closed"] = True


with found.part("loss"):
    asyncio.run(lose(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
found.end()
