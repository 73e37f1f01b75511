"""The last facts of a scheduler's devices: recorded, saved, and replayed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random

import pytest

from aoti_sched import (
    BlockingScheduler,
    ConfigError,
    FlightRecord,
    Limits,
    Priority,
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


@pytest.mark.parametrize(("facts", "requests"), [(3, 4000), (10_000, 20_000)])
async def test_the_record_of_a_long_run_is_replayed(tmp_path, facts, requests):
    """The record lacks the first requests of tenants and classes, leases and updates."""
    backend = FakeBackend(
        {"m": len, "n": len}, weights={"m": {"w": 1}, "n": {"v": 1}}, lanes=2, auto=True
    )
    draw = random.Random(facts)
    config = SchedulerConfig(flight_facts=facts)
    async with Scheduler(config, devices={"cpu": backend}) as scheduler:
        runners = [
            await scheduler.load("m.pt2", instances=2, limits=Limits(tenant_jobs=4)),
            await scheduler.load("n.pt2", limits=Limits(jobs=20)),
        ]

        async def ask(tenant):
            for number in range(requests // 20):
                runner = draw.choice(runners)
                view = runner.options(
                    tenant=f"secret {tenant % 5}",
                    priority=draw.choice(list(Priority)),
                    timeout=draw.choice([None, 60.0]),
                )
                if number % 50 == tenant:
                    await runner.update({"w" if runner is runners[0] else "v": number})
                if draw.random() < 0.05:
                    async with runner.lease() as lease:
                        await lease.run("ab")
                else:
                    await view.run("ab")

        await asyncio.gather(*map(ask, range(20)))
        scheduler.flight_record().save(tmp_path / "report.json")
        stats = {runner.name: runner.stats() for runner in runners}
    assert "secret" not in (tmp_path / "report.json").read_text()
    replayed = replay(tmp_path / "report.json")["cpu"]
    assert replayed.record.dropped > 0
    assert replayed.record.state is not None
    assert len(replayed.outcomes) >= facts
    assert replayed.queue.load.jobs == 0
    for name, runner in replayed.queue.runners.items():
        assert runner.counters.completed == stats[name].completed
        assert runner.epoch == stats[name].epoch > 2


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


def damaged(name, *values):
    """Return a damage: the last fact of a record is another."""

    def damage(device):
        device["facts"][-1] = {"fact": name, "at": 1.0, "values": dict(values)}

    return damage


def in_state(kind, name, value):
    """Return a damage: a value of the first object of a class is another."""

    def damage(device):
        one = next(one for one in device["state"] if one["kind"] == kind)
        one["values"][name] = value

    return damage


DAMAGES = {
    "an unknown fact": damaged("explode"),
    "a method that is no fact": damaged("record"),
    "a method of the replay": damaged("must_agree"),
    "an attribute of every object": damaged("_class__"),
    "a value that is not known": damaged("tick", ("extra", 1)),
    "a value that is missing": damaged("cancel"),
    "a runner that is none": damaged("pin", ("runner", [])),
    "a huge runner": damaged(
        "add_runner",
        *{"name": "x", "slots": 10**15, "bounds": None, "epoch": 1}.items(),
        *{"placing": ["lane", 0, 0, 0, 0, 0], "batching": None, "width": 1, "share": 1}.items(),
        *{"sheds": False, "predicts": False, "routable": False}.items(),
        *{"holding": None, "holding_name": ""}.items(),
    ),
    "a huge device": lambda device: device.update(lanes=10**15),
    "a device without lanes": lambda device: device.update(lanes=0),
    "bounds that are not known": lambda device: device["bounds"].update(more=1),
    "lanes that are no lanes": in_state("queue", "lanes", {"object": 0}),
    "runners that are none": in_state("queue", "runners", 5),
    "runners that are none, and no facts": lambda device: (
        in_state("queue", "runners", 5)(device),
        device.update(facts=[]),
    ),
    "a runner whose number is a list": lambda device: in_state(
        "RunnerState",
        "number",
        {"object": [one["kind"] for one in device["state"]].index("list")},
    )(device),
    "a free slot that is text": in_state("RunnerState", "free", {"object": 0}),
    "a bound that is text": in_state("Bounds", "jobs", "many"),
    "no state": lambda device: device.update(state=None),
    "an empty state": lambda device: device.update(state=[]),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report whose first facts were dropped, as plain values."""
    path = tmp_path_factory.mktemp("reports") / "report.json"
    backend = FakeBackend({"m": len}, auto=True)
    config = SchedulerConfig(flight_facts=10)
    with BlockingScheduler(config, devices={"cpu": backend}) as scheduler:
        runner = scheduler.load("m.pt2")
        for _ in range(10):
            runner.run("ab")
        scheduler.flight_record().save(path)
    return path.read_bytes()


def test_a_report_without_its_first_facts_is_replayed(report, tmp_path):
    (tmp_path / "report.json").write_bytes(report)
    replayed = replay(tmp_path / "report.json")["cpu"]
    assert replayed.record.dropped > 0
    assert replayed.record.state is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_report_is_refused(report, tmp_path, damage):
    content = json.loads(report)
    DAMAGES[damage](content["devices"]["cpu"])
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ReplayError):
        replay(tmp_path / "report.json")


def test_plain_values_that_are_no_record_of_a_device_are_refused(report):
    content = json.loads(report)["devices"]["cpu"]
    assert replay_device(content).record.device == "cpu"
    for damage in ({}, [], content | {"lanes": "two"}, content | {"facts": [{"fact": "tick"}]}):
        with pytest.raises(ReplayError, match="this is no record of a device: "):
            replay_device(damage)


def test_any_value_of_a_state_may_be_damaged(report, tmp_path):
    """A damage is found, or changes nothing that is counted."""
    seed = random.SystemRandom().randrange(10**9)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(300):
        content = json.loads(report)
        device = content["devices"]["cpu"]
        one = draw.choice(device["state"])
        values = one["values"]
        place = draw.choice(list(values) if isinstance(values, dict) else range(len(values) or 1))
        new = draw.choice([None, -1, 10**30, 0.5, "x", [], [[1]], {"object": 0}, {"float": "inf"}])
        if isinstance(values, dict) or values:
            values[place] = new
        else:
            values.append(new)
        (tmp_path / "report.json").write_text(json.dumps(content))
        print(one["kind"], place, new)
        with contextlib.suppress(ReplayError):
            replay(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no flight record"),
        ('{"version": 1}', "no flight record"),
        ('{"version": 1, "release": ' + "[" * 10**6, "no flight record"),
        ('{"version": 2, "release": "9", "devices": {}}', "has version 2, and this release reads"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ReplayError, match=message):
        FlightRecord.load(path)


async def test_a_timeline_is_told_from_a_flight_record(clock, tmp_path):
    backend = FakeBackend({"m": len}, clock=clock, auto=True)
    async with fake_scheduler(backend, clock=clock) as scheduler:
        runner = await scheduler.load("m.pt2")
        with scheduler.record() as recording:
            await runner.run("ab")
    path = tmp_path / "timeline.json"
    recording.save(path)
    with pytest.raises(ReplayError) as caught:
        replay(path)
    assert str(caught.value) == (
        f"{path}: this is a timeline, which can't be replayed. scheduler.flight_record().save "
        "writes a flight record"
    )
