"""Many small requests as few runs: what `batching=True` does for them, and what it does not do
to them.

python -m examples.batching

A catalogue of a thousand songs: for each, the model finds the song most like it. Two hundred
listeners ask for one song at a time, again and again. Requests run together, and each listener gets
the answer to their own. One listener asks for a song that does not exist, and only their request
fails.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import aoti_sched
from aoti_sched import Runner

from .colours import made_once

SONGS, FEATURES = 1000, 64
LISTENERS = 200
QUESTIONS = 20  # of each listener


class Alike(nn.Module):
    """Numbers of songs (n) to the numbers (n) of those most like them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.songs = nn.Embedding(SONGS, FEATURES)

    def forward(self, song: Tensor) -> Tensor:
        likeness = self.songs(song) @ self.songs.weight.T
        itself = torch.arange(SONGS) == song[:, None]
        return likeness.masked_fill(itself, -torch.inf).argmax(1)


def compile_alike(path: Path) -> None:
    """Requests can be batched when the first dimension of all inputs and outputs is free, up to
    the largest batch.
    """
    rows = Dim("rows", min=1, max=LISTENERS)
    aoti_sched.compile_package(
        Alike().eval(), (torch.tensor([1, 2]),), path, dynamic={"song": {0: rows}}
    )


async def listen(alike: Runner, song: int) -> int:
    """A listener goes from song to song.

    Nothing here knows of batches: one row is asked for, and comes back.
    """
    for _ in range(QUESTIONS):
        song = int(await alike.run(torch.tensor([song])))
    return song


async def evening(alike: Runner) -> list[int]:
    """What all of them listen to at last."""
    began = time.perf_counter()
    last = await asyncio.gather(*(listen(alike, song) for song in range(LISTENERS)))
    took = time.perf_counter() - began
    stats = alike.stats()
    runs = stats.completed - stats.batched + stats.batches
    rate = stats.completed / took
    print(
        f"{alike.name:<11} {stats.completed:,} requests in {runs:,} runs: {rate:,.0f} requests "
        f"per second"
    )
    return last


async def main(package: Path) -> None:
    async with aoti_sched.Scheduler() as scheduler:
        # The same package twice. True asks for what it says of itself; Batching(max_size=64,
        # max_delay=0.002) for less, and to wait 2 ms for company.
        alone = await scheduler.load(package, name="one by one")
        alike = await scheduler.load(package, name="batched", batching=True)
        same = await evening(alone) == await evening(alike)
        print(f"answers     {'the same' if same else 'different'}")

        # What comes in one turn of the loop goes together, but that a request which seems to be
        # alone goes at once.
        futures = [alike.submit(torch.tensor([song])) for song in range(10)]
        await asyncio.gather(*futures)
        print(f"batch_size  {[future.trace.batch_size for future in futures]}")

        # A request of several rows is still one request, and gets as many rows back.
        rows = await alike.run(torch.tensor([3, 1, 4]))
        print(f"rows        {rows.shape[0]} asked for, as many returned")

        # When a run fails, its requests are retried one by one, and only the bad request fails.
        print("bad song    one follows; the C++ traces on stderr are the compiled code's own")
        asked = [0, 1, SONGS, 3, 4]
        futures = [alike.submit(torch.tensor([song])) for song in asked]
        answers = await asyncio.gather(*futures, return_exceptions=True)
        for song, answer in zip(asked, answers, strict=True):
            if isinstance(answer, aoti_sched.RunError):
                print(f"bad song    {song} failed: {answer}")
        answered = sum(isinstance(answer, Tensor) for answer in answers)
        print(f"the others  {answered} answered, {alike.stats().retried} requests were retried")


if __name__ == "__main__":
    asyncio.run(main(made_once("batching", compile_alike)))
