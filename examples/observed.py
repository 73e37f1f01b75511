"""A scheduler that can be looked into: percentiles, why a request was slow, a timeline, metrics,
and the view of another process.

pip install -e '.[cli,expose,metrics,top]'
python -m examples.observed                            # three seconds of traffic
python -m examples.observed --seconds 600 --port 8001  # and http://127.0.0.1:8001 meanwhile

While it runs, `aoti-sched top`, `aoti-sched stats` and `aoti-sched timeline` show it, too.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, generate_latest

from aoti_sched import Priority, Runner, Scheduler, SchedulerConfig
from aoti_sched.exporters.prometheus import Collector

from .colours import CACHE, SIDE, eye_package, namer_package

TIMELINE = CACHE / "observed.json"


async def visitor(eye: Runner, namer: Runner, until: float, draw: random.Random) -> None:
    """Ask what colour a photo is, again and again; more often at some times than at others."""
    photo = torch.rand(1, 3, SIDE, SIDE)
    priorities = (Priority.HIGH, Priority.NORMAL, Priority.NORMAL, Priority.LOW)
    while (now := time.monotonic()) < until:
        options = {"priority": draw.choice(priorities), "timeout": 1.0}
        rgb = await eye.options(**options).run(photo)
        await namer.options(**options).run(rgb)
        await asyncio.sleep(draw.expovariate(20 if now % 20 < 10 else 60))


async def archive(eye: Runner, until: float) -> None:
    """Look through old photos, 16 at a time, with the lowest priority."""
    photos = torch.rand(16, 3, SIDE, SIDE)
    low = eye.options(priority=Priority.LOW, tenant="archive")
    while time.monotonic() < until:
        await asyncio.gather(*[low.run(photos) for _ in range(20)])
        await asyncio.sleep(0.3)


async def as_others_see(name: str, after: float) -> str:
    """Return what `aoti-sched stats` prints: another process, which reads the socket."""
    await asyncio.sleep(after)
    command = (sys.executable, "-m", "aoti_sched", "stats", name)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0].decode()


async def main(packages: tuple[Path, Path], seconds: float, port: int) -> None:
    async with Scheduler(SchedulerConfig(loop_lag=0.05)) as scheduler:
        eye = await scheduler.load(packages[0])
        namer = await scheduler.load(packages[1], batching=True)

        exposure = await scheduler.expose("observed", port=port)
        print(f"exposed     as {exposure.name!r}; the live page is {exposure.url}", flush=True)

        draw, until = random.Random(0), time.monotonic() + seconds
        with scheduler.record() as recording:
            visitors = [visitor(eye, namer, until, draw) for _ in range(20)]
            seen = as_others_see(exposure.name, after=seconds / 2)
            others, *_ = await asyncio.gather(seen, archive(eye, until), *visitors)

        latency = scheduler.stats().histogram("total")
        print(f"latency     of {latency.count:,} requests: ", end="")
        print(f"p50 {latency.p50 * 1e3:.2f} ms, p99 {latency.p99 * 1e3:.2f} ms")
        lag = scheduler.stats().loop_lag
        assert lag is not None
        print(f"event loop  late by at most {lag.max * 1e3:.2f} ms")

        (slowest,) = recording.slowest(1)
        took = (slowest.ended - slowest.queued) * 1e3
        print(f"slowest     {slowest.priority} {slowest.runner}, {took:.1f} ms: ", end="")
        print(recording.explain(slowest))

        await asyncio.to_thread(recording.save, TIMELINE)
        print(f"timeline    {TIMELINE}, for https://ui.perfetto.dev")

        registry = CollectorRegistry()
        registry.register(Collector(scheduler))
        lines = generate_latest(registry).decode().splitlines()
        print(f"metrics     {sum(not line.startswith('#') for line in lines)} samples, such as")
        print(f"            {next(line for line in lines if 'requests_total{' in line)}")

        print("others see")
        print("".join(f"            {line}\n" for line in others.splitlines()), end="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.observed")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    asyncio.run(main((eye_package(), namer_package()), options.seconds, options.port))
