"""`runner.map`: a bounded number of requests over a source, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading

import anyio
import pytest
import structlog

import aoti_sched
from aoti_sched import (
    BlockingScheduler,
    ConfigError,
    InputMismatchError,
    Limits,
    QueueFullError,
    UnsupportedLoopError,
)
from aoti_sched.testing import FakeBackend, fake_scheduler, settle
from tests.inside import replica_of
from tests.unit.engine.support import until


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
async def runner(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x * 2
    return await aoti_scheduler.load("m.pt2", instances=2)


class Source:
    """An endless source that counts what was read, sync and async."""

    def __init__(self, items=None, fault=None):
        self.items = itertools.count() if items is None else iter(items)
        self.fault = fault
        self.read = 0
        self.left = False

    def __iter__(self):
        return self

    def __next__(self):
        item = next(self.items, None)
        if item is None:
            raise self.fault or StopIteration
        self.read += 1
        return item

    async def later(self):
        try:
            for item in self:
                await asyncio.sleep(0)
                yield item
        finally:
            self.left = True


KINDS = ["sync", "async"]


def of_kind(kind, source):
    return source if kind == "sync" else source.later()


async def collect(results, found):
    async for result in results:
        found.append(result)


async def drawn(backend, results):
    """All results, each run finished by itself."""
    backend.finish_all()
    with anyio.fail_after(30):
        return [result async for result in results]


# --- order and back-pressure ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, 100])
async def test_every_item_gives_one_result(aoti_backend, runner, kind, ordered, at_once):
    results = runner.map(of_kind(kind, Source(range(20))), at_once=at_once, ordered=ordered)
    found = await drawn(aoti_backend, results)
    assert (found if ordered else sorted(found)) == [2 * item for item in range(20)]
    assert runner.stats().completed == 20
    assert [result async for result in results] == []  # it is over


@pytest.mark.parametrize("kind", KINDS)
async def test_an_empty_source_gives_nothing(runner, kind):
    assert [result async for result in runner.map(of_kind(kind, Source([])))] == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_source_is_read_no_further_than_results_are_used(aoti_backend, runner, kind):
    source = Source()
    results = runner.map(of_kind(kind, source), at_once=4)
    assert source.read == 0
    aoti_backend.finish_all()
    async for result in results:
        await settle(20)  # the consumer is slow; what runs ends meanwhile
        assert source.read <= result // 2 + 1 + 4
        if result == 20:
            break
    assert source.read in (14, 15)
    await results.aclose()
    assert runner.stats().queued == runner.stats().running == 0


async def test_results_come_as_requests_end_where_no_order_is_asked_for(aoti_backend, runner):
    results = runner.map(iter([1, 2]), ordered=False)
    first = asyncio.ensure_future(anext(results))
    await aoti_backend.running(2)
    works = aoti_backend._executor.pending
    works.rotate(1)  # the second run ends first
    await aoti_backend.step()
    assert await first == 4
    await aoti_backend.step()
    assert [result async for result in results] == [2]


async def test_in_order_a_result_waits_for_those_before_it(aoti_backend, runner):
    results = runner.map([1, 2])
    first = asyncio.ensure_future(anext(results))
    await aoti_backend.running(2)
    aoti_backend._executor.pending.rotate(1)
    await aoti_backend.step()
    assert not first.done()
    await aoti_backend.step()
    assert [await first, await anext(results)] == [2, 4]


async def test_a_result_does_not_wait_for_a_slow_source(aoti_backend, runner):
    more = asyncio.Event()

    async def source():
        yield 1
        await more.wait()
        yield 2

    results = runner.map(source())
    aoti_backend.finish_all()
    with anyio.fail_after(30):
        assert await anext(results) == 2
        rest = asyncio.ensure_future(anext(results))
        await settle()
        assert not rest.done()
        more.set()
        assert await rest == 4


async def test_a_request_that_waits_for_room_counts_as_under_way(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x * 2
    runner = await aoti_scheduler.load("m.pt2", overflow="wait", limits=Limits(jobs=2, waiting=3))
    source = Source(range(10))
    results = runner.map(source, at_once=6)
    first = asyncio.ensure_future(anext(results))
    await settle()
    stats = runner.stats()
    assert (stats.running, stats.queued, stats.waiting, source.read) == (1, 2, 3, 6)
    with pytest.raises(QueueFullError, match="3 requests wait for room, the bound is 3"):
        runner.submit(0)
    aoti_backend.finish_all()
    assert [await first, *await drawn(aoti_backend, results)] == [2 * item for item in range(10)]


# --- the arguments of a request -------------------------------------------------------------------


async def test_items_are_unpacked_where_that_is_asked_for(aoti_backend, runner):
    replica_of(runner).container.function = lambda x, y=0: (x, y)
    assert await drawn(aoti_backend, runner.map([(1, 2), (3,)], unpack=True)) == [(1, 2), (3, 0)]
    assert await drawn(aoti_backend, runner.map([(1, 2)])) == [((1, 2), 0)]


async def test_views_and_leases_map(aoti_backend, runner):
    view = runner.options(timeout=5)
    async with view.lease() as lease:
        assert await drawn(aoti_backend, lease.map([1, 2, 3])) == [2, 4, 6]
    assert await drawn(aoti_backend, view.map([1, 2, 3])) == [2, 4, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"at_once": 0}, "at_once"),
        ({"at_once": True}, "at_once"),
        ({"ordered": 1}, "ordered"),
        ({"unpack": None}, "unpack"),
        ({"errors": "skip"}, r"map\(errors=\): expected 'raise' or 'return'"),
        ({"source": 5}, r"map\(source\): expected an iterable or an async iterable, got 5"),
    ],
)
async def test_a_wrong_argument_is_refused_at_once(runner, settings, message):
    with pytest.raises(ConfigError, match=message):
        runner.map(**{"source": [], **settings})


# --- errors ---------------------------------------------------------------------------------------


def fails_at(number):
    def model(x):
        if x == number:
            raise ValueError(f"no {x}")
        return x * 2

    return model


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_is_raised_in_its_place_and_cancels_the_others(aoti_backend, runner, kind):
    replica_of(runner).container.function = fails_at(3)
    source = Source()
    found = []
    aoti_backend.finish_all()
    results = runner.map(of_kind(kind, source), at_once=4)
    with pytest.raises(ValueError, match="no 3"):
        await collect(results, found)
    assert found == [0, 2, 4]
    assert [result async for result in results] == []
    await settle()
    stats = runner.stats()
    assert (stats.queued, stats.running) == (0, 0)
    assert source.read <= 8
    assert source.left == (kind == "async")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_takes_the_place_of_its_result(aoti_backend, runner, kind):
    replica_of(runner).container.function = fails_at(3)
    results = runner.map(of_kind(kind, Source(range(5))), errors="return")
    found = await drawn(aoti_backend, results)
    assert isinstance(found.pop(3), ValueError)
    assert found == [0, 2, 4, 8]


async def test_a_refused_item_has_its_error_in_its_place(aoti_backend, aoti_scheduler):
    aoti_backend.models["m"] = lambda x: x * 2
    runner = await aoti_scheduler.load("m.pt2", limits=Limits(jobs=1))
    results = runner.map(range(4), errors="return")
    first = asyncio.ensure_future(anext(results))
    await settle()
    aoti_backend.finish_all()
    found = [await first, *await drawn(aoti_backend, results)]
    assert found[:2] == [0, 2]
    assert [type(one) for one in found[2:]] == [QueueFullError] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("errors", ["raise", "return"])
async def test_an_error_of_the_source_comes_after_the_results_before_it(
    aoti_backend, runner, kind, errors
):
    source = Source(range(3), fault=OSError("the disk"))
    found = []
    aoti_backend.finish_all()
    with pytest.raises(OSError, match="the disk"):
        await collect(runner.map(of_kind(kind, source), errors=errors), found)
    assert found == [0, 2, 4]


async def test_a_source_that_is_cancelled_ends_the_mapping_with_that(aoti_backend, runner):
    async def source():
        yield 1
        raise asyncio.CancelledError

    results = runner.map(source())
    aoti_backend.finish_all()
    assert await anext(results) == 2
    with pytest.raises(asyncio.CancelledError):
        await anext(results)


# --- leaving early --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ordered", [True, False])
async def test_leaving_the_loop_cancels_all(aoti_backend, runner, kind, ordered):
    source = Source()

    async def first_of():
        async for result in runner.map(of_kind(kind, source), at_once=5, ordered=ordered):
            return result
        return None

    task = asyncio.ensure_future(first_of())
    await aoti_backend.running(2)
    await aoti_backend.step()
    assert await task == 0
    await settle()
    stats = runner.stats()
    assert (stats.queued, stats.waiting) == (0, 0)
    assert stats.submitted == stats.completed + stats.cancelled
    assert source.left == (kind == "async")


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelling_the_consumer_cancels_all(aoti_backend, runner, kind):
    async def consume():
        async for _ in runner.map(of_kind(kind, Source()), at_once=5):
            pass

    task = asyncio.ensure_future(consume())
    await until(lambda: runner.stats().submitted == 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as kept:  # with the traceback
        await task
    await settle()
    assert (runner.stats().queued, runner.stats().cancelled) == (0, 5), kept
    aoti_backend.finish_all()


async def test_a_wait_that_times_out_loses_nothing(aoti_backend, runner):
    results = runner.map([1, 2])
    for _ in range(3):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(results), 0)
    waiting = asyncio.ensure_future(anext(results))
    await settle()
    waiting.cancel()
    await settle()
    assert await drawn(aoti_backend, results) == [2, 4]
    assert runner.stats().cancelled == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_block_closes_what_is_kept(aoti_backend, runner, kind):
    source = Source()
    async with runner.map(of_kind(kind, source), at_once=5) as results:
        waiting = asyncio.ensure_future(anext(results))
        await until(lambda: runner.stats().submitted == 5)
    assert (runner.stats().queued, runner.stats().cancelled) == (0, 5)
    assert source.left == (kind == "async")
    with pytest.raises(StopAsyncIteration):
        await waiting
    await results.aclose()
    aoti_backend.finish_all()


async def test_a_source_that_ignores_its_cancellation_is_read_no_further(aoti_backend, runner):
    async def stubborn():
        for item in range(100):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            yield item

    async with runner.map(stubborn(), at_once=2) as results:
        waiting = asyncio.ensure_future(anext(results))
        await aoti_backend.running(2)
    submitted = runner.stats().submitted
    await settle(50)
    assert runner.stats().submitted == submitted == 2
    waiting.cancel()
    aoti_backend.finish_all()


async def test_two_tasks_may_not_wait_for_one_mapping(aoti_backend, runner):
    results = runner.map([1, 2])
    first = asyncio.ensure_future(anext(results))
    await settle()
    with pytest.raises(RuntimeError, match="two tasks wait"):
        await anext(results)
    aoti_backend.finish_all()
    assert [await first, await anext(results)] == [2, 4]


async def test_closing_the_runner_ends_the_mapping(aoti_backend, runner):
    results = runner.map(itertools.count(), at_once=3)
    waiting = asyncio.ensure_future(anext(results))
    await settle()
    ending = asyncio.ensure_future(runner.terminate())
    await settle()
    aoti_backend.finish_all()
    await ending
    assert await waiting == 0
    with pytest.raises(aoti_sched.RunnerClosedError):
        await collect(results, [])


def test_another_loop_is_refused():
    async def main():
        backend = FakeBackend({"m": lambda x: x * 2}, auto=True)
        async with fake_scheduler(backend) as scheduler:
            runner = await scheduler.load("m.pt2")
            results = runner.map([1])

            def elsewhere():
                with pytest.raises(UnsupportedLoopError, match="another event loop"):
                    asyncio.run(anext_of(results))

            await asyncio.to_thread(elsewhere)
            assert await anext(results) == 2

    asyncio.run(main())


async def anext_of(results):
    return await anext(results)


async def test_a_mapping_that_dies_in_another_thread_is_cancelled_on_its_loop(aoti_backend, runner):
    results = [runner.map(itertools.count(), at_once=5)]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(anext(results[0]), 0.01)
    assert runner.stats().submitted == 5
    thread = threading.Thread(target=results.clear)
    thread.start()
    thread.join()
    await settle()
    assert runner.stats().cancelled == 5
    aoti_backend.finish_all()


async def test_a_mapping_leaves_nothing_behind(aoti_backend, runner):
    class Item:
        alive = 0

        def __init__(self):
            Item.alive += 1

        def __del__(self):
            Item.alive -= 1

    replica_of(runner).container.function = lambda _: None
    aoti_backend.finish_all()
    gc.collect()
    gc.disable()
    try:
        async for _ in runner.map(Item() for _ in range(50)):
            assert Item.alive <= 34
        async for _ in runner.map(Item() for _ in range(50)):
            break
        await settle()
        assert Item.alive == 0
    finally:
        gc.enable()


# --- plain calls ----------------------------------------------------------------------------------


@pytest.fixture
def blocking():
    backend = FakeBackend({"m": fails_at(7)}, auto=True)
    with BlockingScheduler(devices={"cpu": backend}) as scheduler:
        yield scheduler.load("m.pt2", overflow="wait")


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_a_thread_maps(blocking, ordered, at_once):
    found = list(blocking.map(range(6), at_once=at_once, ordered=ordered))
    assert (found if ordered else sorted(found)) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_thread_reads_no_further_than_it_uses_results(blocking, ordered):
    source = Source()
    for used, _ in enumerate(blocking.map(source, at_once=3, ordered=ordered), 1):
        assert source.read == used + 3
        if used == 3:
            break
    assert blocking.stats().queued == 0


def test_a_thread_gets_errors_as_asked(blocking):
    found = []
    with pytest.raises(ValueError, match="no 7"):
        found.extend(blocking.map(itertools.count(5)))
    assert found == [10, 12]
    results = list(blocking.map(range(6, 9), errors="return"))
    assert (results[0], type(results[1]), results[2]) == (12, ValueError, 16)
    results = blocking.map(Source([1, 2], fault=OSError("the disk")), errors="return")
    assert [next(results), next(results)] == [2, 4]
    with pytest.raises(OSError, match="the disk"):
        next(results)
    with pytest.raises(ConfigError, match="expected an iterable, got"):
        blocking.map(Source().later())
    with pytest.raises(ConfigError, match="at_once"):
        blocking.map([], at_once=0)


def test_a_thread_unpacks_items(blocking):
    assert list(blocking.map([(1,), (2,)], unpack=True)) == [2, 4]
    (error,) = blocking.map([(1, 2)], unpack=True, errors="return")
    assert not isinstance(error, InputMismatchError)
    assert isinstance(error, Exception)
