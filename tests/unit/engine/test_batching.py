"""Requests that run as one, through the real front on a hand-stepped backend."""

from __future__ import annotations

import asyncio
import math

import pytest
import structlog

import aoti_sched
from aoti_sched import Batching
from aoti_sched.testing import settle
from tests.unit.engine.support import until


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


async def load(scheduler, backend, function=lambda x: x * 2, **options):
    backend.models["m"] = function
    return await scheduler.load("m.pt2", batching=Batching(**options))


async def waiting(backend, runner, numbers):
    """One request runs; these wait behind it."""
    first = runner.submit(0)
    await settle()
    futures = [runner.submit(number) for number in numbers]
    await settle()
    assert backend.running == 1
    return first, futures


async def test_those_that_wait_run_as_one_and_each_gets_its_own(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    first, futures = await waiting(aoti_backend, runner, [1, 2, 3])
    await aoti_backend.step()
    assert await first == 0
    await aoti_backend.step()
    assert await asyncio.gather(*futures) == [2, 4, 6]
    assert [first.trace.batch_size, *(future.trace.batch_size for future in futures)] == [
        1,
        3,
        3,
        3,
    ]
    stats = runner.stats()
    assert (stats.batches, stats.batched, stats.completed) == (1, 3, 4)


async def test_a_batch_has_at_most_so_many(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend, max_size=2)
    assert runner.info.max_batch == 2
    _, futures = await waiting(aoti_backend, runner, [1, 2, 3])
    aoti_backend.finish_all()
    await asyncio.gather(*futures)
    assert [future.trace.batch_size for future in futures] == [2, 2, 1]


async def test_one_bad_request_fails_alone_and_the_log_tells_of_the_batch(
    aoti_backend, aoti_scheduler, quiet_logs
):
    def double(x):
        if x == 2:
            raise aoti_sched.RunError("two is not to be doubled")
        return x * 2

    runner = await load(aoti_scheduler, aoti_backend, double)
    _, futures = await waiting(aoti_backend, runner, [1, 2, 3])
    aoti_backend.finish_all()
    one, two, three = await asyncio.gather(*futures, return_exceptions=True)
    assert (one, three) == (2, 6)
    assert isinstance(two, aoti_sched.RunError)
    assert [future.trace.batch_size for future in futures] == [1, 1, 1]
    stats = runner.stats()
    assert (stats.completed, stats.failed, stats.retried) == (3, 1, 3)
    assert [log["batch_size"] for log in quiet_logs if log["event"] == "run failed"] == [3, 1]


async def test_a_member_that_is_cancelled_before_or_after_the_launch_costs_the_others_nothing(
    aoti_backend, aoti_scheduler
):
    runner = await load(aoti_scheduler, aoti_backend)
    first, (stays, early, late) = await waiting(aoti_backend, runner, [1, 2, 3])
    early.cancel()
    await aoti_backend.step()
    await first
    late.cancel()
    assert stays.trace.batch_size == 2
    aoti_backend.finish_all()
    assert await stays == 2
    assert early.cancelled()
    assert late.cancelled()
    assert runner.stats().free_slots == 1


async def test_a_timeout_in_a_batch_is_its_members_alone(aoti_backend, aoti_scheduler, aoti_clock):
    runner = await load(aoti_scheduler, aoti_backend)
    first, (one,) = await waiting(aoti_backend, runner, [1])
    hurried = runner.options(timeout=5).submit(2)
    await aoti_backend.step()
    await first
    assert one.trace.batch_size == 2
    aoti_clock.advance(6)
    with pytest.raises(aoti_sched.DeadlineExceededError, match="running"):
        await hurried
    await aoti_backend.step()
    assert await one == 2


async def test_requests_wait_for_company_when_asked_to_and_go_at_once_otherwise(
    aoti_backend, aoti_scheduler, aoti_clock
):
    runner = await load(aoti_scheduler, aoti_backend, max_delay=1.0, max_seconds=math.inf)
    futures = [runner.submit(1), runner.submit(2)]
    await settle()
    assert not aoti_backend.running
    aoti_clock.advance(1.0)
    await settle()
    await aoti_backend.step()
    assert await asyncio.gather(*futures) == [2, 4]


async def test_a_held_lease_runs_its_requests_one_by_one(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    async with runner.lease() as lease:
        futures = [lease.submit(number) for number in range(3)]
        aoti_backend.finish_all()
        assert await asyncio.gather(*futures) == [0, 2, 4]
    assert runner.stats().batches == 0


async def test_an_update_waits_for_a_batch_and_its_members_are_of_one_epoch(
    aoti_backend, aoti_scheduler
):
    aoti_backend.weights["m"] = {"w": 1}
    runner = await load(aoti_scheduler, aoti_backend)
    first, futures = await waiting(aoti_backend, runner, [1, 2])
    await aoti_backend.step()
    await first
    updating = asyncio.ensure_future(runner.update({"w": 2}))
    await until(lambda: runner.stats().updating)
    later = [runner.submit(number) for number in (3, 4)]
    aoti_backend.finish_all()
    await updating
    await asyncio.gather(*futures, *later)
    assert [future.trace.epoch for future in (*futures, *later)] == [1, 1, 2, 2]


async def test_closing_finishes_what_waits_for_company(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend, max_delay=60.0)
    future = runner.submit(1)
    closing = asyncio.ensure_future(runner.aclose())
    await settle()
    aoti_backend.finish_all()
    await closing
    assert await future == 2


async def test_what_the_queue_bounds_allow_is_the_same_with_batching(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2", batching=True, limits=aoti_sched.Limits(jobs=2))
    _, futures = await waiting(aoti_backend, runner, [1, 2])
    with pytest.raises(aoti_sched.QueueFullError):
        runner.submit(3)
    aoti_backend.finish_all()
    assert await asyncio.gather(*futures) == [1, 2]


async def test_until_the_first_run_has_ended_requests_run_alone(aoti_backend, aoti_scheduler):
    """A first batch of all that wait could take a hundred times as long as a run."""
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2", batching=True, instances=2)
    futures = [runner.submit(number) for number in range(4)]
    await settle()
    assert aoti_backend.running == 2
    aoti_backend.finish_all()
    await asyncio.gather(*futures)
    assert [future.trace.batch_size for future in futures] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("seconds", "sizes"), [(None, [2, 2, 2, 2, 1]), (3.0, [3, 3, 3, 2, 2]), (0.5, [1] * 5)]
)
async def test_a_batch_is_bounded_by_the_learned_times(
    aoti_backend, aoti_scheduler, aoti_clock, seconds, sizes
):
    """Each row takes a second, and requests of a higher class come."""

    def slow(x):
        aoti_clock.advance(1.0)
        return x

    runner = await load(aoti_scheduler, aoti_backend, slow, max_seconds=seconds)
    runner.options(priority=aoti_sched.Priority.HIGH).submit(0)
    await settle()
    futures = [runner.submit(number) for number in range(5)]
    await settle()
    aoti_backend.finish_all()
    await asyncio.gather(*futures)
    assert [future.trace.batch_size for future in futures] == sizes
