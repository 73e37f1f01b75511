"""A changed configuration on a running scheduler: what is loaded, closed, changed and reported."""

import asyncio

import pytest
import structlog

from aoti_sched import (
    ConfigError,
    ConfigReport,
    DeadlineExceededError,
    DeviceConfig,
    Limits,
    ModelConfig,
    QueueFullError,
    RunnerClosedError,
    Scheduler,
    SchedulerConfig,
)
from aoti_sched.apply import needs_restart, plan
from aoti_sched.testing import FakeBackend, ManualClock, settle


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


def config(**models):
    return SchedulerConfig(
        models={name: ModelConfig(path=f"{name}.pt2", **more) for name, more in models.items()}
    )


def backend(**options):
    names = ("a", "b", "c", "d")
    return FakeBackend(dict.fromkeys(names, len), **{"auto": True, **options})


def scheduler(settings, fake=None, **options):
    return Scheduler(settings, devices={"cpu": fake or backend()}, **options)


# --- the plan -------------------------------------------------------------------------------------


def test_a_plan_names_each_model_once():
    now = config(same={}, live={}, other={}, gone={}).models
    wanted = config(same={}, live={"timeout": 1.0}, other={"instances": 2}, new={}).models
    found = plan(now, wanted)
    assert found.keep == ("same",)
    assert found.change == {"live": ("timeout",)}
    assert found.replace == {"other": ("instances",)}
    assert (found.load, found.close) == (("new",), ("gone",))


@pytest.mark.parametrize(
    ("before", "after", "live"),
    [("reject", "wait", True), ("wait", "reject", True), ("shed", "wait", False)],
)
def test_shedding_begins_and_ends_with_another_load_only(before, after, live):
    now, wanted = config(m={"overflow": before}).models, config(m={"overflow": after}).models
    assert bool(plan(now, wanted).change) is live
    assert bool(plan(now, wanted).replace) is not live


def test_what_needs_a_restart_is_named_by_its_path():
    now = SchedulerConfig(devices={"cpu": DeviceConfig(lanes=1), "cpu:0": DeviceConfig()})
    wanted = SchedulerConfig(
        devices={"cpu": DeviceConfig(lanes=2), "cpu:1": DeviceConfig()},
        models=config(m={}).models,
        log_requests=True,
        loop_lag=0.5,
        flight_facts=3,
    )
    assert needs_restart(now, wanted) == (
        "devices.cpu.lanes",
        "devices.cpu:0",
        "devices.cpu:1",
        "log_requests",
        "loop_lag",
        "flight_facts",
    )


# --- carrying it out ------------------------------------------------------------------------------


async def test_models_come_and_go_as_the_file_says(tmp_path):
    file = tmp_path / "scheduler.toml"
    file.write_text('[models.a]\npath = "a.pt2"\n[models.b]\npath = "b.pt2"\n')
    async with Scheduler.from_config(file, devices={"cpu": backend()}) as its:
        old = its.runners["b"]
        file.write_text('[models.a]\npath = "a.pt2"\n[models.c]\npath = "c.pt2"\n')
        report = await its.apply(file)
        assert report == ConfigReport(loaded=("c",), closed=("b",), unchanged=("a",))
        assert set(its.runners) == {"a", "c"}
        assert await its.runners["c"].run("abc") == 3
        with pytest.raises(RunnerClosedError):
            await old.run("abc")


async def test_the_same_configuration_changes_nothing():
    settings = config(a={}, b={})
    async with scheduler(settings) as its:
        before = dict(its.runners)
        assert await its.apply(settings) == ConfigReport(unchanged=("a", "b"))
        assert dict(its.runners) == before


async def test_a_timeout_changes_while_the_model_serves():
    clock = ManualClock()
    fake = backend(auto=False, clock=clock)
    async with scheduler(config(a={}), fake, clock=clock) as its:
        runner = its.runners["a"]
        patient = runner.options(timeout=100.0)
        report = await its.apply(config(a={"timeout": 1.0}))
        assert report.changed == {"a": ("timeout",)}
        assert its.runners["a"] is runner
        late, early = runner.submit("x"), patient.submit("x")
        clock.advance(2.0)
        with pytest.raises(DeadlineExceededError):
            await late
        fake.finish_all()
        assert await early == 1


