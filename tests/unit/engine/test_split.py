"""Splits: requests shared out among runners, tenants that stay, and copies for a shadow."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import structlog

from aoti_sched import ConfigError, Limits, Priority, RunError, RunnerClosedError, Scheduler
from aoti_sched.testing import FakeBackend, settle


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
async def scheduler():
    models = {name: lambda x, name=name: (name, x) for name in ("old", "new", "other")}
    async with Scheduler(devices={"cpu": FakeBackend(models, auto=True)}) as scheduler:
        for name in models:
            await scheduler.load(f"{name}.pt2")
        yield scheduler


@pytest.fixture
async def split(scheduler):
    old, new = scheduler.runners["old"], scheduler.runners["new"]
    return scheduler.split("ranker", {old: 3, new: 1})


async def who(split, count, **options):
    view = split.options(**options) if options else split
    answers = await asyncio.gather(*(view.run(n) for n in range(count)))
    assert [x for _, x in answers] == [*range(count)]
    return Counter(name for name, _ in answers)


async def test_requests_are_shared_out_and_counted(split):
    assert await who(split, 40) == {"old": 30, "new": 10}
    assert await asyncio.to_thread(split.run_blocking, 1) in [("old", 1), ("new", 1)]
    stats = split.stats()
    assert (stats.name, stats.shares) == ("ranker", {"old": 0.75, "new": 0.25})
    assert sum(stats.requests.values()) == 41
    assert split.submit(1).trace.runner in ("old", "new")


async def test_shares_are_changed_while_requests_go_on(scheduler, split):
    old, new, other = scheduler.runners.values()
    queued = [split.submit(n) for n in range(4)]
    split.change({new: 1})
    assert await who(split, 5) == {"new": 5}
    split.change({other: 1, old: 0})
    assert split.shares == {"other": 1.0}
    assert await who(split, 5) == {"other": 5}
    await new.aclose()
    await old.aclose()
    assert Counter(name for name, _ in await asyncio.gather(*queued)) == {"old": 3, "new": 1}
    assert split.stats().requests == {"old": 3, "new": 6, "other": 5}


async def test_options_hold_for_whichever_runner_is_chosen(scheduler, split):
    view = split.options(priority=Priority.HIGH, tenant="ada").options(timeout=5.0)
    assert await who(view, 8) == {"old": 6, "new": 2}
    split.change({scheduler.runners["other"]: 1})
    assert await who(view, 2) == {"other": 2}
    for wrong in ({"priority": 7}, {"timeout": -1}, {"timeout": "soon"}):
        with pytest.raises(ConfigError, match="options"):
            split.options(**wrong)
    with pytest.raises(TypeError):
        split.options(tenant=[])


async def test_a_tenant_stays_with_its_runner(scheduler):
    old, new = scheduler.runners["old"], scheduler.runners["new"]
    split = scheduler.split("ranker", {old: 1, new: 1}, sticky=True)

    async def homes():
        found = {}
        for number in range(40):
            (found[number],) = await who(split, 4, tenant=number)
        return found

    before = await homes()
    assert {*before.values()} == {"old", "new"}
    assert await homes() == before
    split.change({old: 1, new: 3})
    moved = {(before[n], home) for n, home in (await homes()).items() if before[n] != home}
    assert moved == {("old", "new")}
    for tenant in (3, 4):
        view = split.options(tenant=tenant)
        names = {(await asyncio.to_thread(view.run_blocking, 0))[0] for _ in range(5)}
        assert names == {(await view.run(0))[0]}
    assert len(await who(split, 8)) == 2  # without a tenant


async def test_a_shadow_gets_copies_and_its_answers_go_to_the_callback_alone(scheduler, split):
    told = []
    shadow = split.shadow(
        scheduler.runners["other"], lambda *both: told.append([one.result() for one in both])
    )
    assert await who(split, 4) == {"old": 3, "new": 1}
    await settle()
    assert sorted((copy, answer[1]) for answer, copy in told) == [
        (("other", n), n) for n in range(4)
    ]
    assert split.stats().shadows == (shadow.stats(),)
    assert (shadow.stats().runner, shadow.stats().copied, shadow.stats().dropped) == ("other", 4, 0)
    shadow.close()
    shadow.close()
    await who(split, 4)
    assert len(told) == 4
    assert split.stats().shadows == ()


async def test_a_copy_keeps_its_inputs_when_the_caller_writes_to_them_again(scheduler):
    backend = FakeBackend({"a": sum, "b": sum})
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        a, b = await scheduler.load("a.pt2"), await scheduler.load("b.pt2")
        copies = []
        split = scheduler.split("s", {a: 1})
        split.shadow(b, lambda _, copy: copies.append(copy.result()))
        values = [1, 2]
        future = split.submit(values)
        await backend.step()
        assert await future == 3
        values.append(10)  # its request has ended
        backend.finish_all()
        await settle()
        assert copies == [3]


async def test_a_runner_that_is_loaded_anew_under_its_name_takes_the_place_of_the_old(scheduler):
    new = scheduler.runners["new"]
    split = scheduler.split("s", {new: 1})
    view = split.options(tag="mine")
    assert await view.run(1) == ("new", 1)
    split.change({scheduler.runners["old"]: 1})
    await new.aclose()
    split.change({await scheduler.load("new.pt2"): 1})
    assert await view.run(2) == ("new", 2)
    assert await asyncio.to_thread(view.run_blocking, 3) == ("new", 3)
    assert new not in view._handles


async def test_a_shadow_gets_its_share_at_its_priority(scheduler, split):
    told = []
    other = scheduler.runners["other"]
    shadow = split.shadow(other, lambda *both: told.append(both), share=0.25)
    await who(split, 16)
    await settle()
    assert len(told) == shadow.stats().copied == other.stats().completed == 4


async def test_a_shadow_that_fails_is_full_or_closed_harms_no_request(scheduler):
    def fails(x):
        raise RunError("never")

    backend = FakeBackend({"a": lambda x: x, "b": fails})
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        a = await scheduler.load("a.pt2")
        b = await scheduler.load("b.pt2", limits=Limits(jobs=1))
        told = []
        split = scheduler.split("s", {a: 1})
        shadow = split.shadow(b, lambda _, copy: told.append(copy))
        futures = [split.submit(n) for n in range(6)]
        assert shadow.stats().dropped > 0
        backend.finish_all()
        assert await asyncio.gather(*futures) == [*range(6)]
        await settle()
        assert len(told) == shadow.stats().copied
        assert all(isinstance(copy.exception(), RunError) for copy in told)
        dropped = shadow.stats().dropped
        await b.aclose()
        assert await split.run(7) == 7
        assert shadow.stats().dropped == dropped + 1


async def test_a_callback_that_raises_ends_the_shadow_and_is_logged(scheduler, split, logs):
    def raises(*_):
        raise ValueError("mine")

    split.shadow(scheduler.runners["other"], raises)
    assert await who(split, 2) == {"old": 2}
    await settle()
    (line,) = [line for line in logs if line["event"].startswith("shadow ended")][:1]
    assert (line["split"], line["runner"]) == ("ranker", "other")
    assert split.stats().shadows == ()
    assert sum((await who(split, 2)).values()) == 2


async def test_a_request_that_is_cancelled_leaves_its_copy_alone(scheduler):
    backend = FakeBackend({"a": lambda x: x, "b": lambda x: -x})
    async with Scheduler(devices={"cpu": backend}) as scheduler:
        a, b = await scheduler.load("a.pt2"), await scheduler.load("b.pt2")
        told = []
        split = scheduler.split("s", {a: 1})
        split.shadow(b, lambda *both: told.append(both))
        future = split.submit(3)
        future.cancel()
        backend.finish_all()
        await settle()
        ((answer, copy),) = told
        assert answer.cancelled()
        assert copy.result() == -3


@pytest.mark.parametrize(
    "shares",
    [None, {}, {"old": 0}, {"old": -1}, {"old": float("nan")}, {"old": "1"}, {"old": True}],
)
async def test_shares_that_make_no_sense_are_refused(scheduler, split, shares):
    given = shares and {scheduler.runners[name]: part for name, part in shares.items()}
    with pytest.raises(ConfigError, match="ranker"):
        split.change(given)
    with pytest.raises(ConfigError, match="another"):
        scheduler.split("another", given)
    assert split.shares == {"old": 0.75, "new": 0.25}


async def test_runners_that_are_closed_foreign_or_none_are_refused(scheduler, split):
    other = scheduler.runners["other"]
    with pytest.raises(ConfigError, match="expected the runner"):
        split.change({"old": 1})
    await other.aclose()
    with pytest.raises(RunnerClosedError, match="'other' is closed"):
        split.change({other: 1})
    with pytest.raises(RunnerClosedError, match="'other' is closed"):
        split.shadow(other, print)
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            split.shadow(scheduler.runners["old"], print, share=share)
    await scheduler.runners["new"].aclose()
    with pytest.raises(RunnerClosedError, match="'new'"):
        await asyncio.gather(*(split.run(n) for n in range(4)))
