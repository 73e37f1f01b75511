"""What a user sees of a runner, a view, a lease and a future, and nothing of what is behind
them.
"""

from __future__ import annotations

import asyncio

import pytest

from aoti_sched import Runnable, Runner, RunnerView, Scheduler
from aoti_sched.testing import FakeBackend

CALLS = {"map", "options", "run", "run_blocking", "submit"}
WEIGHTS = {
    "commit",
    "constants",
    "discard",
    "extract",
    "free_previous",
    "rollback",
    "stage",
    "update",
}
FACTS = {"device", "epoch"}
OF_VIEWS = {"info", "lease", "name", "session", "stats"}
ENDS = {"aclose", "drain", "terminate"}


def shown(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


@pytest.fixture(params=[["cpu"], ["cpu:0", "cpu:1"]], ids=["one device", "two devices"])
async def runner(request):
    backends = {
        name: FakeBackend({"m": lambda x: x}, auto=True, name=name) for name in request.param
    }
    where = {"device": "cpu"} if len(request.param) == 1 else {"devices": request.param}
    async with Scheduler(devices=backends) as scheduler:
        yield await scheduler.load("m.pt2", **where)


async def test_a_runner_shows_what_a_user_may_use_and_no_more(runner):
    assert shown(runner) == CALLS | OF_VIEWS | WEIGHTS | FACTS | ENDS


async def test_a_view_a_lease_and_a_session_show_what_can_be_called(runner):
    assert shown(runner.options(timeout=1)) == CALLS | OF_VIEWS
    async with runner.lease() as lease:
        assert shown(lease) == shown(lease.options()) == CALLS | {"epoch", "release", "slot"}
    async with runner.session() as session:
        assert shown(session) == shown(session.options()) == CALLS | {"end", "epoch"}


async def test_a_view_tells_what_its_runner_tells(runner):
    view = runner.options(timeout=1)
    await view.run(1)
    assert (view.name, view.info, view.stats()) == (runner.name, runner.info, runner.stats())
    for name in ("name", "info", "stats"):
        with pytest.raises(AttributeError):
            setattr(view, name, None)


async def test_a_runner_a_view_a_lease_and_a_session_are_runnable(runner):
    async with runner.lease() as lease, runner.session() as session:
        for handle in (runner, runner.options(), lease, session):
            assert isinstance(handle, Runnable)
    assert not isinstance(runner.info, Runnable)


async def test_a_future_shows_its_trace_and_what_every_future_has(runner):
    future = runner.submit(1)
    assert shown(future) - shown(asyncio.Future()) == {"trace"}
    await future


async def test_a_view_of_a_view_is_a_view_and_a_runner_is_one_too(runner):
    assert type(runner.options()) is type(runner.options().options()) is RunnerView
    assert isinstance(runner, RunnerView)


@pytest.mark.parametrize("name", sorted(WEIGHTS | FACTS | ENDS))
async def test_what_belongs_to_the_runner_is_refused_on_a_view_with_a_sentence(runner, name):
    view = runner.options(timeout=1)
    assert not hasattr(view, name)
    assert not hasattr(RunnerView, name)
    assert hasattr(Runner, name)
    with pytest.raises(
        AttributeError,
        match=rf"^<RunnerView 'm' on cpu.*>: options\(\) gives a view, and '{name}' "
        r"belongs to the runner\. Use it on the runner that load\(\) returned\.$",
    ):
        getattr(view, name)
    with pytest.raises(AttributeError):
        setattr(view, name, None)


async def test_what_nobody_has_is_refused_as_ever(runner):
    with pytest.raises(AttributeError, match=r"^'RunnerView' object has no attribute 'updates'"):
        _ = runner.options().updates
