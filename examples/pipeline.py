"""A pipeline: each photo goes through one model and then another, many photos at once, with a
short queue.

python -m examples.pipeline
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from torch import Tensor

import aoti_sched
from aoti_sched import Limits, Runner

from .colours import NAMES, eye_package, namer_package, names, photo_of

PHOTOS = 200
QUEUE = 8  # requests that may wait for a model; everyone else waits at the gate


async def colour_in(photo: Tensor, eye: Runner, namer: Runner) -> str:
    """One item's way.

    It reads like straight code; other items use the models while this one waits.
    """
    rgb = await eye.run(photo)
    scores = await namer.run(rgb)
    return names(scores)[0]


async def main(eye_file: Path, namer_file: Path) -> None:
    chance = random.Random(0)
    colours = [chance.choice(NAMES) for _ in range(PHOTOS)]
    photos = [photo_of(colour, seed) for seed, colour in enumerate(colours)]
    async with aoti_sched.Scheduler() as scheduler:
        # With overflow="reject", the default, the ninth waiting request would get a QueueFullError.
        limits = Limits(jobs=QUEUE)
        eye = await scheduler.load(eye_file, overflow="wait", limits=limits)
        namer = await scheduler.load(namer_file, overflow="wait", limits=limits)

        items = [asyncio.create_task(colour_in(photo, eye, namer)) for photo in photos]
        await asyncio.sleep(0)  # every item has asked for the eye by now
        stats = eye.stats()
        print(
            f"eye        {stats.running} running, {stats.queued} queued, {stats.waiting} waiting "
            f"at the gate"
        )

        # Somebody lost interest in the last photo. The others don't notice.
        items[-1].cancel()
        answers = await asyncio.gather(*items, return_exceptions=True)
        right = sum(answer == colour for answer, colour in zip(answers, colours, strict=True))
        cancelled = sum(isinstance(answer, asyncio.CancelledError) for answer in answers)
        print(f"photos     {right} of {PHOTOS} named correctly, {cancelled} cancelled")
        print(f"the first  {', '.join(str(answer) for answer in answers[:5])}")
        for runner in (eye, namer):
            stats = runner.stats()
            print(
                f"{runner.name:<9}  {stats.completed} completed, {stats.cancelled} cancelled, "
                f"{stats.failed} failed"
            )


if __name__ == "__main__":
    asyncio.run(main(eye_package(), namer_package()))
