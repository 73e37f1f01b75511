"""An hour of load in virtual time, scraped every second: the numbers neither drift nor grow."""

from __future__ import annotations

import asyncio
import gc
import random

import pytest

from aoti_sched import Limits, Priority, QueueFullError, SchedulerConfig
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle

prometheus_client = pytest.importorskip("prometheus_client")

from aoti_sched.exporters.prometheus import Collector  # noqa: E402

SECONDS, WARM = 3600, 900
RUN = 0.125  # seconds; their sums are exact
OUTCOMES = {"completed", "rejected", "expired", "cancelled"}


def samples_of(registry):
    return {
        (sample.name, tuple(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def total(samples, name, **labels):
    wanted = labels.items()
    return sum(v for (n, of), v in samples.items() if n == name and wanted <= dict(of).items())


async def test_the_numbers_of_an_hour_neither_drift_nor_grow():
    draw = random.Random(0)
    clock = ManualClock()

    def model(text):
        clock.advance(RUN)
        return len(text)

    backend = FakeBackend({"m": model, "n": model}, lanes=2, clock=clock)
    config = SchedulerConfig(flight_facts=1000)
    submitted, sizes, objects = 0, {}, {}
    async with fake_scheduler(backend, clock=clock, config=config) as scheduler:
        runners = [await scheduler.load(f"{name}.pt2", limits=Limits(jobs=6)) for name in "mn"]
        registry = prometheus_client.CollectorRegistry()
        registry.register(Collector(scheduler))
        last = {}
        for second in range(SECONDS):
            until = clock.time() + 1.0
            futures = []
            for _ in range(draw.choice([0, 3, 6, 20])):
                view = draw.choice(runners).options(
                    priority=draw.choice(list(Priority)),
                    timeout=draw.choice([None, 0.3, 2.0]),
                    tenant=f"tenant {second} {draw.randrange(3)}",  # new ones all the time
                )
                submitted += 1
                try:
                    futures.append(view.submit("ab"))
                except QueueFullError:
                    continue
                if draw.random() < 0.1:
                    futures[-1].cancel()
            while backend.running:
                await backend.step()
            await settle(3)
            if futures:
                await asyncio.wait(futures)
                for future in futures:
                    if not future.cancelled():
                        future.exception()
            clock.advance(max(0.0, until - clock.time()))
            now = samples_of(registry)
            ended = total(now, "aoti_sched_requests_total")
            assert ended + total(now, "aoti_sched_in_flight_requests") == submitted
            counters = {key for key in last if key[0].endswith(("_total", "_bucket", "_count"))}
            assert [key for key in counters if now[key] < last[key]] == []
            last = now
            if second in (WARM, SECONDS - 1):
                gc.collect()
                sizes[second], objects[second] = len(now), len(gc.get_objects())
        stats = scheduler.stats()
    done = total(last, "aoti_sched_requests_total", outcome="completed")
    assert total(last, "aoti_sched_run_seconds_sum") == done * RUN
    assert total(last, "aoti_sched_run_seconds_count") == done == stats.histogram("run").count
    assert {
        dict(of)["outcome"] for (name, of), v in last.items() if "requests_total" in name and v
    } == OUTCOMES
    assert len(set(sizes.values())) == 1, "the number of series grows"
    assert objects[SECONDS - 1] <= objects[WARM] * 1.02, "objects are kept"
