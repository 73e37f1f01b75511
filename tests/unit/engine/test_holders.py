"""Calls that wait for their own lease: refused where certain, reported where likely."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog

from aoti_sched import BlockingScheduler, LeaseError, RunnerClosedError
from aoti_sched.engine.callers import PATIENCE
from aoti_sched.testing import FakeBackend, fake_scheduler, settle
from tests.inside import router_of
from tests.unit.engine.support import until


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
async def runner(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x + 1
    aoti_backend.weights["m"] = {"w": 1}
    return await aoti_scheduler.load("m.pt2")


@pytest.fixture
async def double(aoti_backend, aoti_scheduler):
    aoti_backend.models["double"] = lambda x: x + 1
    return await aoti_scheduler.load("double.pt2", instances=2)


def reports(logs):
    return [log for log in logs if log["event"] == "calls wait for leases that are not used"]


async def after(clock, seconds):
    clock.advance(seconds)
    await settle()  # the log is written in the loop's next turn


async def enter(runner):
    return await runner.lease().__aenter__()


# --- certain --------------------------------------------------------------------------------------


async def test_a_run_within_the_only_lease_is_refused_at_once(aoti_backend, runner):
    async with runner.lease():
        for handle in (runner, runner.options(timeout=1)):
            with pytest.raises(
                LeaseError,
                match=r"runner 'm': run\(\) would wait for ever: its caller holds every slot "
                r"itself \(lease 1 \(slot 0\) of task '.*'\). Call lease.run",
            ):
                await handle.run(1)
    assert runner.stats().submitted == 1  # the lease
    aoti_backend.finish_all()
    assert await runner.run(1) == 2


async def test_a_second_lease_within_the_only_one_is_refused_at_once(runner):
    async with runner.lease():
        with pytest.raises(LeaseError, match=r"lease\(\) would wait for ever"):
            await enter(runner)
    assert runner.stats().held_leases == 0


@pytest.mark.parametrize("call", ["update", "commit", "rollback"])
@pytest.mark.parametrize("of_scheduler", [False, True])
async def test_a_change_of_weights_within_a_lease_is_refused_at_once(
    aoti_backend, aoti_scheduler, runner, call, of_scheduler
):
    aoti_backend.finish_all()
    await runner.update({"w": 2})
    if call == "commit":
        await runner.stage({"w": 3})
    arguments = [{"w": 3}] if call == "update" else []
    async with runner.lease() as lease:
        if not of_scheduler:
            change = getattr(runner, call)(*arguments)
        elif call == "update":
            change = aoti_scheduler.update({runner: {"w": 3}})
        else:
            change = getattr(aoti_scheduler, call)(runner)
        with pytest.raises(LeaseError, match=rf"{call}\(\) would wait for ever: it waits for held"):
            await change
        assert await lease.run(1) == 2
    assert runner.epoch == 2
    await getattr(runner, call)(*arguments)


@pytest.mark.parametrize("call", ["drain", "aclose"])
async def test_a_drain_within_a_lease_is_refused_at_once(aoti_backend, double, call):
    aoti_backend.finish_all()
    async with double.lease():
        with pytest.raises(LeaseError, match=rf"{call}\(\) would wait for ever"):
            await getattr(double, call)()
        assert await double.run(1) == 2  # it is open
    await getattr(double, call)()


@pytest.mark.parametrize("call", ["aclose", "drain_device"])
async def test_the_scheduler_does_not_wait_for_a_lease_of_the_caller_either(
    aoti_backend, aoti_scheduler, double, call
):
    aoti_backend.finish_all()
    arguments = ["cpu"] if call == "drain_device" else []
    async with double.lease():
        with pytest.raises(LeaseError, match=rf"{call}\(\) would wait for ever"):
            await getattr(aoti_scheduler, call)(*arguments)
        assert await double.run(1) == 2  # it is open
    await getattr(aoti_scheduler, call)(*arguments)


async def test_a_mapping_within_the_only_lease_is_refused_once_it_would_wait(aoti_backend, runner):
    aoti_backend.finish_all()
    mapping = runner.map([1, 2])
    async with runner.lease():
        with pytest.raises(LeaseError, match=r"map\(\) would wait for ever"):
            await anext(mapping)
    assert [result async for result in mapping] == [2, 3]


async def test_a_slot_that_is_left_is_used(aoti_backend, double):
    aoti_backend.finish_all()
    async with double.lease():
        assert await double.run(1) == 2
        async with double.lease():
            with pytest.raises(LeaseError):
                await double.run(1)
            with pytest.raises(LeaseError):
                await enter(double)


async def test_a_slot_that_another_task_holds_comes_back(aoti_backend, double):
    aoti_backend.finish_all()
    other = await asyncio.create_task(enter(double))
    async with double.lease():
        waiting = asyncio.ensure_future(double.run(1))
        await settle()
        assert not waiting.done()
        run = asyncio.ensure_future(double.run(2))
        await settle()
        other.release()
        assert [await waiting, await run] == [2, 3]


async def test_a_lease_that_another_task_uses_may_be_released_by_it(aoti_backend, runner):
    aoti_backend.finish_all()

    async def use(lease):
        assert await lease.run(1) == 2
        await settle()
        lease.release()

    lease = await enter(runner)
    user = asyncio.ensure_future(use(lease))
    await settle(2)
    assert await runner.run(2) == 3
    await user


async def test_what_does_not_wait_is_allowed_within_a_lease(aoti_backend, runner):
    aoti_backend.finish_all()
    async with runner.lease() as lease:
        future = runner.submit(1)
        assert await lease.options(timeout=5).run(2) == 3
        await runner.stage({"w": 2})
    assert await future == 2
    assert (await runner.commit()).epoch == 2


async def test_a_closed_runner_says_that_it_is_closed(runner):
    lease = await enter(runner)
    draining = asyncio.create_task(runner.drain())
    await settle()
    with pytest.raises(RunnerClosedError):
        await runner.run(1)
    lease.release()
    await draining


# --- likely ---------------------------------------------------------------------------------------


async def test_requests_that_wait_for_an_idle_lease_are_reported_once(
    aoti_backend, aoti_clock, runner, logs
):
    async with runner.lease():
        tasks = [asyncio.create_task(runner.run(i)) for i in range(2)]
        await settle()
        await after(aoti_clock, PATIENCE / 2)
        assert reports(logs) == []
        await after(aoti_clock, PATIENCE / 2)
        (report,) = reports(logs)
        assert (report["runner"], report["waiting"], report["log_level"]) == (
            "m",
            "2 requests",
            "warning",
        )
        assert report["holders"].startswith("lease 1 (slot 0) of task '")
        tasks.append(asyncio.create_task(runner.run(2)))
        await settle()
        for _ in range(5):
            await after(aoti_clock, PATIENCE)
        assert len(reports(logs)) == 1
    aoti_backend.finish_all()
    assert await asyncio.gather(*tasks) == [1, 2, 3]


async def test_two_tasks_that_wait_for_each_other_are_both_reported(
    aoti_backend, aoti_clock, runner, double, logs
):
    """Each holds all slots of one model and asks for a slot of the other."""

    async def hold(one, other, both):
        async with one.lease(), both, other.lease():
            pass

    extra = await asyncio.create_task(enter(double), name="third")
    both = Both()
    tasks = [
        asyncio.create_task(hold(runner, double, both), name="first"),
        asyncio.create_task(hold(double, runner, both), name="second"),
    ]
    await settle()
    for _ in range(2):  # the first look was begun by the first lease
        await after(aoti_clock, PATIENCE)
    told = {report["runner"]: report for report in reports(logs)}
    assert told["m"]["holders"] == "lease 2 (slot 0) of task 'first'"
    assert "task 'second'" in told["double"]["holders"]
    assert "task 'third'" in told["double"]["holders"]
    extra.release()
    await asyncio.gather(*tasks)


class Both:
    """Lets two tasks through when both have come."""

    def __init__(self):
        self._count = 0
        self._event = asyncio.Event()

    async def __aenter__(self):
        self._count += 1
        if self._count == 2:
            self._event.set()
        await self._event.wait()

    async def __aexit__(self, *_):
        pass


@pytest.mark.parametrize(
    ("call", "waiting"), [("update", "an update"), ("drain", "a drain"), ("aclose", "a drain")]
)
async def test_an_update_or_a_drain_that_waits_for_an_idle_lease_is_reported(
    aoti_clock, runner, logs, call, waiting
):
    arguments = [{"w": 2}] if call == "update" else []
    async with runner.lease():
        task = asyncio.create_task(getattr(runner, call)(*arguments))
        await settle()
        await until(lambda: call != "update" or runner.stats().updating)
        await after(aoti_clock, PATIENCE)
        (report,) = reports(logs)
        assert report["waiting"] == waiting
    await task


async def test_a_request_that_came_before_the_lease_is_reported_too(
    aoti_backend, aoti_clock, runner, logs
):
    first = runner.submit(1)
    leasing = asyncio.create_task(enter(runner))
    await settle()
    second = runner.submit(2)
    await aoti_backend.step()
    lease = await leasing
    await after(aoti_clock, PATIENCE)
    assert [report["waiting"] for report in reports(logs)] == ["1 request"]
    lease.release()
    await aoti_backend.step()
    assert [await first, await second] == [2, 3]


async def test_a_lease_in_use_is_not_reported(aoti_backend, aoti_clock, runner, logs):
    aoti_backend.finish_all()
    async with runner.lease() as lease:
        task = asyncio.create_task(runner.run(1))
        for _ in range(8):
            await lease.run(1)
            await after(aoti_clock, PATIENCE / 2)
        assert reports(logs) == []
        for _ in range(3):  # until it is used no more
            await after(aoti_clock, PATIENCE)
        assert len(reports(logs)) == 1
    await task


async def test_a_free_slot_is_no_reason_for_a_report(aoti_backend, aoti_clock, double, logs):
    async with double.lease():
        first, second = double.submit(1), double.submit(2)
        for _ in range(3):
            await after(aoti_clock, PATIENCE)
        assert reports(logs) == []  # the second waits for the first
        await aoti_backend.step()
        await aoti_backend.step()
        assert [await first, await second] == [2, 3]


async def test_released_leases_leave_nothing_and_no_timer(aoti_clock, runner, logs):
    holders = router_of(runner).holders
    async with runner.lease() as lease:
        future = runner.submit(1)
        assert list(holders.held) == [lease._state]
        future.cancel()
    assert not holders.held
    await after(aoti_clock, PATIENCE)
    assert holders._timer is None
    assert reports(logs) == []
    assert router_of(runner).holders.held == {}


async def test_closing_the_runner_stops_the_look(runner):
    lease = await enter(runner)
    future = runner.submit(1)
    holders = router_of(runner).holders
    assert holders._timer is not None
    await runner.terminate()
    assert holders._timer is None
    lease.release()
    with pytest.raises(RunnerClosedError):
        await future


# --- threads --------------------------------------------------------------------------------------


@pytest.fixture
def plain():
    backend = FakeBackend({"m": lambda x: x + 1}, weights={"m": {"w": 1}}, auto=True)
    with BlockingScheduler(devices={"cpu": backend}) as scheduler:
        yield scheduler.load("m.pt2")


def test_a_thread_that_holds_the_only_lease_is_refused_at_once(plain):
    with plain.lease() as lease:
        for call, name in [
            (lambda: plain.run(1), "run"),
            (lambda: plain.options(timeout=5).run(1), "run"),
            (lambda: plain.lease().__enter__(), "lease"),
            (lambda: plain.update({"w": 2}), "update"),
            (plain.drain, "drain"),
            (plain.close, "aclose"),
        ]:
            with pytest.raises(LeaseError, match=rf"{name}\(\) would wait .* thread 'MainThread'"):
                call()
            assert lease.run(1) == 2
        queued = plain.submit(3)  # does not wait
    assert queued.result() == 4
    assert plain.update({"w": 2}).epoch == 2


def test_a_thread_waits_for_a_lease_of_another_thread(plain):
    with ThreadPoolExecutor(1) as pool:
        with plain.lease():
            waiting = pool.submit(plain.run, 1)
            while not plain.stats().queued:
                pass
            assert not waiting.done()
        assert waiting.result() == 2


def test_a_thread_that_awaits_nothing_of_its_own_is_an_owner_no_more(plain):
    """A loop in a thread that has called a `BlockingScheduler` knows its tasks apart."""

    async def main():
        backend = FakeBackend({"m": lambda x: x + 1}, auto=True)
        async with fake_scheduler(backend) as scheduler:
            runner = await scheduler.load("m.pt2")
            lease = await asyncio.create_task(enter(runner))
            waiting = asyncio.ensure_future(runner.run(1))
            await settle()
            lease.release()
            return await waiting

    assert plain.run(1) == asyncio.run(main()) == 2


def test_the_log_names_the_thread_that_holds_the_lease(plain, logs):
    with plain.lease():
        future = plain.submit(1)
        while not reports(logs):
            pass
        assert "of thread 'MainThread'" in reports(logs)[0]["holders"]
    assert future.result() == 2
