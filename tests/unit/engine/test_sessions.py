"""Sessions keep their weights over an update, hold no slot, and end in an error that says why."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading

import anyio
import pytest
import structlog

from aoti_sched import (
    BlockingScheduler,
    ConfigError,
    EpochError,
    LeaseError,
    RunnerClosedError,
    RunnerStats,
    Scheduler,
    UpdateError,
)
from aoti_sched.errors import UnsupportedLoopError
from aoti_sched.queue.invariants import check
from aoti_sched.testing import FakeBackend, settle
from tests.inside import container_of, replica_of, replicas_of
from tests.unit.engine.support import Held, fleet, until, weights


@pytest.fixture(autouse=True)
def quiet_logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


def later(awaitable):
    return asyncio.ensure_future(awaitable)


async def answer(handle):
    """Run once: the epoch that the trace names, and the set that gave the result."""
    future = handle.submit()
    one, other = await future
    assert one == other
    return future.trace.epoch, one


# --- what a session is ----------------------------------------------------------------------------


async def test_a_session_keeps_its_weights_over_an_update_and_others_get_the_new_ones():
    async with fleet("a") as its:
        (a,) = its
        async with a.session() as session:
            assert session.epoch == 1
            assert await answer(session) == (1, 1)
            await its.update(2)
            assert [await answer(one) for one in (session, a, session)] == [(1, 1), (2, 2), (1, 1)]
            async with a.session() as newer:
                both = await asyncio.gather(*[answer(one) for one in (session, newer) * 3])
                assert both == [(1, 1), (2, 2)] * 3
        await its.must_be_sound()
        assert a.epoch == 2


async def test_a_session_holds_no_slot():
    async with fleet("a") as its:
        (a,) = its
        async with a.session(), a.session():
            assert a.stats().free_slots == a.info.instances == 1
            assert await answer(a) == (1, 1)
            await its.update(2)
            assert a.stats().free_slots == 1


async def test_what_was_queued_for_a_session_at_the_commit_runs_on_its_weights():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            first, mine, other = a.submit(), session.submit(), a.submit()
            updating = later(a.update(weights(2)))
            await until(lambda: a.stats().updating)
            late = session.submit()
            await its.backends["cpu"].step()
            await updating
            for _ in range(3):
                await its.backends["cpu"].step()
            traces = [one.trace.epoch for one in (first, mine, other, late)]
            assert [await one for one in (first, mine, other, late)] == [
                (1, 1),
                (1, 1),
                (2, 2),
                (1, 1),
            ]
            assert traces == [1, 1, 2, 1]
            stats = a.stats()
            assert (stats.submitted, stats.completed, stats.withdrawn) == (4, 4, 2)


async def test_the_numbers_are_those_of_both_sets():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            running = a.submit()
            waits = [session.submit(), session.submit(), a.submit()]
            stats = a.stats()
            assert (stats.running, stats.queued, stats.updating) == (1, 3, False)
            (of_device,) = its.scheduler.stats().devices["cpu"].runners.values()
            assert isinstance(of_device, RunnerStats)
            assert of_device == stats
            its.backends["cpu"].finish_all()
            await until(lambda: (its.backends["cpu"].finish_all(), a.stats().completed == 4)[1])
            await asyncio.gather(running, *waits)


async def test_options_of_a_session_are_those_of_its_runner_and_it_keeps_its_epoch():
    async with fleet("a") as its:
        (a,) = its
        async with a.options(tag="mine", timeout=5).session() as session:
            future = session.options(timeout=3).submit()
            await future
            assert (future.trace.tag, future.trace.epoch) == ("mine", 1)
            with pytest.raises(ConfigError, match="its requests run on epoch 1"):
                session.options(min_epoch=2)
            await its.update(2)
            assert await answer(session.options(tag="other")) == (1, 1)


async def test_a_session_of_an_epoch_that_is_yet_to_come_is_refused():
    async with fleet("a") as its:
        (a,) = its
        with pytest.raises(ConfigError, match="Begin the session when that epoch is published"):
            async with a.options(min_epoch=2).session():
                pass
        with pytest.raises(ConfigError, match="blocks_updates"):
            a.session(blocks_updates=1)


async def test_a_session_belongs_to_its_loop_and_to_an_open_runner():
    async with fleet("a") as its:
        (a,) = its
        caught = []

        def elsewhere():
            try:
                asyncio.run(a.session().__aenter__())
            except UnsupportedLoopError as error:
                caught.append(error)

        await asyncio.to_thread(elsewhere)
        assert "another event loop" in str(caught[0])
        await a.aclose()
        with pytest.raises(RunnerClosedError, match="takes no requests any more"):
            async with a.session():
                pass


async def test_a_session_that_has_ended_takes_no_requests_and_finishes_those_it_took():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            future = session.submit()
        with pytest.raises(EpochError, match="call it inside its block"):
            session.submit()
        session.end()
        await its.backends["cpu"].step()
        assert await future == (1, 1)


async def test_requests_of_a_session_that_has_ended_keep_its_weights_until_they_end():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            first, mine = a.submit(), session.submit()
        updating = later(a.update(weights(2), keep_previous=False))
        await until(lambda: a.stats().updating)
        last = a.submit()
        await its.backends["cpu"].step()
        await updating
        assert a.info.previous_epoch == 1
        for _ in range(2):
            await its.backends["cpu"].step()
        assert [await one for one in (first, mine, last)] == [(1, 1), (1, 1), (2, 2)]
        assert mine.trace.epoch == 1
        await until(lambda: a.info.previous_epoch is None)


async def test_an_update_waits_for_the_requests_of_a_session_that_blocks_it():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session(blocks_updates=True) as session:
            await its.update(2)
            mine = session.submit()
        updating = later(its.update(3))
        await settle()
        await its.backends["cpu"].step()
        assert await mine == (1, 1)
        await updating
        assert a.epoch == 3


# --- two sets, and not three ----------------------------------------------------------------------


async def test_the_requests_of_a_session_fail_once_the_second_update_writes():
    async with fleet("a") as its:
        (a,) = its
        async with a.session() as old, a.options().session() as older:
            await its.update(2)
            async with a.session() as newer:
                await its.update(3)
                for one in (old, older):
                    with pytest.raises(EpochError, match="weights of epoch 1 are gone"):
                        one.submit()
                assert [await answer(one) for one in (newer, a)] == [(2, 2), (3, 3)]
        await its.must_be_sound()


async def test_queued_requests_of_a_session_fail_too_and_running_ones_are_finished():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            running, queued = session.submit(), session.submit()
            await settle()
            updating = later(its.update(3))
            with pytest.raises(EpochError, match="epoch 1 are gone"):
                await queued
            await its.backends["cpu"].step()
            assert await running == (1, 1)
            await updating
        assert await its.answer(a) == (3, 3)


async def test_an_update_waits_for_a_session_that_blocks_updates(quiet_logs):
    async with fleet("a") as its:
        (a,) = its

        async def long():
            async with a.session(blocks_updates=True) as session:
                await its.update(2)
                entered.set()
                while not leave.is_set():
                    assert await answer(session) == (1, 1)
                    await asyncio.sleep(0)

        entered, leave = asyncio.Event(), asyncio.Event()
        task = later(long())
        await entered.wait()
        updating = later(its.update(3))
        for _ in range(20):
            await asyncio.sleep(0)
        its.clock.advance(1.5)
        await settle()
        assert [log["sessions"] for log in quiet_logs if "waits for sessions" in log["event"]] == [
            1
        ]
        assert a.epoch == 2
        assert not updating.done()
        leave.set()
        await task
        await updating
        assert await its.answer(a) == (3, 3)


async def test_an_update_that_waits_for_a_session_can_be_given_up():
    async with fleet("a") as its:
        (a,) = its
        async with a.session(blocks_updates=True) as session:
            await its.update(2)
            updating = later(its.update(3))
            for _ in range(20):
                await asyncio.sleep(0)
            updating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await updating
            assert await answer(session) == (1, 1)
            closing = later(its.update(3))
            for _ in range(20):
                await asyncio.sleep(0)
            await a.aclose()
            with pytest.raises(RunnerClosedError):
                await closing


async def test_a_task_does_not_wait_for_its_own_session():
    async with fleet("a") as its:
        (a,) = its
        async with a.session(blocks_updates=True):
            await a.update(weights(2))
            for call in (a.update(weights(3)), a.stage(weights(3)), a.free_previous()):
                with pytest.raises(LeaseError, match="its caller has one"):
                    await call


async def test_a_failed_update_leaves_the_others_alone():
    async with fleet("a") as its:
        (a,) = its
        await its.update(2)
        async with a.session() as session:
            with pytest.raises(Exception, match="is missing"):
                await a.update({"w": 1})
            await its.update(3)
            assert [await answer(one) for one in (session, a)] == [(2, 2), (3, 3)]


async def test_the_previous_set_is_kept_until_the_last_session_leaves():
    async with fleet("a") as its:
        (a,) = its
        async with a.session() as one:
            async with a.session() as other:
                await its.update(2, keep_previous=False)
                assert a.info.previous_epoch == 1
                assert await answer(other) == (1, 1)
            assert await answer(one) == (1, 1)
            assert a.info.inactive_bytes
        await until(lambda: not a.info.inactive_bytes)
        await its.must_be_sound()
        async with a.session():
            await its.update(3, keep_previous=False)
            await a.aclose()
        await settle()


async def test_free_previous_ends_the_sessions_that_keep_it():
    async with fleet("a") as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            await a.free_previous()
            assert not a.info.inactive_bytes
            with pytest.raises(EpochError):
                session.submit()


# --- back and forth -------------------------------------------------------------------------------


async def test_a_rollback_exchanges_who_is_behind():
    async with fleet("a") as its:
        (a,) = its
        async with a.session() as old:
            await its.update(2)
            async with a.session() as new:
                for _ in range(2):
                    await a.rollback()
                    assert await answer(a) == (1, 1)
                    assert [await answer(one) for one in (new, old)] == [(2, 2), (1, 1)]
                    await a.rollback()
                    assert await answer(a) == (2, 2)
                    assert [await answer(one) for one in (new, old)] == [(2, 2), (1, 1)]
        await its.must_be_sound()


async def test_queued_requests_follow_their_weights_through_a_rollback():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as old:
            await its.update(2)
            async with a.session() as new:
                first = a.submit()
                waits = [one.submit() for one in (old, new, a, old, new)]
                rolling = later(a.rollback())
                await settle()
                done = later(asyncio.gather(first, *waits))
                while not done.done():
                    its.backends["cpu"].finish_all()
                    await asyncio.sleep(0)
                await rolling
                assert await done == [(2, 2), (1, 1), (2, 2), (1, 1), (1, 1), (2, 2)]


async def test_weights_are_extracted_while_the_published_ones_serve():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            future = session.submit()
            await settle()
            extracting = later(a.extract())
            await settle()
            await its.backends["cpu"].step()
            assert await extracting == weights(2)
            assert await a.extract(inactive=True) == weights(1)
            assert await future == (1, 1)


async def test_a_container_that_is_rebuilt_has_no_set_for_sessions():
    async with fleet("a", on_failure="rebuild") as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            broken = its.backends["cpu"].models["a"]
            its.backends["cpu"].models["a"] = container_of(a).function = lambda: 1 / 0
            for _ in range(5):
                with pytest.raises(Exception, match="zero"):
                    await a.run()
            container_of(a).function = broken
            await until(lambda: a.info.previous_epoch is None)
            with pytest.raises(EpochError):
                session.submit()
            assert await its.answer(a) == (2, 2)


async def test_weights_that_cant_be_exchanged_end_the_runner_and_no_request_is_left():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            running = a.submit()
            waits = [session.submit(), a.submit()]
            container_of(a).faults["swap"] = RuntimeError("broken")
            await its.backends["cpu"].step()
            assert await running == (2, 2)
            for one in waits:
                with pytest.raises(RunnerClosedError):
                    await one
            with pytest.raises(RunnerClosedError):
                session.submit()
            with pytest.raises(RunnerClosedError):
                await a.update(weights(3))


# --- leases, ends, replicas -----------------------------------------------------------------------


async def test_a_session_that_is_behind_waits_for_leases_and_not_for_its_own_callers():
    async with fleet("a", instances=2) as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            async with a.lease() as lease:
                with pytest.raises(LeaseError, match="session that is behind"):
                    session.submit()
                waits = later(elsewhere(session))
                assert await answer(lease) == (2, 2)
                assert await answer(a) == (2, 2)
                await settle()
                assert not waits.done()
            assert await waits == (1, 1)


async def elsewhere(session):
    return await answer(session)


async def test_a_drain_finishes_the_requests_of_sessions():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            futures = [a.submit(), session.submit(), a.submit(), session.submit()]
            closing = later(a.aclose())
            done = later(asyncio.gather(*futures))
            while not done.done():
                its.backends["cpu"].finish_all()
                await asyncio.sleep(0)
            assert await done == [(2, 2), (1, 1), (2, 2), (1, 1)]
            await closing
            with pytest.raises((RunnerClosedError, EpochError)):
                session.submit()


async def test_a_termination_fails_what_is_queued_on_both_sets():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            running, *queued = [a.submit(), session.submit(), a.submit()]
            closing = later(a.terminate())
            await settle()
            its.backends["cpu"].finish_all()
            assert await running == (2, 2)
            for one in queued:
                with pytest.raises(RunnerClosedError):
                    await one
            await closing


async def test_a_runner_that_closes_in_the_midst_of_a_commit_finishes_its_sessions_requests():
    async with fleet("a", auto=False) as its:
        (a,) = its
        async with a.session() as session:
            running, mine = a.submit(), session.submit()
            updating = later(a.update(weights(2)))
            await until(lambda: a.stats().updating)
            closing = later(a.aclose())
            await settle()
            ends = later(asyncio.gather(running, mine, return_exceptions=True))
            while not ends.done():
                its.backends["cpu"].finish_all()
                await asyncio.sleep(0)
            first, second = await ends
            assert first == (1, 1)
            assert second == (1, 1) or isinstance(second, RunnerClosedError)
            await asyncio.gather(updating, return_exceptions=True)
            await closing


async def test_replicas_serve_sessions_and_a_drained_device_hands_their_requests_on():
    names = ["cpu:0", "cpu:1"]
    backends = {name: FakeBackend(auto=False, name=name) for name in names}
    async with Scheduler(devices=backends) as scheduler:
        for backend in backends.values():
            backend.models["m"] = lambda: None
            backend.weights["m"] = weights(1)
        m = await scheduler.load("m.pt2", devices=names)
        for replica in replicas_of(m):
            replica.container.function = lambda one=replica.container: one.weights["w"]
        async with m.session() as session:
            await m.update(weights(2))
            futures = [session.submit() for _ in range(6)]
            assert {one.trace.device for one in futures} == set(names)
            draining = later(scheduler.drain_device("cpu:1"))
            done = later(asyncio.gather(*futures))
            while not done.done() or not draining.done():
                for backend in backends.values():
                    backend.finish_all()
                await asyncio.sleep(0)
            assert await done == [1] * 6
            assert m.stats().submitted == 6
            more = session.submit(), m.submit()
            both = later(asyncio.gather(*more))
            while not both.done():
                backends["cpu:0"].finish_all()
                await asyncio.sleep(0)
            assert await both == [1, 2]


async def test_a_load_may_not_take_the_name_of_a_second_record():
    async with fleet("a") as its:
        with pytest.raises(ConfigError, match="can't be a name"):
            await its.scheduler.load("a.pt2", name="a (sessions)")


def test_a_thread_has_sessions_too():
    backend = FakeBackend({"m": lambda x: x + 1}, auto=True)
    with BlockingScheduler(devices={"cpu": backend}) as scheduler:
        m = scheduler.load("m.pt2")
        with m.session() as session:
            assert (session.epoch, session.run(1), session.options(timeout=60).run(2)) == (1, 2, 3)
            assert list(session.map([1, 2])) == [2, 3]
            assert session.options(tenant="ada").submit(4).result(60) == 5
        with pytest.raises(EpochError, match="has ended"):
            session.run(1)
        session.end()
    with pytest.raises(RunnerClosedError), m.session():
        pass
    assert threading.active_count() < 20


# --- anything, in any order -----------------------------------------------------------------------


class Walk:
    """Random calls of a runner with sessions. Each request runs on the set that it asked for."""

    def __init__(self, seed, its):
        self.draw = random.Random(seed)
        self.its = its
        (self.a,) = its
        self.sessions = []
        self.requests = []  # (future, epoch or None, whether its session blocks updates)
        self.tasks = []
        self.number = 1
        self.published = {1: 1}

    async def begin(self):
        blocks = self.draw.random() < 0.2
        context = self.a.session(blocks_updates=blocks)
        self.sessions.append((context, await context.__aenter__(), blocks))

    async def end(self):
        if self.sessions:
            context, _, _ = self.sessions.pop(self.draw.randrange(len(self.sessions)))
            await context.__aexit__(None, None, None)

    async def submit(self):
        draw = self.draw
        if self.sessions and draw.random() < 0.7:
            _, session, blocks = draw.choice(self.sessions)
            with contextlib.suppress(EpochError):
                self.requests.append((session.submit(), session.epoch, blocks))
        else:
            self.requests.append((self.a.submit(), None, False))

    async def cancel(self):
        if self.requests:
            self.draw.choice(self.requests)[0].cancel()

    async def update(self):
        self.number += 1
        number, keep = self.number, self.draw.random() < 0.8

        async def change():
            report = await self.a.update(weights(number), keep_previous=keep)
            self.published[report.epoch] = number

        self.tasks.append(later(change()))

    async def rollback(self):
        self.tasks.append(later(self.a.rollback()))

    async def extract(self):
        self.tasks.append(later(self.a.extract()))

    async def step(self):
        self.its.backends["cpu"].finish_all()
        await settle()

    async def walk(self, steps):
        acts = [self.begin, self.end, *[self.submit] * 4, self.cancel, self.update, self.rollback]
        acts += [self.extract, *[self.step] * 3]
        for _ in range(steps):
            await self.draw.choice(acts)()
            check(replica_of(self.a).dispatcher.queue)
        while self.sessions:
            await self.end()
        with anyio.fail_after(30):
            while not all(one.done() for one in (*self.tasks, *[r for r, _, _ in self.requests])):
                await self.step()
        for end in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(end, BaseException):
                assert isinstance(end, UpdateError)
                assert "nothing to go back to" in str(end)
        for future, epoch, blocks in self.requests:
            if future.cancelled():
                continue
            try:
                one, other = await future
            except EpochError:
                assert epoch is not None
                assert not blocks
                continue
            assert one == other == self.published[future.trace.epoch]
            assert epoch in (None, future.trace.epoch)


@pytest.mark.parametrize("share", range(4))
async def test_in_random_walks_each_request_runs_on_the_set_it_asked_for(share):
    for seed in range(share, 60, 4):
        async with fleet("a", auto=False, instances=2) as its:
            try:
                await Walk(seed, its).walk(60)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error


async def test_an_update_holds_the_turns_while_it_stages():
    async with fleet("a") as its:
        (a,) = its
        async with a.session() as session:
            await its.update(2)
            held = Held(a, "extract")
            extracting = later(a.extract())
            await held.reached()
            waits = later(answer(session))
            assert await answer(a) == (2, 2)
            assert not waits.done()
            held.go_on()
            assert await extracting == weights(2)
            assert await waits == (1, 1)
