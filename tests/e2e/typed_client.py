"""A strictly typed client: type checkers read it in strict mode, and a test runs it.

`assert_type` is for the checkers. `true` also looks at the value, so that no type is a mere claim.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeVar

from typing_extensions import Unpack, assert_type

from aoti_sched import (
    BlockingFuture,
    BlockingLease,
    BlockingRunner,
    BlockingRunnerView,
    BlockingScheduler,
    BlockingSession,
    ConstantSpec,
    Lease,
    LoadSettings,
    MapResults,
    RunFuture,
    Runnable,
    Runner,
    RunnerInfo,
    RunnerStats,
    RunnerView,
    Scheduler,
    SchedulerStats,
    Session,
    Trace,
    UpdateReport,
)

_T = TypeVar("_T")


class Encoder:
    """What was compiled. A real one is a `torch.nn.Module`."""

    def forward(self, words: list[str], scale: int = 1) -> list[int]:
        return [scale * len(word) for word in words]


def true(value: _T, *kinds: type) -> _T:
    """Check that the value is of these kinds at run time."""
    for kind in kinds:
        assert isinstance(value, kind), f"{value!r} is no {kind.__name__}"
    return value


async def call(model: Runnable[[list[str], int], list[int]]) -> list[int]:
    """Take a runner, a view, a lease or a session."""
    first = assert_type(await model.run(["a"], 2), list[int])
    second = assert_type(model.submit(["ab"], 2), RunFuture[list[int]])
    return [*true(first, list), *true(await true(second, RunFuture), list)]


async def words() -> AsyncIterator[list[str]]:
    """Yield what an encoder takes."""
    for word in ("a", "ab"):
        yield [word]


async def load(
    scheduler: Scheduler, stem: str, **settings: Unpack[LoadSettings]
) -> Runner[[list[str], int], list[int]]:
    """Pass settings on."""
    settings["instances"] = 2
    return await scheduler.load(f"{stem}.pt2", signature=Encoder.forward, **settings)


async def main(scheduler: Scheduler) -> None:
    """Use each part of the asyncio face."""
    runner = await scheduler.load("encoder.pt2", signature=Encoder.forward, instances=2)
    true(runner, Runner, RunnerView, Runnable)
    assert_type(true(await runner.run(["abc"]), list), list[int])
    assert_type(true(await runner.run(words=["abc"], scale=3), list), list[int])
    future = assert_type(true(runner.submit(["abc"]), RunFuture), RunFuture[list[int]])
    assert_type(true(await future, list), list[int])
    assert_type(true(future.trace, Trace), Trace)

    view = true(runner.options(timeout=1), RunnerView, Runnable)
    assert_type(true(await view.options().run(["abc"]), list), list[int])
    assert_type(true(view.name, str), str)
    assert_type(true(view.info, RunnerInfo), RunnerInfo)
    assert_type(true(view.stats(), RunnerStats), RunnerStats)
    assert (view.name, view.stats()) == (runner.name, runner.stats())

    async with view.lease() as lease:
        true(lease, Lease, Runnable)
        assert_type(true(await lease.options(timeout=1).run(["abc"]), list), list[int])
        assert await call(lease) == [2, 4]
    async with view.session() as session:
        true(session, Session, Runnable)
        assert_type(true(await session.options(timeout=1).run(["abc"]), list), list[int])
        assert await call(session) == [2, 4]
    assert await call(runner) == [2, 4]
    assert await call(view) == [2, 4]

    results = assert_type(true(runner.map(words()), MapResults), MapResults[list[int]])
    async for result in results:
        assert_type(true(result, list), list[int])
    async for outcome in runner.map([["a"]], errors="return"):
        assert_type(true(outcome, list), "list[int] | Exception")

    assert_type(true(await runner.update({"w": 1}), UpdateReport), UpdateReport)
    assert_type(true(await runner.rollback(), UpdateReport), UpdateReport)
    reports = assert_type(await scheduler.update({runner: {"w": 1}}), "dict[Runner, UpdateReport]")
    true(reports[runner], UpdateReport)
    assert_type(true(runner.constants(), dict), dict[str, ConstantSpec])
    assert_type(true(scheduler.stats(), SchedulerStats), SchedulerStats)

    untyped = assert_type(await scheduler.load("encoder.pt2", name="untyped"), Runner)
    await untyped.run(1, 2, any_thing=3)
    kept: dict[str, Runner] = {"typed": runner, "untyped": untyped}
    for one in kept.values():
        await one.aclose()
    passed = await load(scheduler, "encoder", share=2.0)
    assert_type(true(await passed.run(["abc"], 1), list), list[int])


def blocking(scheduler: BlockingScheduler) -> None:
    """Use each part of the face for plain calls."""
    runner = scheduler.load("encoder.pt2", signature=Encoder.forward)
    true(runner, BlockingRunner, BlockingRunnerView)
    assert_type(true(runner.run(["abc"]), list), list[int])
    future = assert_type(true(runner.submit(["abc"]), BlockingFuture), BlockingFuture[list[int]])
    assert_type(true(future.result(), list), list[int])
    assert_type(true(future.trace, Trace), "Trace | None")
    view = true(runner.options(timeout=1), BlockingRunnerView)
    assert_type(true(view.name, str), str)
    assert_type(true(view.info, RunnerInfo), RunnerInfo)
    assert_type(true(view.stats(), RunnerStats), RunnerStats)
    with view.lease() as lease:
        true(lease, BlockingLease)
        assert_type(true(lease.options().run(["abc"]), list), list[int])
    with view.session() as session:
        true(session, BlockingSession)
        assert_type(true(session.options().run(["abc"]), list), list[int])
    for result in runner.map([["a"], ["b"]]):
        assert_type(true(result, list), list[int])
    assert_type(true(runner.update({"w": 1}), UpdateReport), UpdateReport)
    untyped = assert_type(scheduler.load("encoder.pt2", name="untyped"), BlockingRunner)
    untyped.run(1, 2, any_thing=3)
