"""Whatever is cancelled, times out or is left at any moment: the device's work comes home and
nothing hangs.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from contextlib import asynccontextmanager

import anyio
import pytest
import torch
import trio
import uvloop
from torch.testing import assert_close

from aoti_sched import (
    DeadlineExceededError,
    Limits,
    RunError,
    Runner,
    RunnerClosedError,
    Scheduler,
    UnsupportedLoopError,
)
from aoti_sched.backends.aoti.raw_container import RawContainer
from aoti_sched.engine import prepare as loading
from tests.compiled.conftest import EXECUTORS, living_lanes
from tests.models import build
from tests.models.definitions import DEFINITIONS

HEAVY = DEFINITIONS["heavy"]()
LIGHT = DEFINITIONS["mlp"]()
X = LIGHT.args[0]


def open_containers() -> set[RawContainer]:
    gc.collect()
    return {
        each for each in gc.get_objects() if type(each) is RawContainer and each._handle is not None
    }


@pytest.fixture(
    params=[(loop, executor) for executor in EXECUTORS for loop in ("asyncio", "uvloop")],
    ids="-".join,
)
def run(request, monkeypatch):
    """Runs a coroutine on either loop and executor; afterwards no container and no lane is left."""
    loop, executor = request.param
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", executor)

    def run(main):
        before = open_containers()
        {"asyncio": asyncio.run, "uvloop": uvloop.run}[loop](main)
        assert open_containers() <= before
        assert living_lanes() == []

    return run


@asynccontextmanager
async def serving(**settings):
    """A scheduler with the heavy and the light model."""
    async with Scheduler() as scheduler:
        heavy = await scheduler.load(build("heavy").path, name="heavy", warmup=False, **settings)
        light = await scheduler.load(build("mlp").path, name="light")
        yield scheduler, heavy, light


async def serves_on(*runners: Runner) -> None:
    """All that was accepted is through, every slot is home, and the next answers are right."""
    for runner in runners:
        built = HEAVY if runner.name == "heavy" else LIGHT
        loose = {"atol": 1e-4, "rtol": 1e-3}
        assert_close(await runner.run(*built.args), built.module()(*built.args), **loose)
        stats = runner.stats()
        assert (stats.waiting, stats.queued, stats.queued_bytes, stats.running) == (0, 0, 0, 0)
        assert (stats.held_leases, stats.free_slots) == (0, runner.info.instances)


def lanes(scheduler: Scheduler) -> int:
    return scheduler.stats().devices["cpu"].busy_lanes


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_cancelled_in_the_queue_leaves_at_once(run):
    async def main():
        async with serving() as (_, heavy, light):
            first, second, third = (heavy.submit(*HEAVY.args) for _ in range(3))
            assert second.cancel()
            assert second.trace.state == "CANCELLED"
            assert heavy.stats().queued == 1
            await asyncio.gather(first, third)
            assert heavy.stats().cancelled == 1
            assert heavy.stats().wasted_seconds == 0
            await serves_on(heavy, light)

    run(main())


def test_a_run_cancelled_on_its_lane_lets_the_caller_go_and_comes_home_later(run):
    async def main():
        async with serving() as (scheduler, heavy, light):
            task = asyncio.create_task(heavy.run(*HEAVY.args))
            await asyncio.sleep(0)
            assert heavy.stats().running == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert heavy.stats().running == 1  # the lane can't be called back
            assert lanes(scheduler) == 1
            await serves_on(heavy, light)
            assert heavy.stats().cancelled == 1
            assert heavy.stats().wasted_seconds > 0
            assert lanes(scheduler) == 0

    run(main())


def test_a_run_cancelled_in_the_moment_of_its_completion_is_cancelled_or_done(run):
    async def main():
        async with serving() as (_, heavy, light):
            future = light.submit(X)
            task = asyncio.create_task(asyncio.wait([future]))
            future.add_done_callback(lambda _: task.cancel())
            with pytest.raises(asyncio.CancelledError):
                await task
            assert_close(future.result(), LIGHT.module()(X))
            assert not future.cancel()
            await serves_on(light, heavy)

    run(main())


def test_many_runs_cancelled_at_every_stage_leave_nothing(run):
    async def main():
        async with serving() as (scheduler, heavy, light):
            for turns in range(12):
                tasks = [
                    asyncio.create_task(r.run(*b.args))
                    for r, b in ((heavy, HEAVY), (light, LIGHT)) * 2
                ]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(result, (asyncio.CancelledError, torch.Tensor))
            await serves_on(heavy, light)
            assert lanes(scheduler) == 0

    run(main())


def test_a_run_that_waits_for_room_can_be_cancelled(run):
    async def main():
        async with serving(limits=Limits(jobs=1), overflow="wait") as (_, heavy, light):
            futures = [heavy.submit(*HEAVY.args) for _ in range(4)]
            assert heavy.stats().waiting == 2
            futures[3].cancel()
            futures[2].cancel()
            assert heavy.stats().waiting == 0
            await asyncio.gather(*futures[:2])
            await serves_on(heavy, light)

    run(main())


def test_gather_wait_and_as_completed_take_run_futures(run):
    async def main():
        async with serving() as (_, heavy, light):
            expected = LIGHT.module()(X)
            futures = [light.submit(X) for _ in range(10)]
            assert_close(await asyncio.gather(*futures), [expected] * 10)
            for next_one in asyncio.as_completed([light.submit(X) for _ in range(10)]):
                assert_close(await next_one, expected)
            slow = heavy.submit(*HEAVY.args)
            slower = heavy.submit(*HEAVY.args)
            done, pending = await asyncio.wait([slow, slower], return_when=asyncio.FIRST_COMPLETED)
            assert (done, pending) == ({slow}, {slower})
            await slower
            await serves_on(heavy, light)

    run(main())


def test_a_cancelled_gather_cancels_what_it_waits_for(run):
    async def main():
        async with serving() as (_, heavy, light):
            futures = [heavy.submit(*HEAVY.args) for _ in range(5)]
            gathered = asyncio.gather(*futures)
            gathered.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gathered
            assert all(future.cancelled() for future in futures)
            assert heavy.stats().queued == 0
            await serves_on(heavy, light)

    run(main())


def test_one_failure_in_a_gather_leaves_the_others_alone(run):
    async def main():
        built = build("failing")
        async with serving() as (scheduler, heavy, light):
            failing = await scheduler.load(built.path, name="failing")
            good, bad, light_one = await asyncio.gather(
                failing.run(*built.args),
                failing.run(torch.tensor([99])),
                light.run(X),
                return_exceptions=True,
            )
            assert_close((good, light_one), (built.module()(*built.args), LIGHT.module()(X)))
            assert isinstance(bad, RunError)
            await serves_on(heavy, light)

    run(main())


# --- timeouts -------------------------------------------------------------------------------------


def test_a_timeout_on_the_lane_frees_the_caller_and_the_lane_comes_home(run):
    async def main():
        async with serving() as (scheduler, heavy, light):
            future = heavy.options(timeout=0.001).submit(*HEAVY.args)
            assert future.trace.state == "RUNNING"
            with pytest.raises(
                DeadlineExceededError, match="passed while it was running"
            ) as caught:
                await future
            assert isinstance(caught.value, TimeoutError)
            assert lanes(scheduler) == 1
            await serves_on(heavy, light)
            assert heavy.stats().expired == 1
            assert lanes(scheduler) == 0

    run(main())


def test_a_timeout_in_the_queue_takes_the_run_out(run):
    async def main():
        async with serving() as (_, heavy, light):
            running = heavy.submit(*HEAVY.args)
            queued = heavy.options(timeout=0.001).submit(*HEAVY.args)
            with pytest.raises(DeadlineExceededError, match="while it was queued"):
                await queued
            assert heavy.stats().queued == 0
            assert not running.done()
            await running
            await serves_on(heavy, light)

    run(main())


def test_a_timeout_that_has_passed_already_never_runs(run):
    async def main():
        async with serving() as (_, heavy, light):
            with pytest.raises(DeadlineExceededError):
                await light.options(timeout=0).run(X)
            assert light.stats().run_seconds == 0
            await serves_on(heavy, light)

    run(main())


def test_a_runners_own_timeout_holds_for_every_request(run):
    async def main():
        async with serving(timeout=0.001) as (_, heavy, light):
            with pytest.raises(DeadlineExceededError):
                await heavy.run(*HEAVY.args)
            await heavy.options(timeout=600).run(*HEAVY.args)
            await serves_on(light)

    run(main())


def test_asyncios_own_timeouts_work(run):
    async def main():
        async with serving() as (_, heavy, light):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(heavy.run(*HEAVY.args), 0.001)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(heavy.submit(*HEAVY.args), 0.001)
            assert heavy.stats().cancelled == 2
            await serves_on(heavy, light)

    run(main())


def test_anyios_cancel_scopes_work(run):
    async def main():
        async with serving() as (_, heavy, light):
            with anyio.move_on_after(0.001) as scope:
                await heavy.run(*HEAVY.args)
            assert scope.cancelled_caught
            with anyio.move_on_after(0.001) as scope:
                async with heavy.lease() as lease:
                    while True:
                        await lease.run(*HEAVY.args)
            assert scope.cancelled_caught
            await serves_on(heavy, light)

    run(main())


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_cancelled_while_it_waits_is_not_granted(run):
    async def main():
        async with serving() as (_, heavy, light):
            running = heavy.submit(*HEAVY.args)
            task = asyncio.create_task(heavy.lease().__aenter__())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await running
            await serves_on(heavy, light)

    run(main())


def test_a_lease_that_times_out_while_it_waits_is_not_granted(run):
    async def main():
        async with serving() as (_, heavy, light):
            running = heavy.submit(*HEAVY.args)
            with pytest.raises(DeadlineExceededError, match="while it was waiting for a lease"):
                async with heavy.options(timeout=0.001).lease():
                    raise AssertionError("it was granted")
            await running
            await serves_on(heavy, light)

    run(main())


def test_a_holder_cancelled_in_a_run_gives_its_slot_back(run):
    async def main():
        async with serving() as (_, heavy, light):
            held = asyncio.Event()

            async def hold():
                async with heavy.lease() as lease:
                    held.set()
                    while True:
                        await lease.run(*HEAVY.args)

            task = asyncio.create_task(hold())
            await held.wait()
            assert heavy.stats().running == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await serves_on(heavy, light)

    run(main())


def test_holders_cancelled_at_every_stage_leave_nothing(run):
    async def main():
        async with serving() as (_, heavy, light):

            async def hold():
                async with light.lease() as lease:
                    return [await lease.run(X) for _ in range(3)]

            for turns in range(20):
                tasks = [asyncio.create_task(hold()) for _ in range(3)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await serves_on(light, heavy)

    run(main())


# --- loading and closing --------------------------------------------------------------------------


def test_a_load_cancelled_at_any_turn_leaves_its_name_free(run):
    async def main():
        async with Scheduler() as scheduler:
            for turns in range(12):
                task = asyncio.create_task(scheduler.load(build("mlp").path, name="light"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not scheduler.runners
            runner = await scheduler.load(build("mlp").path, name="light")
            await serves_on(runner)

    run(main())


def test_a_load_cancelled_in_its_thread_frees_the_model_there(run, monkeypatch):
    reached, proceed, prepared = threading.Event(), threading.Event(), []
    prepare = loading.prepare

    def held(*args, **kwargs):
        prepared.append(prepare(*args, **kwargs))
        reached.set()
        proceed.wait()
        return prepared[-1]

    async def main():
        async with Scheduler() as scheduler:
            with monkeypatch.context() as patch:
                patch.setattr(loading, "prepare", held)
                task = asyncio.create_task(scheduler.load(build("mlp").path, name="light"))
                await asyncio.to_thread(reached.wait)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            again = await scheduler.load(build("mlp").path, name="light")
            proceed.set()
            await serves_on(again)
        assert prepared[0].container._raw._handle is None

    run(main())


def test_a_load_cancelled_in_the_moment_it_succeeds_leaves_no_runner(run, monkeypatch):
    async def main():
        async with Scheduler() as scheduler:
            open_runner = scheduler._open_runner

            def cancelled_meanwhile(*args):
                runner = open_runner(*args)
                task.cancel()
                return runner

            with monkeypatch.context() as patch:
                patch.setattr(scheduler, "_open_runner", cancelled_meanwhile)
                task = asyncio.create_task(scheduler.load(build("mlp").path, name="light"))
                with pytest.raises(asyncio.CancelledError):
                    await task
            runner = await scheduler.load(build("mlp").path, name="light")
            await serves_on(runner)
            assert list(scheduler.runners) == ["light"]

    run(main())


def test_a_load_that_is_on_its_way_when_the_scheduler_closes_is_refused_and_freed(run):
    async def main():
        async with Scheduler() as scheduler:
            task = asyncio.create_task(scheduler.load(build("mlp").path))
            await asyncio.sleep(0)
        with pytest.raises(RunnerClosedError, match="closed meanwhile"):
            await task

    run(main())


@pytest.mark.parametrize("close", ["aclose", "terminate", "drain"])
def test_a_close_that_is_cancelled_goes_on(run, close):
    async def main():
        async with serving() as (_, heavy, light):
            futures = [heavy.submit(*HEAVY.args) for _ in range(3)]
            task = asyncio.create_task(getattr(heavy, close)())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(RunnerClosedError):
                heavy.submit(*HEAVY.args)
            await heavy.aclose()
            results = await asyncio.gather(*futures, return_exceptions=True)
            closed = [isinstance(result, RunnerClosedError) for result in results]
            assert closed == ([False, True, True] if close == "terminate" else [False] * 3)
            await serves_on(light)

    run(main())


def test_a_cancelled_close_of_the_scheduler_goes_on(run):
    async def main():
        async with serving() as (scheduler, heavy, _):
            futures = [heavy.submit(*HEAVY.args) for _ in range(3)]
            task = asyncio.create_task(scheduler.aclose())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.gather(*futures)
        assert not scheduler.runners

    run(main())


def test_closes_of_the_scheduler_at_once_wait_for_the_same_end(run):
    async def main():
        async with serving() as (scheduler, heavy, _):
            futures = [heavy.submit(*HEAVY.args) for _ in range(3)]

            async def close():
                await scheduler.aclose()
                assert all(future.done() for future in futures)
                assert not scheduler.runners
                assert not scheduler._devices.dispatchers

            await asyncio.gather(close(), heavy.aclose(), close())
            await close()

    run(main())


def test_terminating_a_scheduler_that_closes_fails_what_is_still_queued(run):
    async def main():
        async with serving() as (scheduler, heavy, _):
            futures = [heavy.submit(*HEAVY.args) for _ in range(3)]
            closing = asyncio.create_task(scheduler.aclose())
            await asyncio.sleep(0)
            await scheduler.terminate()
            await closing
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [isinstance(result, RunnerClosedError) for result in results] == [False, True, True]

    run(main())


def test_a_task_cancelled_on_its_way_out_of_the_block_waits_for_the_close(run):
    async def main():
        futures, schedulers, leaving = [], [], asyncio.Event()

        async def application():
            async with serving() as (scheduler, heavy, _):
                futures.extend(heavy.submit(*HEAVY.args) for _ in range(3))
                schedulers.append(scheduler)
                leaving.set()

        task = asyncio.create_task(application())
        await leaving.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(future.done() for future in futures)
        assert not schedulers[0].runners

    run(main())


def test_an_anyio_scope_cancelled_around_the_block_waits_for_the_close(run):
    async def main():
        with anyio.move_on_after(10) as scope:
            async with serving() as (scheduler, heavy, _):
                futures = [heavy.submit(*HEAVY.args) for _ in range(3)]
                scope.cancel()
        assert all(future.done() for future in futures)
        assert not scheduler.runners
        assert living_lanes() == []

    run(main())


def test_leaving_the_block_finishes_what_was_accepted(run):
    async def main():
        async with serving() as (_, heavy, light):
            futures = [heavy.submit(*HEAVY.args), heavy.submit(*HEAVY.args), light.submit(X)]
        assert all(future.done() for future in futures)
        assert_close(futures[2].result(), LIGHT.module()(X))
        with pytest.raises(RunnerClosedError):
            light.submit(X)

    run(main())


def test_a_block_that_fails_finishes_what_runs_and_refuses_what_waits(run):
    async def main():
        futures = []

        async def application():
            async with serving() as (_, heavy, _):
                futures.extend(heavy.submit(*HEAVY.args) for _ in range(2))
                raise KeyError("the application's own")

        with pytest.raises(KeyError):
            await application()
        running, waiting = futures
        assert running.result().shape == HEAVY.args[0].shape
        with pytest.raises(RunnerClosedError, match="terminated"):
            await waiting

    run(main())


# --- threads and loops ----------------------------------------------------------------------------


def test_other_threads_run_blocking(run):
    async def main():
        async with serving() as (_, heavy, light):
            results = await asyncio.gather(
                *(asyncio.to_thread(light.run_blocking, X) for _ in range(16))
            )
            assert_close(results, [LIGHT.module()(X)] * 16)
            with pytest.raises(DeadlineExceededError):
                await asyncio.to_thread(heavy.options(timeout=0.001).run_blocking, *HEAVY.args)
            with pytest.raises(ValueError, match="input 'x'"):
                await asyncio.to_thread(light.run_blocking, X.double())
            await serves_on(heavy, light)

    run(main())


def test_run_blocking_on_the_loops_own_thread_is_refused(run):
    async def main():
        async with serving() as (_, heavy, light):
            with pytest.raises(UnsupportedLoopError, match="use `await runner"):
                light.run_blocking(X)
            await serves_on(heavy, light)

    run(main())


def test_run_blocking_after_the_loop_is_gone_is_refused(run):
    runners = []

    async def main():
        async with serving() as (_, _, light):
            runners.append(light)

    run(main())
    with pytest.raises(RunnerClosedError, match="the scheduler is closed"):
        runners[0].run_blocking(X)


def test_submit_from_another_thread_or_loop_is_refused(run):
    async def main():
        async with serving() as (_, heavy, light):

            async def elsewhere():
                light.submit(X)

            for call in (lambda: light.submit(X), lambda: asyncio.run(elsewhere())):
                with pytest.raises(UnsupportedLoopError, match="belongs to another event loop"):
                    await asyncio.to_thread(call)
            await serves_on(heavy, light)

    run(main())


def test_trio_is_told_what_to_do():
    async def main():
        async with Scheduler():
            pass

    sentence = (
        r"runs on asyncio \(and uvloop\).*[Uu]nder trio, run the scheduler in an asyncio thread"
    )
    with pytest.raises(UnsupportedLoopError, match=sentence):
        trio.run(main)


# --- the end of the process -----------------------------------------------------------------------

PROGRAM = """
import asyncio, atexit, sys, threading, uvloop, aoti_sched
from tests.models import build

