"""The first five minutes: compile a module, load it, await it, and see what else a runner can do.

python -m examples.first_steps
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from torch.export import Dim

import aoti_sched
from aoti_sched import Priority

from .colours import made_once, names, trained_namer


def compile_namer(path: Path) -> None:
    """A build step: it takes seconds and needs g++.

    What it writes is all that the application needs.
    """
    module = (
        trained_namer()
    )  # Linear, ReLU, Linear: three numbers of a colour to eight scores of names
    batch = Dim("batch", min=1, max=64)  # how many colours one request may hold
    aoti_sched.compile_package(module, (torch.rand(2, 3),), path, dynamic={"rgb": {0: batch}})


async def main(package: Path) -> None:
    async with aoti_sched.Scheduler() as scheduler:
        # Two instances share the weights and can run at once. Loading happens off the event loop.
        namer = await scheduler.load(package, name="namer", instances=2)
        print(f"loaded      {namer.name}{namer.info.signature} on {namer.device}")

        # Awaiting a model: its forward's own arguments, and what its forward returns.
        scores = await namer.run(torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.2, 0.9]]))
        print(f"run         {names(scores)}")

        # Scheduling options are set on a view, apart from the model's arguments. A view can be
        # kept for many requests.
        urgent = namer.options(priority=Priority.HIGH, timeout=0.5)
        print(f"urgent      {names(await urgent.run(torch.tensor([[0.95, 0.9, 0.2]])))}")

        # submit() returns an asyncio future at once; its trace says where and when the request ran.
        future = namer.submit(rgb=torch.tensor([[0.1, 0.6, 0.2]]))
        print(f"submit      {names(await future)}")
        trace = future.trace
        print(
            f"trace       lane {trace.lane}, slot {trace.slot}: "
            f"{trace.queue_seconds * 1e6:.0f} us queued, {trace.run_seconds * 1e6:.0f} us running"
        )

        # A request that does not fit never reaches native code.
        try:
            await namer.run(torch.rand(2, 4))
        except aoti_sched.InputMismatchError as error:
            print(f"bad input   {error}")

        # A lease holds one instance for several runs in turn.
        async with namer.lease() as lease:
            shades = [names(await lease.run(torch.full((1, 3), grey))) for grey in (0.0, 1.0)]
        print(f"lease       slot {lease.slot}: {shades}")

        stats = namer.stats()
        print(
            f"stats       {stats.completed} of {stats.submitted} done, "
            f"{stats.run_seconds * 1e3:.2f} ms of work"
        )
    # Leaving the block finishes what was accepted and frees the models.


if __name__ == "__main__":
    asyncio.run(main(made_once("first_steps", compile_namer)))
