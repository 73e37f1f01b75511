"""The last facts of a scheduler's devices: recorded, saved, and replayed."""

from __future__ import annotations

import json

import pytest

from aoti_sched import (
    BlockingScheduler,
    ConfigError,
    DeviceConfig,
    FlightRecord,
    ReplayError,
    Scheduler,
    SchedulerConfig,
)
from aoti_sched.queue.device_queue import DeviceQueue
from aoti_sched.queue.job import IllegalFactError, JobState
from aoti_sched.testing import FakeBackend, ManualClock, fake_scheduler, replay, replay_device


@pytest.fixture
def clock():
    return ManualClock()


async def busy(scheduler, backend, clock):
    """Let all kinds of things happen."""
    runner = await scheduler.load("m.pt2", instances=2)
    other = await scheduler.load("n.pt2")
    futures = [
        view.options(tenant=tenant, timeout=9.0).submit("ab")
        for tenant in ("secret one", "secret two")
        for view in (runner, other)
    ]
    clock.advance(0.5)
    await backend.step()
    assert futures[-1].cancel()
    backend.finish_all()
    async with runner.lease() as lease:
        assert await lease.run("abc") == 3
    await scheduler.update({runner: {"w": 2}})
    await runner.run("a")
    await other.aclose()
    return runner


async def test_a_report_becomes_a_test_of_the_queue(clock, tmp_path):
    backend = FakeBackend(
        {"m": len, "n": len}, weights={"m": {"w": 1}, "n": {"v": 1}}, lanes=2, clock=clock
    )
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await busy(scheduler, backend, clock)
        scheduler.flight_record().save(tmp_path / "report.json")
        stats = runner.stats()
    text = (tmp_path / "report.json").read_text()
    assert "secret" not in text
    assert json.loads(text)["version"] == 1
    replayed = replay(tmp_path / "report.json")["cpu"]
    states = [job.state for job in replayed.jobs if not job.is_lease_request]
    assert sorted(set(states)) == [JobState.DONE, JobState.CANCELLED]
    counters = replayed.queue.runners["m"].counters
    assert (counters.completed, replayed.queue.runners["m"].epoch) == (stats.completed, 2)
    assert set(replayed.queue.runners) == {"m"}


async def test_the_record_outlives_the_scheduler(clock):
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        await runner.run("a")
    (fact, *_, last) = replay(scheduler.flight_record())["cpu"].record.facts
    assert (fact.fact, last.fact) == ("claim", "release_memory")


async def test_an_illegal_fact_brings_its_record_and_the_rest_goes_on(clock):
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        dispatcher = scheduler._devices.dispatchers["cpu"]
        with pytest.raises(IllegalFactError) as raised:
            dispatcher.parked(runner._router.replicas[0].state)
        assert await runner.run("abc") == 3
    outcome = replay_device(raised.value.record).outcomes[-1]
    assert (type(outcome), str(outcome)) == (IllegalFactError, str(raised.value))


async def test_as_many_facts_are_kept_as_the_settings_say(clock):
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    config = SchedulerConfig(flight_facts=3, devices={"cpu": DeviceConfig()})
    async with fake_scheduler(backend, clock=clock, config=config) as scheduler:
        runner = await scheduler.load("m.pt2")
        for _ in range(9):
            await runner.run("a")
        record = scheduler.flight_record()
    device = record.devices["cpu"]
    assert 3 <= len(device.facts) <= 6
    assert device.dropped > 0
    with pytest.raises(ReplayError, match="flight_facts="):
        replay(record)


async def test_no_fact_is_kept_where_none_is_wanted(clock):
    backend = FakeBackend({"m": len}, auto=True, clock=clock)
    config = SchedulerConfig(flight_facts=0)
    async with fake_scheduler(backend, clock=clock, config=config) as scheduler:
        runner = await scheduler.load("m.pt2")
        dispatcher = scheduler._devices.dispatchers["cpu"]
        assert type(dispatcher.queue) is DeviceQueue
        with pytest.raises(IllegalFactError) as raised:
            dispatcher.parked(runner._router.replicas[0].state)
        assert await runner.run("abc") == 3
        record = scheduler.flight_record()
    assert raised.value.record is None
    assert record.devices == {}
    with pytest.raises(ReplayError, match="flight_facts="):
        replay(record)


def test_a_number_of_facts_below_zero_is_refused():
    with pytest.raises(ConfigError, match="flight_facts"):
        Scheduler(SchedulerConfig(flight_facts=-1))


def test_a_blocking_scheduler_has_its_record_too():
    backend = FakeBackend({"m": len}, auto=True)
    with BlockingScheduler(devices={"cpu": backend}) as scheduler:
        runner = scheduler.load("m.pt2")
        assert runner.run("ab") == 2
        replayed = replay(scheduler.flight_record())["cpu"]
    assert [job.state for job in replayed.jobs] == [JobState.DONE]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no flight record"),
        ('{"version": 1}', "no flight record"),
        ('{"version": 2, "release": "9", "devices": {}}', "has version 2, and this release reads"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ReplayError, match=message):
        FlightRecord.load(path)