async def test_overflow_changes_while_the_model_serves():
    fake = backend(auto=False, lanes=1)
    limits = Limits(jobs=1)
    async with scheduler(config(a={"limits": limits}), fake) as its:
        runner = its.runners["a"]
        accepted = [runner.submit("x"), runner.submit("x")]
        with pytest.raises(QueueFullError):
            runner.submit("x")
        await its.apply(config(a={"limits": limits, "overflow": "wait"}))
        accepted.append(runner.submit("x"))
        fake.finish_all()
        assert await asyncio.gather(*accepted) == [1, 1, 1]


async def test_another_setting_replaces_the_model_after_its_accepted_requests():
    fake = backend(auto=False)
    async with scheduler(config(a={}), fake) as its:
        old = its.runners["a"]
        accepted = old.submit("abc")
        applying = asyncio.ensure_future(its.apply(config(a={"instances": 2})))
        await settle()
        assert not applying.done()
        with pytest.raises(RunnerClosedError):
            old.submit("abc")
        fake.finish_all()
        assert await accepted == 3
        assert (await applying).replaced == {"a": ("instances",)}
        assert its.runners["a"] is not old
        assert its.runners["a"].info.instances == 2


async def test_a_model_that_fails_is_reported_and_the_others_go_on():
    async with scheduler(config(a={})) as its:
        report = await its.apply(config(a={}, missing={}, b={}))
        assert report.loaded == ("b",)
        assert "the fake backend has no model 'missing'" in report.failed["missing"]
        assert set(its.runners) == {"a", "b"}


async def test_a_model_that_cannot_be_replaced_serves_with_its_old_settings():
    async with scheduler(config(a={})) as its:
        report = await its.apply(config(a={"device": "nowhere"}))
        assert "nowhere" in report.failed["a"]
        assert report.replaced == {}
        assert await its.runners["a"].run("abc") == 3
        # It is tried again, because the settings that serve are still the old ones.
        assert (await its.apply(config(a={"instances": 2}))).replaced == {"a": ("instances",)}


async def test_runners_of_load_are_left_alone():
    async with scheduler(config(a={})) as its:
        own = await its.load("d.pt2")
        assert (await its.apply(config())).closed == ("a",)
        assert await own.run("abc") == 3
        with pytest.raises(ConfigError, match=r"models\.d: load\(\) has made a runner"):
            await its.apply(config(a={}, d={}))
        assert list(its.runners) == ["d"]  # nothing was done


async def test_a_model_that_was_closed_by_hand_is_loaded_again():
    async with scheduler(config(a={})) as its:
        await its.runners["a"].aclose()
        assert (await its.apply(config(a={}))).loaded == ("a",)


async def test_a_wrong_configuration_does_nothing(tmp_path):
    file = tmp_path / "scheduler.toml"
    file.write_text("[models.b]\ninstances = 1\n")
    async with scheduler(config(a={})) as its:
        with pytest.raises(ConfigError, match="missing required field"):
            await its.apply(file)
        with pytest.raises(ConfigError, match="expected a SchedulerConfig"):
            await its.apply(3)
        assert list(its.runners) == ["a"]


async def test_two_calls_go_one_after_the_other():
    async with scheduler(config()) as its:
        first, second = await asyncio.gather(
            its.apply(config(a={}, b={})), its.apply(config(b={}, c={}))
        )
        assert first.loaded == ("a", "b")
        assert (second.loaded, second.closed, second.unchanged) == (("c",), ("a",), ("b",))


async def test_a_cancelled_call_is_finished_by_the_next():
    fake = backend(auto=False)
    async with scheduler(config(a={}, b={}), fake) as its:
        accepted = its.runners["a"].submit("abc")
        applying = asyncio.ensure_future(its.apply(config(c={})))
        await settle()
        applying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await applying
        fake.finish_all()
        assert await accepted == 3
        await its.apply(config(c={}))
        assert list(its.runners) == ["c"]


async def test_a_closed_scheduler_takes_no_configuration():
    its = scheduler(config())
    with pytest.raises(RunnerClosedError):
        await its.apply(config())
    async with its:
        pass
    with pytest.raises(RunnerClosedError):
        await its.apply(config())


async def test_the_report_is_logged(logs):
    async with scheduler(config(a={})) as its:
        await its.apply(config(a={}, b={}))
        await settle()
    (entry,) = [entry for entry in logs if entry["event"] == "configuration applied"]
    assert entry["loaded"] == ("b",)
