"""Six models of 16 MiB on a device that has room for three: the idle ones are parked, and come
back when they are asked for.

python -m examples.many_models

The application loads them all and awaits whichever it wants. Popular ones are there nearly always.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import psutil
import torch
from torch import nn

import aoti_sched
from aoti_sched import DeviceConfig, MemoryLimitError, SchedulerConfig

from .colours import made_once

MODELS = 6
FEATURES = 2048
MIB = 1 << 20


def compile_expert(path: Path) -> None:
    torch.manual_seed(0)
    expert = nn.Linear(FEATURES, FEATURES, bias=False).eval()
    aoti_sched.compile_package(expert, (torch.randn(1, FEATURES),), path)


async def main(package: Path) -> None:
    draw, x = random.Random(0), torch.randn(1, FEATURES)
    device = DeviceConfig(memory_limit=50 * MIB, evict="lru")
    async with aoti_sched.Scheduler(SchedulerConfig(devices={"cpu": device})) as scheduler:
        before = psutil.Process().memory_full_info().uss
        experts = [
            await scheduler.load(package, name=f"expert-{number}") for number in range(MODELS)
        ]
        memory = scheduler.stats().devices["cpu"].memory
        print(
            f"loaded      {MODELS} models: {memory.used // MIB} MiB are there, "
            f"{memory.parked // MIB} MiB parked"
        )

        # The first is asked for half of the time, the second a quarter of it, and so on.
        weights = [2.0**-number for number in range(MODELS)]
        waits: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(200):
            (expert,) = draw.choices(experts, weights)
            was_parked, started = expert.stats().parked, time.perf_counter()
            await expert.run(x)
            waits[was_parked].append(time.perf_counter() - started)
        for was_parked, times in waits.items():
            middle = sorted(times)[len(times) // 2]
            where = "had to come back" if was_parked else "were there"
            print(
                f"answered    {len(times)} of 200 by models that {where}, half of them within "
                f"{middle * 1e3:.1f} ms"
            )
        print(
            f"parked      {', '.join(f'{one.name} {one.stats().parks}' for one in experts)} times"
        )
        grown = psutil.Process().memory_full_info().uss - before
        print(f"memory      the process has grown by {grown / MIB:.0f} MiB")

        answers = await asyncio.gather(*(expert.run(x) for expert in experts for _ in range(5)))
        same = all(torch.equal(answer, answers[0]) for answer in answers)
        print(f"all at once {len(answers)} answered, {'all the same' if same else 'not the same'}")

        async with experts[0].lease(), experts[1].lease(), experts[2].lease():
            try:
                await scheduler.load(package, name="one more")
            except MemoryLimitError as error:
                print(f"refused     {error}")


if __name__ == "__main__":
    asyncio.run(main(made_once("expert", compile_expert)))
