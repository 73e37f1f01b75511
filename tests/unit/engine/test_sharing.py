"""What a device's users share, through the real front: its time, its queue, its cores.

And who is turned away when it is too much.
"""

from __future__ import annotations

import asyncio
import pickle

import pytest
import structlog

from aoti_sched import (
    ConfigError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    DeviceConfig,
    Limits,
    Priority,
    QueueFullError,
    RunError,
    Scheduler,
    SchedulerConfig,
    ShedError,
)
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, settle
from tests.inside import container_of
from tests.unit.engine.support import until


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def aoti_backend(aoti_clock):
    """With one lane, so that two models want the same."""
    return FakeBackend(lanes=1, clock=aoti_clock)


async def timed(scheduler, backend, clock, name, seconds, **options):
    """A model that takes so long on the tests' clock."""
    backend.models[name] = lambda x=None: clock.advance(seconds) or x
    return await scheduler.load(f"{name}.pt2", **options)


async def serve(backend, futures):
    """Step until all are done, and say in which order they came to their ends."""
    order = []
    for future in futures:
        future.add_done_callback(order.append)
    while backend.running:
        await backend.step()
    await settle()
    return [futures.index(future) for future in order]


async def learn(backend, runner):
    """As many runs as it takes to know how long they are."""
    for _ in range(8):
        future = runner.submit()
        await backend.step()
        await future


async def test_models_share_a_device_by_their_shares(aoti_backend, aoti_clock, aoti_scheduler):
    much = await timed(aoti_scheduler, aoti_backend, aoti_clock, "much", 1, share=3.0)
    little = await timed(aoti_scheduler, aoti_backend, aoti_clock, "little", 1)
    futures = [runner.submit(n) for n in range(12) for runner in (much, little)]
    order = await serve(aoti_backend, futures)
    of_much = [place for place in order[:16] if place % 2 == 0]
    assert 11 <= len(of_much) <= 13


async def test_a_model_that_is_slow_does_not_get_more_for_it(
    aoti_backend, aoti_clock, aoti_scheduler
):
    slow = await timed(aoti_scheduler, aoti_backend, aoti_clock, "slow", 4)
    quick = await timed(aoti_scheduler, aoti_backend, aoti_clock, "quick", 1)
    futures = [slow.submit() for _ in range(10)] + [quick.submit() for _ in range(40)]
    await serve(aoti_backend, futures[:1])
    ends = sorted((future.trace.finished, future.trace.runner) for future in futures)
    first_half = [name for _, name in ends[:25]]
    assert 4 <= first_half.count("slow") <= 6


async def test_tenants_of_a_model_take_turns(aoti_backend, aoti_clock, aoti_scheduler):
    runner = await timed(aoti_scheduler, aoti_backend, aoti_clock, "m", 1)
    greedy = [runner.options(tenant="greedy").submit() for _ in range(10)]
    modest = [runner.options(tenant="modest").submit() for _ in range(2)]
    order = await serve(aoti_backend, greedy + modest)
    assert max(order.index(10), order.index(11)) <= 4


