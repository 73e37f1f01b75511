"""`run_blocking`: whatever becomes of the event loop, a thread that waits ends, with the result
or an error of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog
import uvloop

from aoti_sched import DeadlineExceededError, RunnerClosedError, Scheduler, UnsupportedLoopError
from aoti_sched.runner import router_of
from aoti_sched.testing import FakeBackend, settle
from tests.native.library import ROOT

FOREVER = 30.0
"""Seconds after which a test that waits in vain fails; no test that passes comes near."""

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture(params=LOOPS)
def loop(request):
    loop = LOOPS[request.param]()
    yield loop
    if not loop.is_closed():
        with contextlib.suppress(RuntimeError):
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(settle())
        loop.close()


class Caller:
    """A thread that calls, and what came of it. A daemon, so that a failing test ends."""

    def __init__(self, function, *args):
        self.outcome = None
        self._thread = threading.Thread(target=self._call, args=(function, *args), daemon=True)
        self._thread.start()

    def _call(self, function, *args):
        try:
            self.outcome = function(*args)
        except BaseException as error:  # noqa: BLE001 -- the test looks at it
            self.outcome = error

    def end(self):
        self._thread.join(FOREVER)
        assert not self._thread.is_alive(), "the thread still waits"
        return self.outcome


async def open_runner(backend, **options):
    """A runner whose scheduler nobody closes."""
    scheduler = Scheduler(devices={"cpu": backend})
    await scheduler.__aenter__()
    return scheduler, await scheduler.load("m.pt2", **options)


async def until(condition):
    while not condition():  # noqa: ASYNC110 -- for what a thread does there is no event
        await asyncio.sleep(0)


@pytest.fixture
def backend():
    return FakeBackend({"m": lambda x: x * 2})


def is_closed_error(error, text):
    assert isinstance(error, RunnerClosedError), repr(error)
    assert text in str(error)
    return True


# --- the loop stops, or is closed -----------------------------------------------------------------


def test_a_loop_that_stops_ends_the_threads_that_wait(loop, backend):
    async def main():
        _, runner = await open_runner(backend)
        callers = [Caller(runner.run_blocking, i) for i in range(3)]
        await until(lambda: runner.stats().submitted == 3)
        return callers

    callers = loop.run_until_complete(main())
    assert all(is_closed_error(caller.end(), "event loop stopped") for caller in callers)


def test_each_time_that_the_loop_stops_counts(loop, backend):
    scheduler, runner = loop.run_until_complete(open_runner(backend))
    for i in range(3):

        async def main(i=i):
            caller = Caller(runner.run_blocking, i)
            await until(lambda: runner.stats().submitted > i)
            return caller

        is_closed_error(loop.run_until_complete(main()).end(), "event loop stopped")
    backend.finish_all()  # what ran ends, and no thread wants it
    # Nothing is lost: the loop runs again, and so does the runner.

    async def again():
        assert await asyncio.to_thread(runner.run_blocking, 21) == 42
        stats = runner.stats()
        await scheduler.aclose()
        return stats

    stats = loop.run_until_complete(again())
    assert (stats.submitted, stats.queued, stats.running) == (4, 0, 0)


def test_what_was_queued_when_the_loop_stopped_is_cancelled_when_it_goes_on(loop, backend):
    async def main():
        scheduler, runner = await open_runner(backend)
        callers = [Caller(runner.run_blocking, i) for i in range(5)]
        await until(lambda: runner.stats().submitted == 5)
        return scheduler, runner, callers

    scheduler, runner, callers = loop.run_until_complete(main())
    for caller in callers:
        is_closed_error(caller.end(), "event loop stopped")

    async def after():
        await settle()
        assert runner.stats().queued == 0
        assert runner.stats().cancelled == 5
        backend.finish_all()
        await scheduler.aclose()

    loop.run_until_complete(after())


def test_a_request_that_a_stopped_loop_never_took_is_refused(loop, backend):
    """The loop stops in the very turn in which the thread hands its request over."""

    async def main():
        _, runner = await open_runner(backend)
        handed = threading.Event()
        hand_over = loop.call_soon_threadsafe

        class Loop:
            """Says when the request lies with the loop."""

            def __getattr__(self, name):
                return getattr(loop, name)

            def call_soon_threadsafe(self, *args):
                hand_over(*args)
                handed.set()

        router_of(runner).blocking.loop = Loop()
        caller = Caller(runner.run_blocking, 1)
        assert handed.wait(FOREVER)  # this turn of the loop is the last one
        loop.stop()
        return caller

    task = loop.create_task(main())
    loop.run_forever()
    while not task.done():
        loop.run_forever()
    is_closed_error(task.result().end(), "event loop")


def test_an_open_loop_that_does_not_run_refuses_at_once(loop, backend):
    _, runner = loop.run_until_complete(open_runner(backend))
    is_closed_error(Caller(runner.run_blocking, 1).end(), "event loop is not running")
    is_closed_error(
        Caller(runner.options(timeout=60).run_blocking, 1).end(), "event loop is not running"
    )


def test_a_closed_loop_refuses_at_once(loop, backend):
    _, runner = loop.run_until_complete(open_runner(backend))
    loop.close()
    is_closed_error(Caller(runner.run_blocking, 1).end(), "event loop is closed")
    gc.collect()  # the housekeeping task goes with its loop


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("closes", [True, False])
def test_threads_that_call_one_item_after_the_other_end_with_the_loop(run, closes):
    backend = FakeBackend({"m": lambda x: x * 2}, auto=True)
    served = threading.Semaphore(0)

    def work(runner):
        for item in range(1_000_000):
            try:
                assert runner.run_blocking(item) == 2 * item
            except RunnerClosedError:
                return "refused"
            served.release()
        return "never refused"

    async def main(pool):
        scheduler, runner = await open_runner(backend)
        calls = [pool.submit(work, runner) for _ in range(6)]
        await asyncio.to_thread(lambda: [served.acquire(timeout=FOREVER) for _ in range(60)])
        if closes:
            await scheduler.aclose()
        return calls

    pool = ThreadPoolExecutor(6)
    calls = run(main(pool))
    assert [call.result(FOREVER) for call in calls] == ["refused"] * 6
    pool.shutdown()


def test_a_loop_in_a_thread_that_dies_of_an_error_ends_the_callers(backend):
    ready, fail = threading.Event(), threading.Event()
    runners = []

    async def main():
        runners.append((await open_runner(backend))[1])
        ready.set()
        await asyncio.to_thread(fail.wait)
        raise OSError("the application's own")

    def serve():
        with pytest.raises(OSError, match="own"):
            asyncio.run(main())

    server = threading.Thread(target=serve)
    server.start()
    assert ready.wait(FOREVER)
    caller = Caller(runners[0].run_blocking, 1)
    fail.set()
    is_closed_error(caller.end(), "event loop")
    server.join(FOREVER)


# --- the scheduler is closed ----------------------------------------------------------------------


async def test_a_closed_scheduler_has_served_what_it_accepted_and_refuses_the_rest(backend):
    scheduler, runner = await open_runner(backend)
    first = Caller(runner.run_blocking, 1)
    await backend.running(1)
    closing = asyncio.ensure_future(scheduler.aclose())
    await settle()
    late = Caller(runner.run_blocking, 2)
    await asyncio.to_thread(late.end)
    is_closed_error(late.outcome, "draining")
    backend.finish_all()
    await closing
    assert await asyncio.to_thread(first.end) == 2
    is_closed_error(
        await asyncio.to_thread(Caller(runner.run_blocking, 3).end), "scheduler is closed"
    )


async def test_terminating_fails_the_threads_whose_requests_are_queued(backend):
    scheduler, runner = await open_runner(backend)
    callers = [Caller(runner.run_blocking, i) for i in range(4)]
    await until(lambda: runner.stats().submitted == 4)
    closing = asyncio.ensure_future(scheduler.terminate())
    await settle()
    backend.finish_all()
    await closing
    outcomes = [await asyncio.to_thread(caller.end) for caller in callers]
    assert sum(isinstance(outcome, RunnerClosedError) for outcome in outcomes) == len(outcomes) - 1


# --- deadlines ------------------------------------------------------------------------------------


async def test_the_deadline_fires_in_the_thread_while_the_loop_is_blocked(backend):
    scheduler, runner = await open_runner(backend)
    caller = Caller(runner.options(timeout=0.01).run_blocking, 1)
    error = caller.end()  # on the loop's own thread: nothing else can run
    assert isinstance(error, DeadlineExceededError)
    assert "timeout of 0.01 s" in str(error)
    await settle()
    assert runner.stats().submitted == 0  # it had ended before the loop could take it
    await scheduler.aclose()


async def test_a_deadline_counts_from_the_call_in_the_thread(backend):
    scheduler, runner = await open_runner(backend)
    began = time.monotonic()
    caller = Caller(runner.options(timeout=0.05).run_blocking, 1)
    await backend.running(1)
    error = await asyncio.to_thread(caller.end)
    assert isinstance(error, DeadlineExceededError)
    assert time.monotonic() - began >= 0.05
    await until(lambda: runner.stats().expired)
    backend.finish_all()
    await scheduler.aclose()


async def test_an_endless_timeout_is_none(backend):
    scheduler, runner = await open_runner(backend)
    backend.finish_all()
    for timeout in (float("inf"), 1e300):
        assert await asyncio.to_thread(runner.options(timeout=timeout).run_blocking, 4) == 8
    await scheduler.aclose()


async def test_a_clock_set_by_hand_expires_calls_of_threads_too(
    aoti_backend, aoti_scheduler, aoti_clock
):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    caller = Caller(runner.options(timeout=5).run_blocking, 1)
    await aoti_backend.running(1)
    aoti_clock.advance(6)
    assert isinstance(await asyncio.to_thread(caller.end), DeadlineExceededError)
    await aoti_backend.step()


# --- the process ----------------------------------------------------------------------------------


def run_program(lines):
    program = textwrap.dedent(PRELUDE) + textwrap.dedent(lines)
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env={**os.environ},
    )  # fmt: skip


PRELUDE = """
import asyncio, os, signal, sys, threading
import aoti_sched
from aoti_sched.testing import FakeBackend
from aoti_sched.runner import router_of

