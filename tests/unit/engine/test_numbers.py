"""Numbers of requests in `stats()`: histograms, rejections, goodput, what is in flight, the lag."""

from __future__ import annotations

import asyncio
import time

import pytest

from aoti_sched import Limits, Priority, QueueFullError, Scheduler, SchedulerConfig
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle


@pytest.fixture
def clock():
    return ManualClock()


async def test_each_ended_request_is_in_one_histogram(clock):
    backend = FakeBackend({"m": len}, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2", limits=Limits(jobs=2))
        futures = [runner.submit("ab") for _ in range(2)]
        urgent = runner.options(priority=Priority.HIGH, timeout=3.0).submit("abc")
        with pytest.raises(QueueFullError):
            runner.submit("ab")
        assert runner.stats().in_flight == 3
        clock.advance(1.0)
        await backend.step()
        futures[1].cancel()
        clock.advance(0.5)
        await backend.step()
        assert await urgent == 3
        stats = runner.stats()
        assert stats.in_flight == 0
        assert stats.rejections == {"QueueFullError": 1}
        assert stats.in_time == stats.completed == 2
        assert [(one.outcome, one.priority, one.total.sum) for one in stats.ended] == [
            ("cancelled", "NORMAL", 1.0),
            ("completed", "HIGH", 1.5),
            ("completed", "NORMAL", 1.0),
            ("rejected", "NORMAL", 0.0),
        ]
        assert stats.histogram(priority=Priority.HIGH).sum == 1.5
        parts = stats.histogram("queue").sum + stats.histogram("run").sum
        assert parts == stats.histogram("total").sum == 2.5
        assert stats.histogram("batch_size").mean == 1.0
        everywhere = scheduler.stats()
        assert everywhere.histogram("total") == stats.histogram("total")
        assert everywhere.devices["cpu"].histogram("total") == stats.histogram("total")
    assert scheduler.stats().histogram("total", outcome=None).count == 4, "after the close"


async def test_a_late_answer_is_not_in_time(clock):
    backend = FakeBackend({"m": len}, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        answer = asyncio.ensure_future(runner.options(timeout=1.0).run("ab"))
        await settle()
        clock.advance(2.0)
        await backend.step()
        with pytest.raises(TimeoutError):
            await answer
        assert (runner.stats().expired, runner.stats().in_time) == (1, 0)


async def test_replicas_are_added_up(clock):
    backends = {f"cpu:{n}": FakeBackend({"m": len}, lanes=1, clock=clock) for n in range(2)}
    async with Scheduler(devices=backends, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2", devices=list(backends), limits=Limits(jobs=1))
        futures = [runner.submit("ab") for _ in range(4)]
        with pytest.raises(QueueFullError):
            runner.submit("ab")
        for _ in range(2):
            for backend in backends.values():
                await backend.step()
        assert [await future for future in futures] == [2] * 4
        stats = runner.stats()
        assert [one.completed for one in stats.replicas.values()] == [2, 2]
        assert stats.histogram().count == stats.completed == stats.in_time == 4
        assert scheduler.stats().histogram() == stats.histogram()
        assert stats.rejections == {"QueueFullError": 1}
        assert stats.in_flight == 0


async def test_the_loops_lag_is_sampled_only_where_the_settings_ask_for_it():
    async with Scheduler() as scheduler:
        assert scheduler.stats().loop_lag is None
    async with Scheduler(SchedulerConfig(loop_lag=0.001)) as scheduler:
        while not scheduler.stats().loop_lag.count:  # noqa: ASYNC110 -- timers set no event
            await asyncio.sleep(0)
        time.sleep(0.05)  # noqa: ASYNC251 -- a blocked loop is what the sampler is for
        while scheduler.stats().loop_lag.max < 0.04:  # noqa: ASYNC110 -- as above
            await asyncio.sleep(0)
    last = scheduler.stats().loop_lag
    await asyncio.sleep(0.01)
    assert scheduler.stats().loop_lag == last, "no samples after the close"
