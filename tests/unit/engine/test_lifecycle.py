"""Loading, draining, closing: names, cancellation, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import inspect
import threading

import pytest
import structlog

import aoti_sched
from aoti_sched import Scheduler
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.testing import FakeBackend, fake_scheduler, settle


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


class SlowBackend(FakeBackend):
    """Its loads wait until they are let go on."""

    def __init__(self) -> None:
        super().__init__({"m": lambda x: x}, auto=True)
        self.loading = threading.Event()
        self.go_on = threading.Event()

    def load(self, inspected):
        self.loading.set()
        self.go_on.wait(30)
        return super().load(inspected)


async def until(condition):
    while not condition():  # noqa: ASYNC110 -- for what a thread does there is no event
        await asyncio.sleep(0)


async def test_closing_a_runner_finishes_what_was_accepted(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    futures = [runner.submit(i) for i in range(3)]
    closing = asyncio.ensure_future(runner.aclose())
    await settle()
    with pytest.raises(aoti_sched.RunnerClosedError, match="'m' is draining"):
        runner.submit(9)
    for _ in futures:
        await aoti_backend.step()
    await closing
    assert await asyncio.gather(*futures) == [0, 1, 2]
    assert aoti_backend.containers[0].closed
    assert dict(aoti_scheduler.runners) == {}
    with pytest.raises(aoti_sched.RunnerClosedError):
        runner.submit(1)


async def test_closing_twice_and_at_once_ends_once(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    await asyncio.gather(runner.aclose(), runner.aclose(), runner.terminate())
    await runner.aclose()


async def test_a_cancelled_close_goes_on(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    future = runner.submit(1)
    closing = asyncio.ensure_future(runner.aclose())
    await settle()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await aoti_backend.step()
    assert await future == 1
    await until(lambda: aoti_backend.containers[0].closed)


async def test_a_drained_runner_can_still_be_closed(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    await runner.drain()
    await runner.drain()
    await runner.aclose()
    assert aoti_backend.containers[0].closed


async def test_a_name_is_taken_until_its_runner_is_closed(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    with pytest.raises(aoti_sched.ConfigError, match="a runner named 'm' exists"):
        await aoti_scheduler.load("m.pt2")
    other = await aoti_scheduler.load("m.pt2", name="n")
    assert set(aoti_scheduler.runners) == {"m", "n"}
    await runner.aclose()
    await aoti_scheduler.load("m.pt2")
    await other.aclose()


async def test_a_failed_load_leaves_no_trace(aoti_backend, aoti_scheduler):
    with pytest.raises(aoti_sched.PackageNotFoundError, match="no model 'm'"):
        await aoti_scheduler.load("m.pt2")
    aoti_backend.models["m"] = lambda x: x
    await aoti_scheduler.load("m.pt2")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"instances": 0}, "instances"),
        ({"threads": 0}, "threads"),
        ({"overflow": "explode"}, "overflow"),
        ({"timeout": -1.0}, "timeout"),
        ({"device": "abacus"}, "abacus"),
    ],
)
async def test_a_setting_out_of_range_is_named(aoti_scheduler, settings, text):
    with pytest.raises(aoti_sched.ConfigError, match=text):
        await aoti_scheduler.load("m.pt2", **settings)


async def test_a_load_cancelled_midway_frees_what_it_brings():
    backend = SlowBackend()
    async with fake_scheduler(backend) as scheduler:
        loading = asyncio.ensure_future(scheduler.load("m.pt2"))
        await until(backend.loading.is_set)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        backend.go_on.set()
        await until(lambda: backend.containers and backend.containers[0].closed)
        assert dict(scheduler.runners) == {}
        runner = await scheduler.load("m.pt2")
        assert await runner.run(7) == 7


async def test_a_scheduler_closed_while_loading_frees_what_the_load_brings():
    backend = SlowBackend()
    async with fake_scheduler(backend) as scheduler:
        loading = asyncio.ensure_future(scheduler.load("m.pt2"))
        await until(backend.loading.is_set)
        closing = asyncio.ensure_future(scheduler.aclose())
        await settle()
        backend.go_on.set()
        with pytest.raises(aoti_sched.RunnerClosedError, match="closed meanwhile"):
            await loading
        await closing
        assert backend.containers[0].closed


async def test_leaving_the_block_finishes_accepted_requests():
    backend = FakeBackend({"m": lambda x: x}, auto=True)
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        runner = await scheduler.load("m.pt2")
        futures = [runner.submit(i) for i in range(50)]
    assert [future.result() for future in futures] == list(range(50))


async def test_a_failing_block_fails_what_is_queued_and_waits_for_what_runs():
    backend = FakeBackend({"m": lambda x: x})
    futures = []

    async def application():
        async with Scheduler(devices={"cpu": backend}) as scheduler:
            runner = await scheduler.load("m.pt2")
            futures.extend(runner.submit(i) for i in range(3))
            raise ValueError("the application's own")

    task = asyncio.ensure_future(application())
    await backend.running(1)
    await settle()
    assert not task.done()
    backend.finish_all()
    with pytest.raises(ValueError, match="the application's own"):
        await task
    assert futures[0].result() == 0
    assert all(isinstance(f.exception(), aoti_sched.RunnerClosedError) for f in futures[1:])


async def test_a_cancelled_block_closes_everything():
    backend = FakeBackend({"m": lambda x: x}, auto=True)
    entered = asyncio.Event()

    async def application():
        async with Scheduler(devices={"cpu": backend}) as scheduler:
            await scheduler.load("m.pt2")
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(application())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.containers[0].closed
    assert backend._executor.closed


async def test_a_scheduler_may_be_entered_in_one_task_and_left_in_another():
    backend = FakeBackend({"m": lambda x: x}, auto=True)
    scheduler = Scheduler(devices={"cpu": backend})
    await asyncio.ensure_future(scheduler.__aenter__())
    runner = await scheduler.load("m.pt2")
    assert await runner.run(1) == 1
    await asyncio.ensure_future(scheduler.__aexit__(None, None, None))
    assert backend._executor.closed


async def test_a_scheduler_that_was_not_entered_or_is_closed_says_so():
    scheduler = Scheduler(devices={"cpu": FakeBackend({"m": lambda x: x}, auto=True)})
    with pytest.raises(aoti_sched.RunnerClosedError, match="async with"):
        await scheduler.load("m.pt2")
    async with scheduler:
        await scheduler.aclose()
        await scheduler.aclose()
        with pytest.raises(aoti_sched.RunnerClosedError, match="closed"):
            await scheduler.load("m.pt2")
    with pytest.raises(aoti_sched.UnsupportedLoopError, match="entered once"):
        await scheduler.__aenter__()


async def test_two_schedulers_live_side_by_side():
    async with (
        fake_scheduler(FakeBackend({"m": lambda x: x}, auto=True)) as one,
        fake_scheduler(FakeBackend({"m": lambda x: -x}, auto=True)) as two,
    ):
        a, b = await one.load("m.pt2"), await two.load("m.pt2")
        assert await asyncio.gather(a.run(1), b.run(1)) == [1, -1]


async def test_a_close_that_waits_long_is_logged(
    aoti_backend, aoti_scheduler, quiet_logs, monkeypatch
):
    monkeypatch.setattr("aoti_sched.engine.lifecycle.SLOW_CLOSE", 0.0)
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    runner.submit(1)
    closing = asyncio.ensure_future(runner.aclose())
    await until(lambda: any(e["event"].startswith("closing waits") for e in quiet_logs))
    await aoti_backend.step()
    await closing


async def test_stats_tell_of_every_device_and_runner(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    future, queued = runner.submit(1), runner.submit(2)
    device = aoti_scheduler.stats().devices["cpu"]
    assert (device.executor, device.lanes, device.busy_lanes, device.queued) == ("fake", 2, 1, 1)
    assert device.runners["m"] == runner.stats()
    assert (runner.stats().running, runner.stats().queued, runner.stats().phase) == (1, 1, "OPEN")
    assert runner.info.instances == 1
    assert aoti_scheduler.stats().rules == (
        "python" if inspect.isfunction(DeviceQueue.submit) else "compiled"
    )
    future.cancel()
    queued.cancel()