ready, runners = threading.Event(), []
backend = FakeBackend({"m": lambda x: x * 2}, auto=True)

async def main():
    async with aoti_sched.Scheduler(devices={"cpu": backend}) as scheduler:
        runners.append(await scheduler.load("m.pt2"))
        ready.set()
        await asyncio.Event().wait()

threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
ready.wait()
"""


def test_a_forked_child_is_refused():
    lines = """
    assert runners[0].run_blocking(1) == 2
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for call in (runners[0], runners[0].options(timeout=1)):
            try:
                call.run_blocking(1)
            except aoti_sched.UnsupportedLoopError as error:
                print(error, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert runners[0].run_blocking(1) == 2
    sys.exit(os.waitstatus_to_exitcode(status))
    """
    process = run_program(lines)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("the process was forked") == 2


def test_a_forked_child_whose_loop_runs_is_refused_in_its_threads_too():
    lines = """
    async def forks():
        backend = FakeBackend({"m": lambda x: x}, auto=True)
        async with aoti_sched.Scheduler(devices={"cpu": backend}) as scheduler:
            runner = await scheduler.load("m.pt2")
            child = os.fork()
            if child:
                _, status = os.waitpid(child, 0)
                return os.waitstatus_to_exitcode(status)
            signal.alarm(20)
            refused = []
            def call():
                try:
                    runner.run_blocking(1)
                except aoti_sched.UnsupportedLoopError:
                    refused.append(True)
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            os._exit(0 if refused else 1)
    sys.exit(asyncio.run(forks()))
    """
    process = run_program(lines)
    assert process.returncode == 0, process.stderr


def test_a_process_ends_while_pool_threads_call_into_a_loop_that_has_ended():
    lines = """
    from concurrent.futures import ThreadPoolExecutor
    pool, started = ThreadPoolExecutor(6), threading.Semaphore(0)

    def work(runner):
        while True:
            started.release()
            try:
                runner.run_blocking(1)
            except aoti_sched.RunnerClosedError:
                return

    async def crashes():
        scheduler = aoti_sched.Scheduler(devices={"cpu": FakeBackend({"m": lambda x: x})})
        await scheduler.__aenter__()
        runner = await scheduler.load("m.pt2")
        for _ in range(6):
            pool.submit(work, runner)
        await asyncio.to_thread(lambda: [started.acquire() for _ in range(6)])
        raise SystemExit(7)

    asyncio.run(crashes())
    """
    process = run_program(lines)
    assert process.returncode == 7, process.stderr


def test_ctrl_c_in_the_waiting_thread_takes_the_request_back():
    lines = """
    backend.finish_all()

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)

    async def slow():
        slow_backend = FakeBackend({"m": lambda x: x})
        async with aoti_sched.Scheduler(devices={"cpu": slow_backend}) as scheduler:
            runner = await scheduler.load("m.pt2")
            runners.append(runner)
            ready.set()
            await slow_backend.running(1)
            # More than once: a thread does not wake for a signal that comes just before it waits.
            while not runner.stats().cancelled:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0)
            slow_backend.finish_all()

    ready.clear()
    thread = threading.Thread(target=asyncio.run, args=(slow(),))
    thread.start()
    ready.wait()
    try:
        runners[-1].run_blocking(1)
    except KeyboardInterrupt:
        thread.join()
        print("taken back")
    """
    process = run_program(lines)
    assert process.stdout == "taken back\n", process.stderr


def test_calls_leave_nothing_behind(backend):
    """With the collector off, no argument outlives its call."""
    backend.models["m"] = lambda x: None

    class Argument:
        pass

    alive = weakref.WeakSet()

    def argument():
        alive.add(one := Argument())
        return one

    def refused(runner):
        with pytest.raises(RunnerClosedError):
            runner.run_blocking(argument())

    async def main():
        scheduler, runner = await open_runner(backend)
        backend.finish_all()
        for _ in range(20):
            await asyncio.to_thread(lambda: runner.run_blocking(argument()))
        await runner.drain()
        for _ in range(20):
            await asyncio.to_thread(refused, runner)
        left = len(alive)
        await scheduler.aclose()
        return left

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(main()) == 0
    finally:
        gc.enable()


def test_the_loops_own_thread_is_refused(loop, backend):
    async def main():
        _, runner = await open_runner(backend)
        with pytest.raises(UnsupportedLoopError, match="own thread"):
            runner.run_blocking(1)

    loop.run_until_complete(main())
