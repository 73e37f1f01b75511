"""A request through the real front on a hand-stepped backend: results, order, timeouts,
cancellation, bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref

import pytest
import structlog

import aoti_sched
from aoti_sched import Limits, Priority, Scheduler
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


async def load(scheduler, backend, function=lambda x: x * 2, **options):
    backend.models["m"] = function
    return await scheduler.load("m.pt2", **options)


async def test_a_run_returns_what_the_model_returns(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    answer = asyncio.ensure_future(runner.run(21))
    await aoti_backend.running(1)
    await aoti_backend.step()
    assert await answer == 42


async def test_submit_queues_at_once_and_run_only_when_awaited(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    coroutine = runner.run(1)
    assert runner.stats().submitted == 0
    future = runner.submit(2)
    assert runner.stats().submitted == 1
    coroutine.close()
    future.cancel()


async def test_a_model_keeps_keywords_of_any_name_for_itself(aoti_backend, aoti_scheduler):
    runner = await load(
        aoti_scheduler, aoti_backend, lambda *, timeout, priority: (timeout, priority)
    )
    future = runner.submit(timeout="mine", priority=3)
    await aoti_backend.step()
    assert await future == ("mine", 3)


async def test_a_higher_class_overtakes_and_equals_keep_their_order(aoti_backend, aoti_scheduler):
    order = []
    runner = await load(aoti_scheduler, aoti_backend, order.append)
    runner.submit("first")
    for name, priority in [("low", 2), ("normal a", 1), ("high", 0), ("normal b", 1)]:
        runner.options(priority=Priority(priority)).submit(name)
    for _ in range(5):
        await aoti_backend.step()
    assert order == ["first", "high", "normal a", "normal b", "low"]


async def test_the_trace_tells_where_and_when(aoti_backend, aoti_clock, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    first, second = runner.submit(1), runner.submit(2)
    assert (first.trace.state, second.trace.state) == ("RUNNING", "QUEUED")
    aoti_clock.advance(2)
    await aoti_backend.step()
    aoti_clock.advance(1)
    await aoti_backend.step()
    trace = second.trace
    assert (trace.runner, trace.device, trace.state) == ("m", "cpu", "DONE")
    assert (trace.lane, trace.slot, trace.epoch) == (0, 0, 1)
    assert (trace.queued, trace.started, trace.finished) == (1000.0, 1003.0, 1003.0)
    assert trace.queue_seconds == 3.0


async def test_a_queued_request_expires_at_its_deadline(aoti_backend, aoti_clock, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    running = runner.submit(1)
    queued = runner.options(timeout=0.5).submit(2)
    aoti_clock.advance(0.5)
    with pytest.raises(TimeoutError, match=r"'m'.*0\.5 s passed while it was queued"):
        await queued
    await aoti_backend.step()
    assert await running == 2
    assert aoti_backend.running == 0


async def test_a_running_request_expires_and_its_slot_comes_home_later(
    aoti_backend, aoti_clock, aoti_scheduler
):
    runner = await load(aoti_scheduler, aoti_backend)
    slow = runner.options(timeout=0.5).submit(1)
    after = runner.submit(2)
    aoti_clock.advance(0.6)
    with pytest.raises(aoti_sched.DeadlineExceededError, match="while it was running"):
        await slow
    assert aoti_backend.running == 1, "the next one must wait for the slot"
    aoti_clock.advance(0.4)
    await aoti_backend.step()
    await aoti_backend.step()
    assert await after == 4
    assert runner.stats().expired == 1


async def test_a_timeout_of_zero_never_runs(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    with pytest.raises(aoti_sched.DeadlineExceededError):
        await runner.options(timeout=0).submit(1)
    assert aoti_backend.running == 0


async def test_the_default_timeout_of_a_model_applies_and_options_override_it(
    aoti_backend, aoti_clock, aoti_scheduler
):
    runner = await load(aoti_scheduler, aoti_backend, timeout=1.0)
    default, longer = runner.submit(1), runner.options(timeout=5).submit(2)
    aoti_clock.advance(1)
    await settle()
    assert isinstance(default.exception(), aoti_sched.DeadlineExceededError)
    assert not longer.done()
    longer.cancel()


class BusyClock(ManualClock):
    """A clock that is later each time it is read, as a real one is."""

    def time(self):
        self._now += 1e-5
        return self._now


@pytest.mark.parametrize(
    ("given", "shown"),
    [(1e-6, "1e-06"), (0, "0"), (0.1, "0.1"), (0.123456789, "0.123456789"), (30, "30")],
)
@pytest.mark.parametrize("ask", ["run", "lease"])
async def test_a_message_shows_the_timeout_that_was_given(given, shown, ask):
    clock = BusyClock()
    backend = FakeBackend({"m": lambda x: x}, clock=clock)
    async with fake_scheduler(backend, clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        async with runner.lease():
            view = runner.options(timeout=given)
            late = asyncio.ensure_future(view.run(1) if ask == "run" else view.lease().__aenter__())
            await settle()
            clock.advance(given)
            with pytest.raises(
                aoti_sched.DeadlineExceededError, match=rf"timeout of {shown} s passed while"
            ):
                await late


@pytest.mark.parametrize("given", [float("inf"), None])
async def test_a_timeout_without_an_end_is_none(aoti_backend, aoti_scheduler, given):
    runner = await load(aoti_scheduler, aoti_backend, timeout=given)
    assert runner._options.timeout is None
    assert runner.options(timeout=5).options(timeout=given)._options.timeout is None


def test_a_negative_timeout_is_refused():
    options = aoti_sched.RunnerView.options
    with pytest.raises(ValueError, match="seconds"):
        options(aoti_sched.RunnerView(None, None, None, aoti_sched.handle.Options()), timeout=-1)


async def test_cancelling_a_queued_request_frees_its_place_at_once(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend, limits=Limits(jobs=1))
    running, queued = runner.submit(1), runner.submit(2)
    queued.cancel()
    third = runner.submit(3)
    for _ in range(2):
        await aoti_backend.step()
    assert (await running, await third) == (2, 6)


async def test_cancelling_the_awaiting_task_cancels_the_request(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    blocker = runner.submit(0)
    task = asyncio.ensure_future(runner.run(1))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert runner.stats().cancelled == 1
    await aoti_backend.step()
    assert await blocker == 0


async def test_a_cancelled_running_request_drops_its_result_and_nothing_else(
    aoti_backend, aoti_scheduler
):
    runner = await load(aoti_scheduler, aoti_backend)
    gone, next_one = runner.submit(1), runner.submit(2)
    assert gone.cancel()
    assert not gone.cancel(), "it was cancelled already"
    await aoti_backend.step()
    await aoti_backend.step()
    assert gone.cancelled()
    assert await next_one == 4


async def test_wait_for_cancels_what_it_gives_up_on(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(runner.submit(1), timeout=0)
    assert runner.stats().cancelled == 1


async def test_a_failing_model_fails_its_own_request_only(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend, lambda x: 1 / x)
    bad, good = runner.submit(0), runner.submit(2)
    await aoti_backend.step()
    await aoti_backend.step()
    with pytest.raises(ZeroDivisionError):
        await bad
    assert await good == 0.5
    assert (runner.stats().failed, runner.stats().completed) == (1, 1)


async def test_a_full_queue_rejects_with_the_numbers(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend, limits=Limits(jobs=1))
    kept = [runner.submit(1), runner.submit(2)]
    with pytest.raises(
        aoti_sched.QueueFullError, match=r"'m'.*1 jobs queued, its bound is 1.*overflow='wait'"
    ):
        runner.submit(3)
    for _ in kept:
        await aoti_backend.step()
    assert await asyncio.gather(*kept) == [2, 4]


async def test_overflow_wait_holds_requests_until_there_is_room(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend, limits=Limits(jobs=1), overflow="wait")
    futures = [runner.submit(i) for i in range(5)]
    assert (runner.stats().running, runner.stats().queued, runner.stats().waiting) == (1, 1, 3)
    for _ in futures:
        await aoti_backend.step()
    assert await asyncio.gather(*futures) == [0, 2, 4, 6, 8]


async def test_a_runner_with_busy_slots_never_blocks_another():
    backend = FakeBackend({"a": lambda x: x, "b": lambda x: -x}, lanes=2)
    async with fake_scheduler(backend) as scheduler:
        a, b = await scheduler.load("a.pt2"), await scheduler.load("b.pt2")
        held = [a.submit(1), a.submit(2), a.submit(3)]
        free = b.submit(5)
        assert backend.running == 2
        await backend.step()  # a's first
        await backend.step()  # b's
        assert await free == -5
        assert not held[2].done()


async def test_finished_requests_are_not_kept_alive(aoti_backend, aoti_scheduler):
    class Thing:
        pass

    runner = await load(aoti_scheduler, aoti_backend, lambda thing: None)
    thing = Thing()
    alive = weakref.ref(thing)
    future = runner.submit(thing)
    del thing
    await aoti_backend.step()
    await future
    gc.collect()
    assert alive() is None


async def test_gather_over_many_requests_keeps_their_order(aoti_backend):
    backend = FakeBackend({"m": lambda x: x + 1}, auto=True)
    async with fake_scheduler(backend) as scheduler:
        runner = await scheduler.load("m.pt2")
        assert await asyncio.gather(*(runner.run(i) for i in range(500))) == list(range(1, 501))


async def test_requests_are_logged_only_when_asked(quiet_logs):
    for wanted in (False, True):
        backend = FakeBackend({"m": lambda x: x}, auto=True)
        config = aoti_sched.SchedulerConfig(log_requests=wanted)
        async with Scheduler(config, devices={"cpu": backend}) as scheduler:
            runner = await scheduler.load("m.pt2")
            await runner.run(1)
        assert [entry["event"] for entry in quiet_logs].count("request") == int(wanted)


async def test_a_call_from_another_loop_is_refused(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)

    async def elsewhere():
        runner.submit(1)

    with pytest.raises(aoti_sched.UnsupportedLoopError, match="another event loop"):
        await asyncio.to_thread(lambda: asyncio.run(elsewhere()))


async def test_run_blocking_serves_other_threads_and_refuses_its_own(aoti_backend, aoti_scheduler):
    runner = await load(aoti_scheduler, aoti_backend)
    aoti_backend.finish_all()
    assert await asyncio.to_thread(runner.run_blocking, 4) == 8
    with pytest.raises(aoti_sched.UnsupportedLoopError, match="wait for itself"):
        runner.run_blocking(4)


def test_under_trio_a_sentence_says_what_to_do():
    import trio

    async def main():
        async with Scheduler():
            pass

    with pytest.raises(aoti_sched.UnsupportedLoopError, match=r"asyncio.*trio.*run_blocking"):
        trio.run(main)


def test_it_runs_on_uvloop():
    import uvloop

    async def main():
        backend = FakeBackend({"m": lambda x: x * 3}, auto=True)
        async with fake_scheduler(backend) as scheduler:
            runner = await scheduler.load("m.pt2")
            return await asyncio.gather(*(runner.run(i) for i in range(100)))

    loop = uvloop.new_event_loop()
    with contextlib.closing(loop):
        assert loop.run_until_complete(main()) == [3 * i for i in range(100)]


def test_the_manual_clock_is_the_schedulers_clock():
    clock = ManualClock(5.0)
    fired = []
    clock.call_at(7.0, lambda: fired.append(clock.time()))
    clock.call_at(6.0, lambda: fired.append(clock.time()))
    clock.advance(10)
    assert fired == [6.0, 7.0]
    assert clock.time() == 15.0


async def test_a_lane_that_takes_nothing_fails_the_request_and_loses_no_slot(
    aoti_backend, aoti_scheduler, monkeypatch
):
    runner = await load(aoti_scheduler, aoti_backend)

    def refuse(lane, work):
        raise RuntimeError("this lane is gone")

    with monkeypatch.context() as patch:
        patch.setattr(aoti_backend._executor, "submit", refuse)
        future = runner.submit(1)
        with pytest.raises(RuntimeError, match="this lane is gone"):
            await future
    assert (runner.stats().failed, runner.stats().free_slots) == (1, 1)
    again = runner.submit(2)
    await aoti_backend.step()
    assert await again == 4
