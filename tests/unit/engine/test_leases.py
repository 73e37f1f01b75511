"""Held leases: one slot for several runs in turn, given back exactly once whatever happens."""

from __future__ import annotations

import asyncio

import pytest
import structlog

import aoti_sched
from aoti_sched.testing import settle
from tests.inside import replica_of


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
async def runner(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x + 1
    return await aoti_scheduler.load("m.pt2", instances=2)


async def run_stepped(backend, call):
    task = asyncio.ensure_future(call)
    await backend.running(1)
    await backend.step()
    return await task


async def test_a_lease_holds_one_slot_for_several_runs(aoti_backend, runner):
    async with runner.lease() as lease:
        slots = set()
        for i in range(3):
            future = lease.submit(i)
            await aoti_backend.step()
            assert await future == i + 1
            slots.add(future.trace.slot)
        assert slots == {lease.slot}
        assert lease.epoch == 1
        assert runner.stats().held_leases == 1
    assert (runner.stats().held_leases, runner.stats().free_slots) == (0, 2)


async def test_runs_of_one_lease_go_one_at_a_time(aoti_backend, runner):
    async with runner.lease() as lease:
        futures = [lease.submit(i) for i in range(3)]
        assert aoti_backend.running == 1
        for _ in futures:
            await aoti_backend.step()
        assert await asyncio.gather(*futures) == [1, 2, 3]


async def test_a_lease_waits_for_a_free_slot_in_its_turn(aoti_backend, runner):
    running = [runner.submit(0), runner.submit(1)]
    waiting = asyncio.ensure_future(runner.lease().__aenter__())
    await settle()
    assert not waiting.done()
    await aoti_backend.step()
    lease = await waiting
    lease.release()
    await aoti_backend.step()
    await asyncio.gather(*running)


async def test_a_lease_is_released_by_an_error_and_twice_is_fine(runner):
    with pytest.raises(ValueError, match="mine"):
        async with runner.lease() as lease:
            raise ValueError("mine")
    lease.release()
    assert runner.stats().free_slots == 2


async def test_a_released_lease_says_so(runner):
    async with runner.lease() as lease:
        pass
    with pytest.raises(
        aoti_sched.LeaseError, match=r"lease 1 of runner 'm' .* was released; take a new one"
    ):
        lease.submit(1)


async def test_a_lease_released_while_it_runs_goes_home_after_the_run(aoti_backend, runner):
    async with runner.lease() as lease:
        future = lease.submit(1)
    assert runner.stats().held_leases == 1
    await aoti_backend.step()
    assert await future == 2
    assert (runner.stats().held_leases, runner.stats().free_slots) == (0, 2)


async def test_a_lease_request_can_time_out(aoti_clock, aoti_backend, runner):
    running = [runner.submit(0), runner.submit(1)]
    waiting = asyncio.ensure_future(runner.options(timeout=1).lease().__aenter__())
    await settle()
    aoti_clock.advance(2)
    with pytest.raises(aoti_sched.DeadlineExceededError, match="waiting for a lease"):
        await waiting
    for _ in running:
        await aoti_backend.step()


async def test_cancelling_a_waiting_lease_request_leaves_nothing(aoti_backend, runner):
    running = [runner.submit(0), runner.submit(1)]
    waiting = asyncio.ensure_future(runner.lease().__aenter__())
    await settle()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for _ in running:
        await aoti_backend.step()
    assert (runner.stats().held_leases, runner.stats().free_slots) == (0, 2)


async def test_a_lease_granted_in_the_moment_of_cancellation_goes_back(aoti_backend, runner):
    running = [runner.submit(0), runner.submit(1)]
    waiting = asyncio.ensure_future(runner.lease().__aenter__())
    await settle()
    aoti_backend._executor.step()  # the completion is there, the loop has not seen it
    asyncio.get_running_loop().call_soon(
        waiting.cancel
    )  # after the grant, before the task wakes up
    replica_of(runner).dispatcher._collect()
    assert runner.stats().held_leases == 1
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert runner.stats().held_leases == 0
    await aoti_backend.step()
    await asyncio.gather(*running)


async def test_drain_waits_for_the_holder_and_its_runs(aoti_backend, runner):
    async with runner.lease() as lease:
        draining = asyncio.ensure_future(runner.drain())
        await settle()
        with pytest.raises(aoti_sched.RunnerClosedError, match="draining"):
            runner.submit(1)
        assert await run_stepped(aoti_backend, lease.run(1)) == 2
        assert not draining.done()
    await draining


async def test_terminate_takes_leases_back(aoti_backend, runner):
    async with runner.lease() as lease:
        running, queued = lease.submit(1), lease.submit(2)
        ending = asyncio.ensure_future(runner.terminate())
        await settle()
        with pytest.raises(aoti_sched.RunnerClosedError, match="terminated"):
            await queued
        with pytest.raises(aoti_sched.RunnerClosedError, match="its leases are gone"):
            lease.submit(3)
        assert not ending.done()
        await aoti_backend.step()
        assert await running == 2
        await ending


async def test_options_of_a_lease_set_priority_and_timeout_of_its_runs(
    aoti_clock, aoti_backend, runner
):
    async with runner.lease() as lease:
        future = lease.options(timeout=1).submit(1)
        aoti_clock.advance(1)
        with pytest.raises(aoti_sched.DeadlineExceededError):
            await future
        await aoti_backend.step()
