"""Two customers and one model: the one who sends everything at once does not keep the other
waiting.

python -m examples.two_tenants

One customer hands in an archive, four hundred photos at once. The other looks at single ones, again
and again. In one queue for all, the single photos wait behind the archive. As tenants, the two take
turns, and a bound of its own keeps each from filling the queue.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import aoti_sched
from aoti_sched import Limits, QueueFullError, RunFuture, RunnerView

from .colours import made_once

ARCHIVE, LOOKS, SIDE = 400, 20, 128


class Sharpness(nn.Module):
    """Photos (n, 3, 128, 128), 0 to 1, to how sharp (n) each is; a few milliseconds for one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.edges = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 5), nn.ReLU())

    def forward(self, photos: Tensor) -> Tensor:
        return self.edges(photos).mean((1, 2, 3))


def compile_sharpness(path: Path) -> None:
    aoti_sched.compile_package(Sharpness().eval(), (torch.rand(1, 3, SIDE, SIDE),), path)


def hand_in(sharpness: RunnerView) -> RunFuture | QueueFullError:
    try:
        return sharpness.submit(torch.rand(1, 3, SIDE, SIDE))
    except QueueFullError as error:
        return error


async def archive(sharpness: RunnerView) -> int:
    """All at once; what is refused is not sent again. How many were answered."""
    photos = [hand_in(sharpness) for _ in range(ARCHIVE)]
    refused = [photo for photo in photos if isinstance(photo, QueueFullError)]
    if refused:
        print(f"refused     {len(refused)} of {ARCHIVE}: {refused[0]}")
    answers = await asyncio.gather(*(photo for photo in photos if isinstance(photo, RunFuture)))
    return len(answers)


async def look(sharpness: RunnerView) -> list[float]:
    """One photo after the other; how long each took, in milliseconds."""
    took = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        await sharpness.run(torch.rand(1, 3, SIDE, SIDE))
        took.append(1e3 * (time.perf_counter() - began))
    return took


async def main(package: Path) -> None:
    async with aoti_sched.Scheduler() as scheduler:
        sharpness = await scheduler.load(package, name="sharpness", instances=2)
        print(f"alone       a look takes {statistics.median(await look(sharpness)):.1f} ms")

        _, took = await asyncio.gather(archive(sharpness), look(sharpness))
        print(
            f"one queue   the first look took {took[0]:.1f} ms, the others "
            f"{statistics.median(took[1:]):.1f} ms"
        )

        archivist, visitor = (
            sharpness.options(tenant="archivist"),
            sharpness.options(tenant="visitor"),
        )
        _, took = await asyncio.gather(archive(archivist), look(visitor))
        print(
            f"tenants     the first look took {took[0]:.1f} ms, the others "
            f"{statistics.median(took[1:]):.1f} ms"
        )

        bounded = await scheduler.load(
            package, name="bounded", instances=2, limits=Limits(tenant_jobs=100)
        )
        answered, _ = await asyncio.gather(
            archive(bounded.options(tenant="archivist")), look(bounded.options(tenant="visitor"))
        )
        print(f"bounded     {answered} of the archive were answered, and {LOOKS} of {LOOKS} looks")


if __name__ == "__main__":
    asyncio.run(main(made_once("tenants", compile_sharpness)))
