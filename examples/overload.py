"""More requests than a machine can answer: which are refused, which are answered, and when.

python -m examples.overload [--seconds N]

A search box asks for suggestions at every key stroke, and a suggestion that comes later than 100 ms
is of no use. One key stroke in twenty is a paying customer's. The same crowd, at half of what the
machine can do and at five times that, meets the model three times: behind a queue without a bound;
behind one that drops the worst when it is full; and behind one that refuses at once what could not
be answered in time. In none of them a request runs that can't be in time any more.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

import aoti_sched
from aoti_sched import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    Limits,
    Priority,
    QueueFullError,
    Runner,
    ShedError,
)

from .colours import made_once

WORDS, WIDTH = 200, 400
IN_TIME = 0.1  # seconds
CROWD = 2.0  # seconds that it keeps asking, unless told otherwise


class Suggest(nn.Module):
    """A few milliseconds of work for one request."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))

    def forward(self, words: Tensor) -> Tensor:
        return self.layers(words).mean(1)


def compile_suggest(path: Path) -> None:
    aoti_sched.compile_package(Suggest().eval(), (torch.rand(WORDS, WIDTH),), path)


async def capacity(suggest: Runner, words: Tensor) -> float:
    """Requests per second, with as many at once as there are instances.

    Also, how long a run takes is known afterwards.
    """
    count, instances = 100, suggest.info.instances

    async def client() -> None:
        for _ in range(count // instances):
            await suggest.run(words)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(instances)))
    return count / (time.perf_counter() - began)


class Ends:
    """What became of the requests, and after how long."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.in_time: Counter[Priority] = Counter()

    def add(self, end: str, seconds: float) -> None:
        self.seconds.setdefault(end, []).append(seconds)


async def ask(suggest: Runner, words: Tensor, priority: Priority, ends: Ends) -> None:
    """One key stroke."""
    began = time.perf_counter()
    try:
        await suggest.options(timeout=IN_TIME, priority=priority).run(words)
        end = "answered in time"
        ends.in_time[priority] += 1
    except DeadlineUnreachableError:
        end = "refused: it could not have been in time"
    except DeadlineExceededError:
        end = "too late"
    except ShedError:
        end = "dropped for a better one"
    except QueueFullError:
        end = "refused: the queue is full of better ones"
    ends.add(end, time.perf_counter() - began)


async def crowd(suggest: Runner, words: Tensor, per_second: float, lasts: float) -> Ends:
    """It asks so often for as many seconds as it `lasts`, whatever becomes of it."""
    ends, asked = Ends(), 0
    began = time.perf_counter()
    tasks = []
    while (passed := time.perf_counter() - began) < lasts:
        while asked < passed * per_second:
            priority = Priority.NORMAL if asked % 20 else Priority.HIGH
            tasks.append(asyncio.create_task(ask(suggest, words, priority, ends)))
            asked += 1
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)
    return ends


async def main(package: Path, lasts: float) -> None:
    words = torch.rand(WORDS, WIDTH)
    async with aoti_sched.Scheduler() as scheduler:
        endless = Limits(jobs=None)
        suggests = [
            await scheduler.load(package, name="no bound", instances=2, limits=endless),
            await scheduler.load(
                package,
                name="a bound, the worst dropped",
                instances=2,
                limits=Limits(jobs=32),
                overflow="shed",
            ),
            await scheduler.load(
                package,
                name="refused by prediction",
                instances=2,
                limits=endless,
                admission="predictive",
            ),
        ]
        possible = [await capacity(suggest, words) for suggest in suggests][-1]
        print(f"capacity    {possible:,.0f} requests per second")
        for load in (0.5, 5.0):
            for suggest in suggests:
                ends = await crowd(suggest, words, load * possible, lasts)
                print(f"\n{load:g} times the capacity, {suggest.name}")
                for end, seconds in sorted(ends.seconds.items()):
                    after = statistics.median(seconds)
                    print(
                        f"  {len(seconds):6,} {end}; half of them knew after {1e3 * after:.1f} ms"
                    )
                print(
                    f"  {ends.in_time[Priority.HIGH]:6,} of those in time were a paying customer's"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=CROWD, help="of each crowd (%(default)g)")
    seconds = parser.parse_args().seconds
    asyncio.run(main(made_once("overload", compile_suggest), seconds))
