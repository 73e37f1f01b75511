"""Descriptors, threads and memory: none is kept by what is closed, and where they are exhausted
each operation says so.

The lanes are real ones, of both kinds; the models on them are Python functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import threading
import weakref
from pathlib import Path

import pytest
import structlog

import aoti_sched
from aoti_sched import AotiSchedError, ResourcesError, Scheduler
from aoti_sched.backends.executors import threads, wakeup_fd
from aoti_sched.backends.executors.choose import open_executor
from aoti_sched.testing import FakeBackend
from tests.inside import replica_of
from tests.unit.engine.support import until

EXECUTORS = ["native", "threads"]


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    if request.param == "native":
        pytest.importorskip("aoti_sched.backends.native._native")
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    return request.param


class Lanes(FakeBackend):
    """Python functions on real lanes."""

    def __init__(self):
        super().__init__({"m": lambda x: x * 2}, weights={"m": {"w": 1}})

    def open_executor(self, lanes, affinity=None, launchers=None, wait=None):
        return open_executor("cpu", lanes, 2, lambda count: None, affinity, launchers=launchers)


@contextlib.contextmanager
def without_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def descriptors():
    return len([*Path("/proc/self/fd").iterdir()])


def lane_threads():
    return sum(thread.name.startswith("aoti:") for thread in threading.enumerate())


def tasks():
    """Threads of the process, native ones included."""
    return len([*Path("/proc/self/task").iterdir()])


async def life(backend):
    """Everything that opens something; returns weak references to what owns it."""
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        runner = await scheduler.load("m.pt2", instances=2)
        assert await asyncio.gather(*(runner.run(i) for i in range(4))) == [0, 2, 4, 6]
        assert await asyncio.to_thread(runner.run_blocking, 3) == 6
        async with runner.lease() as lease:
            assert await lease.run(1) == 2
        async with runner.session() as session:
            await runner.update({"w": 2})
            assert await asyncio.gather(session.run(1), runner.run(1)) == [2, 2]
        with pytest.raises(aoti_sched.PackageNotFoundError):
            await scheduler.load("other.pt2")
        future = runner.submit(5)
        await future
        dispatcher = replica_of(runner).dispatcher
        owners = [scheduler, dispatcher.executor, dispatcher, backend.containers[-1]]
    with pytest.raises(aoti_sched.RunnerClosedError):
        await runner.run(1)
    backend.containers.clear()
    return [weakref.ref(owner) for owner in owners if not isinstance(owner, type(dispatcher))]


# --- nothing is kept ------------------------------------------------------------------------------


def test_a_closed_scheduler_and_all_it_owned_are_gone_without_the_collector(executor):
    async def main():
        return await life(Lanes())

    asyncio.run(main())  # torch and others open things of their own
    with without_collector():
        assert [ref() for ref in asyncio.run(main())] == [None] * 3


def test_a_closed_scheduler_leaves_no_cycle_for_the_collector(executor):
    async def main():
        await life(Lanes())

    asyncio.run(main())
    gc.collect()
    with without_collector():
        asyncio.run(main())
        assert ours_among_garbage() == []


def ours_among_garbage():
    """The kinds of objects of the package that only the collector would free."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return sorted({type(thing).__qualname__ for thing in gc.garbage if is_ours(thing)})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def is_ours(thing):
    return type(thing).__module__.startswith("aoti_sched")


def test_fifty_schedulers_keep_no_descriptor_and_no_thread(executor):
    async def main():
        backend = Lanes()
        await life(backend)
        before = tasks()
        opened = descriptors()
        kept = [await keep_runner(backend) for _ in range(50)]
        await until(
            lambda: tasks() <= before
        )  # a joined thread is listed until the kernel has ended it
        assert len({*kept}) == 50
        assert lane_threads() == 0
        return opened, descriptors()

    async def keep_runner(backend):
        async with Scheduler(devices={"cpu": backend}) as scheduler:
            runner = await scheduler.load("m.pt2")
            await runner.run(1)
            return runner  # a caller may keep a runner for as long as it likes

    with without_collector():
        opened, still_open = asyncio.run(main())
    assert still_open <= opened


