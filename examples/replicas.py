"""One model on two devices: who answers what, new weights on both at once, and one of them
taken out of service under load.

python -m examples.replicas

Two halves of the CPU, each with cores of its own, stand for two devices; with GPUs,
`devices="cuda:*"` says the same. The application awaits one runner and need not know.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import torch

import aoti_sched
from aoti_sched import DeviceConfig, RunFuture, SchedulerConfig

from .colours import made_once
from .two_tenants import SIDE, Sharpness, compile_sharpness

PHOTOS = 200


def two_halves() -> dict[str, DeviceConfig]:
    """The cores of this process as two devices."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("This example shows two devices, and needs two cores for them.")
    middle = len(cores) // 2
    return {
        "cpu:0": DeviceConfig(affinity=tuple(cores[:middle])),
        "cpu:1": DeviceConfig(affinity=tuple(cores[middle:])),
    }


def where(futures: list[RunFuture]) -> str:
    counts = Counter(future.trace.device for future in futures)
    return ", ".join(f"{count} on {device}" for device, count in sorted(counts.items()))


async def main(package: Path) -> None:
    photos = [torch.rand(1, 3, SIDE, SIDE) for _ in range(PHOTOS)]
    async with aoti_sched.Scheduler(SchedulerConfig(devices=two_halves())) as scheduler:
        sharpness = await scheduler.load(package, name="sharpness", devices=["cpu:0", "cpu:1"])
        print(f"loaded      {sharpness.name} on {sharpness.device}")

        futures = [sharpness.submit(photo) for photo in photos]
        before = await asyncio.gather(*futures)
        print(f"answered    {len(before)} of {PHOTOS}: {where(futures)}")

        futures = [sharpness.submit(photo) for photo in photos]
        sharper = {name: 2 * value for name, value in Sharpness().state_dict().items()}
        report = await sharpness.update(sharper)
        await asyncio.gather(*futures)
        epochs = Counter((future.trace.epoch, future.trace.device) for future in futures)
        print(
            f"updated     to epoch {report.epoch} on both devices at one instant; "
            f"before it {epochs[1, 'cpu:0']} and {epochs[1, 'cpu:1']} were answered, "
            f"after it {epochs[2, 'cpu:0']} and {epochs[2, 'cpu:1']}"
        )

        futures = [sharpness.submit(photo) for photo in photos]
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        await scheduler.drain_device("cpu:1")
        answers = await asyncio.gather(*futures)
        print(f"drained     cpu:1, {sharpness.stats().withdrawn} requests moved")
        print(f"answered    {len(answers)} of {PHOTOS}: {where(futures)}")

        rest = [replica.device for replica in sharpness.info.replicas]
        print(f"in service  {', '.join(rest)}")


if __name__ == "__main__":
    asyncio.run(main(made_once("tenants", compile_sharpness)))