heavy, light = build("heavy"), build("mlp")

async def load(scheduler):
    return await scheduler.load(heavy.path, warmup=False)

async def left_open():
    scheduler = aoti_sched.Scheduler()
    await scheduler.__aenter__()
    runner = await load(scheduler)
    return [runner.submit(*heavy.args) for _ in range(5)]

async def exits():
    async with aoti_sched.Scheduler() as scheduler:
        runner = await load(scheduler)
        futures = [runner.submit(*heavy.args) for _ in range(5)]
        sys.exit(3)

async def loading():
    scheduler = aoti_sched.Scheduler()
    await scheduler.__aenter__()
    task = asyncio.ensure_future(load(scheduler))
    for _ in range(3):
        await asyncio.sleep(0)

def in_thread():
    ready = threading.Event()
    async def main():
        futures = await left_open()
        ready.set()
        await asyncio.Event().wait()
    threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
    ready.wait()

def blocked():
    runners, ready = [], threading.Event()
    async def main():
        scheduler = aoti_sched.Scheduler()
        await scheduler.__aenter__()
        runners.append(await load(scheduler))
        ready.set()
        await asyncio.Event().wait()
    threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
    ready.wait()
    threading.Thread(target=runners[0].run_blocking, args=heavy.args, daemon=True).start()