def test_a_runner_that_nobody_closed_leaves_no_lane_behind(executor):
    """Its loop ended under it."""

    async def main():
        scheduler = Scheduler(devices={"cpu": Lanes()})
        await scheduler.__aenter__()
        runner = await scheduler.load("m.pt2")
        await runner.run(1)

    asyncio.run(main())
    gc.collect()
    before = descriptors()
    for _ in range(5):
        asyncio.run(main())
    # A thread that ends may refer to a scheduler for a moment: collect until the lanes are gone.
    for _ in range(300):
        gc.collect()
        lanes = [thread for thread in threading.enumerate() if thread.name.startswith("aoti:")]
        if not lanes:
            break
        lanes[0].join(0.1)
    assert lane_threads() == 0
    assert descriptors() <= before


# --- exhausted resources --------------------------------------------------------------------------


class Faults:
    """Makes the n-th call of some functions fail, or that one and all that follow."""

    def __init__(self, monkeypatch, error):
        self._patch = monkeypatch
        self._error = error
        self._lock = threading.Lock()
        self.start(0, lasts=False)

    def at(self, place, name):
        original = getattr(place, name)

        def call(*args, **kwargs):
            with self._lock:
                self.calls += 1
                fails = self.calls == self._n or (self._lasts and self.calls > self._n > 0)
                self.hit |= fails
            if fails:
                raise self._error()
            return original(*args, **kwargs)

        self._patch.setattr(place, name, call)
        return self

    def start(self, n, *, lasts):
        self.calls, self._n, self._lasts, self.hit = 0, n, lasts, False

    def stop(self):
        """No more of them; whether one was hit is still known."""
        self._n = 0


def no_thread():
    return RuntimeError("can't start new thread")


def no_descriptor():
    return OSError(24, "Too many open files")


FAULTS = {
    "threads": (no_thread, [(threading.Thread, "start")]),
    "descriptors": (no_descriptor, [(os, "eventfd"), (os, "pipe"), (os, "open")]),
    "memory of lanes": (MemoryError, [(threads, "_Running"), (wakeup_fd.WakeupFd, "__init__")]),
    "memory of loads": (MemoryError, [(FakeBackend, "load")]),
    "memory of runs": (MemoryError, [(aoti_sched.testing.FakeContainer, "run_raw")]),
    "memory of updates": (MemoryError, [(aoti_sched.testing.FakeContainer, "stage")]),
    "memory of closes": (MemoryError, [(aoti_sched.testing.FakeContainer, "close")]),
}


async def attempt(operation, faults, *, lasts):
    """An operation fails with an error of ours, and works again once the resource is back."""
    try:
        return await operation()
    except AotiSchedError as error:
        assert "\n" not in str(error), "an error is a sentence"  # noqa: PT017 -- it may also work
        if lasts:
            faults.stop()
        return await operation()


async def one_life(backend, faults, *, lasts):
    """Load, run, update and close, each of which may meet a fault."""
    scheduler = Scheduler(devices={"cpu": backend})
    await scheduler.__aenter__()
    runner = await attempt(lambda: scheduler.load("m.pt2"), faults, lasts=lasts)
    assert await attempt(lambda: runner.run(2), faults, lasts=lasts) == 4
    await attempt(lambda: runner.update({"w": 2}), faults, lasts=lasts)
    assert runner.epoch == 2
    await attempt(runner.aclose, faults, lasts=lasts)
    other = await attempt(lambda: scheduler.load("m.pt2"), faults, lasts=lasts)
    assert await attempt(lambda: other.run(3), faults, lasts=lasts) == 6
    await attempt(scheduler.aclose, faults, lasts=lasts)
    assert dict(scheduler.runners) == {}
    assert all(container.closed for container in backend.containers)


# Native lanes open their descriptor in native code: see the test that really exhausts them.
CASES = [
    (one, kind) for one in EXECUTORS for kind in FAULTS if (one, kind) != ("native", "descriptors")
]


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(("executor", "kind"), CASES, indirect=["executor"])
def test_a_fault_at_each_call_one_after_the_other(executor, kind, lasts, monkeypatch):
    error, places = FAULTS[kind]
    faults = Faults(monkeypatch, error)
    for place, name in places:
        if hasattr(place, name):
            faults.at(place, name)

    async def main(n):
        faults.start(n, lasts=lasts)
        try:
            await one_life(Lanes(), faults, lasts=lasts)
        finally:
            faults.stop()

    run(main, 0)
    gc.collect()
    before = descriptors(), lane_threads()
    n = 0
    while n == 0 or faults.hit:
        n += 1
        run(main, n)
        gc.collect()
        assert (descriptors(), lane_threads()) == before, f"at call {n}"
    assert n > 1, "no call was hit"