async def test_a_tenant_has_a_bound_of_its_own(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda: None
    runner = await aoti_scheduler.load("m.pt2", limits=Limits(tenant_jobs=2))
    greedy, modest = runner.options(tenant="greedy"), runner.options(tenant="modest")
    futures = [greedy.submit() for _ in range(3)]
    with pytest.raises(
        QueueFullError, match="runner 'm': tenant 'greedy' has 2 jobs queued, its bound is 2"
    ):
        greedy.submit()
    futures.append(modest.submit())
    await serve(aoti_backend, futures)
    assert [future.done() for future in futures] == [True] * 4


async def test_one_whose_tenant_has_too_many_may_wait(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda: None
    runner = await aoti_scheduler.load("m.pt2", overflow="wait", limits=Limits(tenant_jobs=1))
    futures = [runner.options(tenant="greedy").submit() for _ in range(4)]
    assert (runner.stats().queued, runner.stats().waiting) == (1, 2)
    futures[2].cancel()
    assert (runner.stats().queued, runner.stats().waiting) == (1, 1)
    await serve(aoti_backend, futures)
    assert [future.cancelled() for future in futures] == [False, False, True, False]


async def test_a_tenant_that_can_not_be_hashed_is_refused_at_once(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda: None
    runner = await aoti_scheduler.load("m.pt2")
    with pytest.raises(TypeError, match="unhashable"):
        runner.options(tenant=["a list"])


async def test_a_tenant_stays_with_the_views_made_of_it(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda: None
    runner = await aoti_scheduler.load("m.pt2", limits=Limits(tenant_jobs=1))
    urgent = runner.options(tenant="a").options(priority=Priority.HIGH)
    futures = [urgent.submit(), urgent.submit()]
    with pytest.raises(QueueFullError, match="tenant 'a'"):
        urgent.submit()
    futures.append(urgent.options(tenant=None).submit())
    await serve(aoti_backend, futures)


async def test_a_full_queue_drops_the_worst(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda: None
    runner = await aoti_scheduler.load("m.pt2", overflow="shed", limits=Limits(jobs=2))
    running = runner.submit()
    low = runner.options(priority=Priority.LOW).submit()
    normal = runner.submit()
    high = runner.options(priority=Priority.HIGH).submit()
    with pytest.raises(
        ShedError,
        match="runner 'm': the queue is full, and the request was dropped for a better one",
    ):
        await low
    with pytest.raises(QueueFullError) as refused:  # the worst of all is the new one
        runner.options(priority=Priority.LOW).submit()
    assert type(refused.value) is QueueFullError
    await serve(aoti_backend, [running, normal, high])
    assert (low.trace.state, normal.trace.state, high.trace.state) == ("SHED", "DONE", "DONE")
    assert (runner.stats().shed, runner.stats().rejected) == (1, 1)


async def test_what_could_not_be_done_in_time_is_refused_with_the_time_it_would_take(
    aoti_backend, aoti_clock, aoti_scheduler
):
    runner = await timed(aoti_scheduler, aoti_backend, aoti_clock, "m", 1, admission="predictive")
    await learn(aoti_backend, runner)
    futures = [runner.submit() for _ in range(4)]
    with pytest.raises(
        DeadlineUnreachableError,
        match=r"'m': .* finished in about 5 s, its timeout is 3 s; send less",
    ) as refused:
        runner.options(timeout=3, priority=Priority.LOW).submit()
    assert (refused.value.predicted, refused.value.timeout) == (5.0, 3.0)
    assert isinstance(refused.value, DeadlineExceededError)
    again = pickle.loads(pickle.dumps(refused.value))  # it crosses processes as other errors do
    assert (str(again), again.predicted) == (str(refused.value), 5.0)
    futures.append(runner.options(timeout=9).submit())
    await serve(aoti_backend, futures)
    assert runner.stats().rejected == 1


async def test_without_prediction_it_is_queued_and_expires(
    aoti_backend, aoti_clock, aoti_scheduler
):
    runner = await timed(aoti_scheduler, aoti_backend, aoti_clock, "m", 1)
    await learn(aoti_backend, runner)
    futures = [runner.submit() for _ in range(4)]
    late = runner.options(timeout=3, priority=Priority.LOW).submit()
    await serve(aoti_backend, futures)
    with pytest.raises(DeadlineExceededError):
        await late


async def test_strict_classes_may_starve_the_low_and_max_wait_does_not_let_them():
    for max_wait, served in ((None, 0), (5.0, 1)):
        clock = ManualClock()
        backend = FakeBackend({"m": lambda clock=clock: clock.advance(1)}, lanes=1, clock=clock)
        config = SchedulerConfig(devices={"cpu": DeviceConfig(max_wait=max_wait)})
        async with Scheduler(config, devices={"cpu": backend}, clock=clock) as scheduler:
            runner = await scheduler.load("m.pt2")
            high = runner.options(priority=Priority.HIGH)
            futures = [high.submit(), high.submit(), runner.options(priority=Priority.LOW).submit()]
            for _ in range(20):
                await backend.step()
                futures.append(high.submit())
            assert futures[2].done() == bool(served)
            while backend.running:
                await backend.step()
            await asyncio.gather(*futures)


async def test_runs_that_use_several_threads_take_as_many_cores():
    device = FakeBackend({"wide": lambda: "wide", "narrow": lambda: "narrow"}, lanes=2)
    async with Scheduler(devices={"cpu": device}) as scheduler:
        wide = await scheduler.load("wide.pt2", instances=2, threads=2)
        narrow = await scheduler.load("narrow.pt2", instances=2)
        futures = [wide.submit(), wide.submit(), narrow.submit(), narrow.submit()]
        cpu = scheduler.stats().devices["cpu"]
        assert (cpu.lanes, cpu.busy_lanes, cpu.cores, cpu.free_cores) == (2, 1, 2, 0)
        while device.running:
            await device.step()
            stats = scheduler.stats().devices["cpu"]
            used = 2 * wide.stats().running + narrow.stats().running
            assert used + stats.free_cores == 2
        assert await asyncio.gather(*futures) == ["wide", "wide", "narrow", "narrow"]


async def test_more_threads_than_cores_are_lowered_and_noted():
    async with fake_scheduler(FakeBackend({"m": lambda: None})) as scheduler:
        runner = await scheduler.load("m.pt2", threads=16)
        assert runner.info.threads == 2
        assert "threads=16 was lowered to 2, the cores there are." in runner.info.notes


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(tenant_jobs=2), "tenant_jobs bounds each tenant of a model"),
        (Limits(waiting=2), "waiting bounds the requests of a model that wait for room"),
    ],
)
async def test_a_device_has_no_tenants_and_no_gate_of_its_own(limits, message):
    config = SchedulerConfig(devices={"cpu": DeviceConfig(limits=limits)})
    backend = FakeBackend({"m": lambda: None})
    async with Scheduler(config, devices={"cpu": backend}) as scheduler:
        with pytest.raises(ConfigError, match=rf"devices\.cpu: {message}"):
            await scheduler.load("m.pt2")


class TestHealth:
    """Runs that fail again and again."""

    async def fail(self, backend, runner, times):
        for _ in range(times):
            future = runner.submit()
            await backend.step(RunError("no memory left"))
            with pytest.raises(RunError, match="no memory left"):
                await future

    async def test_it_is_reported_until_a_run_succeeds(self, aoti_backend, aoti_scheduler, logs):
        aoti_backend.models["m"] = lambda: "well"
        runner = await aoti_scheduler.load("m.pt2")
        await self.fail(aoti_backend, runner, 4)
        assert runner.stats().health == "ok"
        await self.fail(aoti_backend, runner, 2)
        assert runner.stats().health == "failing"
        told = [entry for entry in logs if entry["event"] == "runs fail again and again"]
        assert [entry["runner"] for entry in told] == ["m"]
        await serve(aoti_backend, [runner.submit()])
        assert runner.stats().health == "ok"

    async def test_a_container_is_built_anew_while_the_queue_waits(
        self, aoti_backend, aoti_scheduler, logs
    ):
        aoti_backend.models["m"] = lambda: "well"
        aoti_backend.weights["m"] = {"w": 1}
        runner = await aoti_scheduler.load("m.pt2", on_failure="rebuild", instances=2)
        await runner.update({"w": 2})
        built = []
        container = container_of(runner)
        container.rebuild = lambda: built.append(dict(container.weights))
        await self.fail(aoti_backend, runner, 3)
        futures = [runner.submit() for _ in range(5)]
        for _ in range(3):  # the third was launched when the second came back
            await aoti_backend.step(RunError("no memory left"))
        await until(lambda: built)
        await until(lambda: aoti_backend.running)
        await serve(aoti_backend, futures)
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(answer) for answer in answers[:3]] == [RunError] * 3
        assert answers[3:] == ["well", "well"]
        assert built == [{"w": 2}]
        assert (runner.stats().health, runner.epoch) == ("ok", 2)
        assert [entry["why"] for entry in logs if entry["event"] == "container rebuilt"] == [
            "its runs failed"
        ]

    async def test_it_is_built_anew_once_for_all_failures_in_a_row(
        self, aoti_backend, aoti_scheduler, logs
    ):
        aoti_backend.models["m"] = lambda: "well"
        runner = await aoti_scheduler.load("m.pt2", on_failure="rebuild")
        await self.fail(aoti_backend, runner, 5)
        await until(lambda: any(entry["event"] == "container rebuilt" for entry in logs))
        await settle()
        await self.fail(aoti_backend, runner, 7)
        await settle()
        assert sum(entry["event"] == "container rebuilt" for entry in logs) == 1

    async def test_one_that_can_not_be_built_anew_goes_on_with_what_there_is(
        self, aoti_backend, aoti_scheduler, logs
    ):
        aoti_backend.models["m"] = lambda: "well"
        runner = await aoti_scheduler.load("m.pt2", on_failure="rebuild")
        container_of(runner).faults["rebuild"] = RuntimeError("the package is gone")
        await self.fail(aoti_backend, runner, 5)
        await until(lambda: any(entry["event"] == "container can't be rebuilt" for entry in logs))
        await settle()
        await serve(aoti_backend, [runner.submit()])
        assert (runner.stats().phase, runner.stats().health, runner.stats().completed) == (
            "OPEN",
            "ok",
            1,
        )