def serving(*, closes=False):
    ready = threading.Event()
    async def main():
        async with aoti_sched.Scheduler() as scheduler:
            runner = await scheduler.load(light.path)
            if closes:
                loop = asyncio.get_running_loop()
                close = lambda: asyncio.run_coroutine_threadsafe(scheduler.aclose(), loop).result()
                atexit.register(close)
            ready.set()
            while True:
                await runner.run(*light.args)
    threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
    ready.wait()

def closes():
    serving(closes=True)

kind, loop = sys.argv[1:]
way = globals()[kind]
if asyncio.iscoroutinefunction(way):
    {"asyncio": asyncio.run, "uvloop": uvloop.run}[loop](way())
else:
    way()
"""


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("way", "loop"),
    [("left_open", "asyncio"), ("left_open", "uvloop"), ("exits", "asyncio"), ("exits", "uvloop"),
     ("loading", "asyncio"), ("in_thread", "asyncio"), ("blocked", "asyncio"),
     ("serving", "asyncio"), ("closes", "asyncio")],
)  # fmt: skip
def test_a_process_that_ends_with_work_in_flight_neither_hangs_nor_crashes(
    python, way, loop, executor
):
    process = python(PROGRAM, way, loop, AOTI_SCHED_EXECUTOR=executor)
    assert process.returncode == (3 if way == "exits" else 0), process.stderr
    assert "Fatal Python error" not in process.stderr