def run(main, n):
    """As `asyncio.run`, and what the loop itself opens is not what fails."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main(n))
    finally:
        loop.close()


def test_a_scheduler_closes_where_no_thread_can_be_started(executor, monkeypatch):
    async def main():
        backend = Lanes()
        async with Scheduler(devices={"cpu": backend}) as scheduler:
            runner = await scheduler.load("m.pt2")
            await runner.run(1)
            faults = Faults(monkeypatch, no_thread)
            faults.at(aoti_sched.engine.worker.anyio.to_thread, "run_sync")
            faults.at(threading.Thread, "start")
            faults.start(1, lasts=True)
            with pytest.raises(
                ResourcesError, match=r"no thread can be started.*end other threads"
            ):
                await scheduler.load("m.pt2", name="other")
        assert backend.containers[0].closed

    asyncio.run(main())
    assert lane_threads() == 0


def test_descriptors_really_exhausted(executor):
    """Every limit from none left to enough: the load fails in our words, or works."""

    async def main():
        backend = Lanes()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        outcomes = []
        for left in range(6):
            async with Scheduler(devices={"cpu": backend}) as scheduler:
                held = []
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 16, hard))
                try:
                    with contextlib.suppress(OSError):
                        while True:
                            held.append(os.open("/dev/null", os.O_RDONLY))
                    for fd in held[:left]:
                        os.close(fd)
                    del held[:left]
                    try:
                        runner = await scheduler.load("m.pt2")
                        outcomes.append(await runner.run(2))
                    except ResourcesError as error:
                        text = str(error)
                        assert "Too many open files" in text or "descriptor" in text
                        outcomes.append(None)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                    for fd in held:
                        os.close(fd)
                if outcomes[-1] is None:
                    runner = await scheduler.load("m.pt2")
                    assert await runner.run(2) == 4
        return outcomes

    asyncio.run(main())
    before = descriptors()
    outcomes = asyncio.run(main())
    assert outcomes[0] is None
    assert outcomes[-1] == 4
    assert descriptors() == before


# --- closing at odd times -------------------------------------------------------------------------


async def test_closing_before_entry_closes_for_good():
    for close in ("aclose", "terminate"):
        scheduler = Scheduler(devices={"cpu": FakeBackend()})
        await getattr(scheduler, close)()
        await getattr(scheduler, close)()
        with pytest.raises(aoti_sched.UnsupportedLoopError, match="make a new one"):
            await scheduler.__aenter__()
        with pytest.raises(aoti_sched.RunnerClosedError, match="is closed"):
            await scheduler.load("m.pt2")


async def test_closing_after_exit_and_twice_does_nothing():
    backend = FakeBackend({"m": lambda x: x}, auto=True)
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        runner = await scheduler.load("m.pt2")
        await asyncio.gather(scheduler.aclose(), scheduler.aclose(), scheduler.terminate())
        await scheduler.aclose()
    for close in (scheduler.aclose, scheduler.terminate, runner.aclose, runner.terminate):
        await close()
    with pytest.raises(aoti_sched.UnsupportedLoopError, match="entered once"):
        await scheduler.__aenter__()


async def test_a_scheduler_closed_without_exit_leaves_no_task():
    scheduler = Scheduler(devices={"cpu": FakeBackend()})
    await scheduler.__aenter__()
    await scheduler.aclose()
    assert [task for task in asyncio.all_tasks() if "aoti_sched" in task.get_name()] == []


async def test_another_loop_is_refused(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x
    runner = await aoti_scheduler.load("m.pt2")
    calls = [
        aoti_scheduler.aclose,
        aoti_scheduler.terminate,
        runner.aclose,
        runner.terminate,
        runner.drain,
        lambda: aoti_scheduler.load("m.pt2", name="other"),
        lambda: runner.update({}),
    ]

    async def elsewhere(call):
        await call()

    for call in calls:
        with pytest.raises(aoti_sched.UnsupportedLoopError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, elsewhere(call))
    aoti_backend.finish_all()
    assert await runner.run(1) == 1
