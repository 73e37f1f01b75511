"""A device with less memory than its models want: who is parked, who comes back, and that
nothing is lost on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading

import anyio
import pytest
import structlog

from aoti_sched import (
    ConfigError,
    DeadlineExceededError,
    DeviceConfig,
    LoadError,
    MemoryLimitError,
    Scheduler,
    SchedulerConfig,
    UpdateError,
)
from aoti_sched.queue.invariants import check
from aoti_sched.testing import FakeBackend, ManualClock, settle
from tests.inside import container_of, replica_of, replicas_of, serving
from tests.unit.engine.support import Held, until


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


class Shelf:
    """A scheduler whose device has room for so many bytes; a model's weights are as many as its
    `size`, each one its number.
    """

    def __init__(self, scheduler, backends):
        self.scheduler = scheduler
        self.backends = backends

    async def load(self, name, size=1, **options):
        for device, backend in self.backends.items():
            backend.weights[name] = dict.fromkeys(map(str, range(size)), 1)
            backend.models[name] = lambda device=device: self.numbers(name, device)
        return await self.scheduler.load(f"{name}.pt2", **options)

    def numbers(self, name, device):
        (replica,) = [
            one for one in replicas_of(self.scheduler.runners[name]) if one.device == device
        ]
        return set(replica.container.weights.values())

    def memory(self, device="cpu"):
        return self.scheduler.stats().devices[device].memory

    def check(self):
        runners = self.scheduler.runners.values()
        for dispatcher in {each.dispatcher for runner in runners for each in replicas_of(runner)}:
            check(dispatcher.queue)


@contextlib.asynccontextmanager
async def shelf(limit=2, *, evict="lru", auto=True, devices=("cpu",), **settings):
    """What hangs in the block is a TimeoutError after half a minute."""
    clock = ManualClock()
    one = DeviceConfig(memory_limit=limit, evict=evict, **settings)
    backends = {name: FakeBackend(auto=auto, clock=clock, name=name) for name in devices}
    config = SchedulerConfig(devices=dict.fromkeys(devices, one))
    async with Scheduler(config, devices=backends, clock=clock) as scheduler:
        its = Shelf(scheduler, backends)
        its.clock = clock
        try:
            with anyio.fail_after(30):
                yield its
        finally:
            closing = asyncio.ensure_future(scheduler.terminate())
            await settle()
            for backend in backends.values():
                backend.finish_all()
            await closing


async def test_a_load_that_does_not_fit_is_refused_and_leaves_nothing():
    async with shelf(evict=None) as its:
        a = await its.load("a", 2)
        with pytest.raises(
            MemoryLimitError,
            match=r"device 'cpu': model 'b' needs 1 bytes .* taken: 'a' 2 bytes\. .* evict='lru'",
        ):
            await its.load("b")
        assert its.memory().used == 2
        await a.aclose()
        assert its.memory().used == 0
        assert await (await its.load("b")).run() == {1}


async def test_more_models_than_fit_are_served_in_turn(logs):
    async with shelf() as its:
        runners = [await its.load(name) for name in "abcde"]
        assert [runner.stats().parked for runner in runners] == [True, True, True, False, False]
        for runner in runners * 3:
            assert await runner.run() == {1}
            its.check()
        memory = its.memory()
        assert (memory.limit, memory.used, memory.inactive, memory.parked) == (2, 2, 0, 3)
        assert sum(runner.stats().memory for runner in runners) == 2
        assert all(runner.stats().parks for runner in runners)
        parked = [log for log in logs if log["event"] == "model parked"]
        assert len(parked) == sum(runner.stats().parks for runner in runners)
        assert (parked[0]["runner"], parked[0]["bytes"]) == ("a", 1)
        back = [log for log in logs if log["event"] == "model is back"]
        assert len(parked) - len(back) == 3


async def test_all_at_once_each_gets_its_answer():
    async with shelf() as its:
        runners = [await its.load(name) for name in "abcd"]
        answers = await asyncio.gather(*(runner.run() for _ in range(20) for runner in runners))
        assert answers == [{1}] * 80
        its.check()


async def test_a_request_waits_while_its_model_comes_back_and_may_expire_or_be_cancelled_there():
    async with shelf(1) as its:
        a, b = await its.load("a"), await its.load("b")
        coming = Held(a, "unpark")
        kept, gone = a.submit(), a.submit()
        late = a.options(timeout=1.0).submit()
        await coming.reached()
        assert (a.stats().parked, a.stats().queued, b.stats().parked) == (True, 3, True)
        gone.cancel()
        its.clock.advance(2.0)
        with pytest.raises(DeadlineExceededError, match="while it was queued"):
            await late
        coming.go_on()
        assert await kept == {1}
        its.check()


async def test_when_all_who_asked_have_left_it_comes_back_and_can_be_parked_again():
    async with shelf(1) as its:
        a, b = await its.load("a"), await its.load("b")
        coming = Held(a, "unpark")
        request = a.submit()
        await coming.reached()
        request.cancel()
        coming.go_on()
        assert await b.run() == {1}
        its.check()


async def test_weights_that_cant_be_brought_back_fail_the_requests_and_the_next_tries_again():
    async with shelf(1) as its:
        a, _ = await its.load("a"), await its.load("b")
        container_of(a).faults["unpark"] = OSError("the disk is gone")
        answers = await asyncio.gather(a.run(), a.run(), return_exceptions=True)
        assert [type(error) for error in answers] == [LoadError, LoadError]
        assert (
            "runner 'a' was parked, and its weights can't be brought back: the disk is gone"
            in str(answers[0])
        )
        assert its.memory().used == 0
        assert await a.run() == {1}


async def test_one_that_could_not_be_parked_is_sound():
    async with shelf(1) as its:
        a = await its.load("a")
        container_of(a).faults["park"] = RuntimeError("no")
        b = await its.load("b")
        assert await a.run() == await b.run() == {1}


async def test_held_leases_and_busy_models_stay_for_a_load_and_are_named():
    async with shelf(2, auto=False) as its:
        a, b = await its.load("a"), await its.load("b")
        running = b.submit()
        async with a.lease():
            with pytest.raises(
                MemoryLimitError,
                match=r"'a' 1 bytes \(it has held leases\), 'b' 1 bytes \(it has requests\)",
            ):
                await its.load("c")
        await its.load("c")
        assert (a.stats().parked, b.stats().parked) == (True, False)
        await its.backends["cpu"].step()
        await running


async def test_a_lease_brings_a_model_back():
    async with shelf(1) as its:
        a, b = await its.load("a"), await its.load("b")
        async with a.lease() as lease:
            assert await lease.run() == {1}
            waiting = b.submit()
            await settle()
            assert not waiting.done()
        assert await waiting == {1}


async def test_a_busy_model_makes_way_and_gets_its_turn_again():
    async with shelf(1, auto=False, lanes=1) as its:
        backend = its.backends["cpu"]
        a = await its.load("a")
        b = await its.load("b")
        busy = [b.submit(), b.submit()]
        asking = a.submit()
        await settle()
        assert (backend.running, asking.done()) == (1, False)
        await backend.step()
        assert await busy[0] == {1}
        await backend.step()  # that of a, once it is back; the other of b's waits
        assert await asking == {1}
        assert not busy[1].done()
        await backend.step()
        assert await busy[1] == {1}


# --- updates --------------------------------------------------------------------------------------


async def test_an_update_needs_room_for_two_sets():
    async with shelf(3) as its:
        a, b = await its.load("a", 2), await its.load("b")
        with pytest.raises(
            MemoryLimitError,
            match=r"model 'a' needs 2 bytes .* 'a' 2 bytes \(its weights are being changed\)",
        ):
            await a.update({"0": 2, "1": 2})
        assert (a.epoch, await a.run(), b.stats().parked) == (1, {1}, False)
        await a.aclose()
        report = await b.update({"0": 2})
        assert (report.epoch, its.memory().inactive, b.stats().memory) == (2, 1, 2)
        its.check()


async def test_others_are_parked_for_new_weights_and_previous_ones_are_never_given_up():
    async with shelf(4) as its:
        a, b, c = await its.load("a"), await its.load("b"), await its.load("c")
        await c.update({"0": 2})
        await b.update({"0": 2}, keep_previous=False)
        assert [one.stats().parked for one in (a, b, c)] == [True, False, False]
        with pytest.raises(MemoryLimitError, match=r"'c' 2 bytes \(it keeps the previous set\)"):
            await its.load("d", 3)
        await c.rollback()
        assert await c.run() == {1}
        await c.free_previous()
        assert await (await its.load("d", 4)).run() == {1}
        assert await b.run() == {2}
        assert await c.run() == {1}


async def test_an_update_of_one_that_is_parked_brings_it_back_first():
    async with shelf(2) as its:
        a, b = await its.load("a"), await its.load("b", 2)
        assert a.stats().parked
        waiting = a.options(min_epoch=2).submit()
        assert (await a.update({"0": 2}, keep_previous=False)).epoch == 2
        assert await waiting == {2}
        assert b.stats().parked
        assert await b.run() == {1}
        assert await a.extract() == {"0": 2}


async def test_what_is_not_to_be_had_is_said_and_requests_for_it_fail():
    async with shelf(2) as its:
        a, b = await its.load("a", 2), await its.load("b", 1)
        await b.update({"0": 2})
        with pytest.raises(
            MemoryLimitError,
            match=r"'a' needs 2 bytes .* 'b' 2 bytes \(it keeps the previous set\)",
        ):
            await a.run()
        with pytest.raises(MemoryLimitError):
            await a.update({"0": 2, "1": 2})
        await b.free_previous()
        assert await a.run() == {1}
        its.check()


async def test_an_evicted_model_has_nothing_to_publish_and_is_not_restored_to_say_so():
    async with shelf(1) as its:
        a, b = await its.load("a"), await its.load("b")
        async with b.lease():
            with pytest.raises(UpdateError, match="has nothing to publish"):
                await a.commit()
            with pytest.raises(UpdateError, match="has nothing to go back to"):
                await a.rollback()
        assert a.stats().parked


async def test_an_update_waits_for_one_that_is_just_leaving():
    async with shelf(2) as its:
        a = await its.load("a")
        leaving = Held(a, "park")
        loading = asyncio.ensure_future(its.load("b", 2))
        await leaving.reached()
        update = asyncio.ensure_future(a.update({"0": 2}))
        freed = asyncio.ensure_future(a.free_previous())
        await settle()
        assert not update.done()
        leaving.go_on()
        with pytest.raises(
            MemoryLimitError, match=r"'a' needs 1 bytes .* 'b' 2 bytes \(it is being loaded\)"
        ):
            await update
        await freed
        b = await loading
        assert (await a.update({"0": 2})).epoch == 2
        assert b.stats().parked
        await a.free_previous()
        assert await b.run() == {1}
        its.check()


async def test_an_update_that_is_given_up_while_it_waits_for_memory_gives_it_back():
    async with shelf(2) as its:
        a, b = await its.load("a"), await its.load("b")
        leaving = Held(b, "park")
        update = asyncio.ensure_future(a.update({"0": 2}))
        await leaving.reached()
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update
        leaving.go_on()
        await until(lambda: not replica_of(a).weights.lock.locked())
        assert await b.run() == await a.run() == {1}
        assert its.memory().used == 2
        its.check()


# --- leaving --------------------------------------------------------------------------------------


async def test_a_parked_model_closes():
    async with shelf(1) as its:
        a, b = await its.load("a"), await its.load("b")
        await a.aclose()
        assert container_of(a).closed
        assert its.memory().parked == 0
        assert await b.run() == {1}


async def test_a_model_that_is_on_its_way_finishes_what_it_accepted_and_closes():
    async with shelf(1) as its:
        a, _ = await its.load("a"), await its.load("b")
        coming = Held(a, "unpark")
        request = a.submit()
        await coming.reached()
        closing = asyncio.ensure_future(a.aclose())
        await settle()
        coming.go_on()
        assert await request == {1}
        await closing


async def test_one_that_is_terminated_on_its_way_is_closed_when_it_has_come():
    async with shelf(1) as its:
        a, _ = await its.load("a"), await its.load("b")
        coming = Held(a, "unpark")
        request = a.submit()
        await coming.reached()
        closing = asyncio.ensure_future(a.terminate())
        await settle()
        assert isinstance(request.exception(), Exception)
        assert not container_of(a).closed
        coming.go_on()
        await closing
        assert container_of(a).closed


@pytest.mark.parametrize("queued", [True, False], ids=["terminated", "nothing queued"])
async def test_closing_never_waits_for_the_file_of_a_model_on_its_way(queued):
    """Its weights file is on a network that is dead; other models come and go meanwhile."""
    go_on = threading.Event()
    async with shelf(2) as its:
        a, _ = await its.load("a"), await its.load("b", size=2)
        container, entered = container_of(a), threading.Event()

        def blocks(reading):
            with reading.foreign():
                entered.set()
                assert go_on.wait(60)
            pytest.fail("the container of a closed runner is touched")

        container.unpark = blocks
        request = a.submit()
        await until(entered.is_set)
        if not queued:
            request.cancel()
        c = await its.load("c")
        assert await c.run() == {1}
        await (a.terminate() if queued else a.aclose())
        assert request.cancelled() or isinstance(request.exception(), Exception)
        assert container.closed
        go_on.set()
        await until(lambda: not any(t.name == "aoti weights of a" for t in threading.enumerate()))
        assert its.memory().used == 1


async def test_a_load_that_nobody_waits_for_any_more_gives_its_memory_back():
    async with shelf(2) as its:
        a = await its.load("a", 2)
        leaving = Held(a, "park")
        loading = asyncio.ensure_future(its.load("b", 2))
        await leaving.reached()
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        leaving.go_on()
        assert await a.run() == {1}
        await until(lambda: its.memory().used == 2)
        its.check()


async def test_a_replica_that_is_parked_is_passed_over():
    async with shelf(2, devices=("cpu:0", "cpu:1")) as its:
        both = await its.load("both", devices=["cpu:0", "cpu:1"])
        await its.load("other", 2, device="cpu:0")
        first, second = serving(both)
        assert (first.stats().parked, second.stats().parked, both.stats().parked) == (
            True,
            False,
            False,
        )
        for _ in range(6):
            await both.run()
        assert second.stats().completed == 6
        report = await both.update({"0": 2}, keep_previous=False)
        assert report.epoch == 2
        assert await both.run() == {2}
        await its.scheduler.drain_device("cpu:1")
        assert await both.run() == {2}


async def test_evicting_needs_a_limit():
    async with Scheduler(
        SchedulerConfig(devices={"cpu": DeviceConfig(evict="lru")}),
        devices={"cpu": FakeBackend({"a": int})},
    ) as scheduler:
        with pytest.raises(ConfigError, match=r"devices\.cpu: evict='lru' needs a memory_limit"):
            await scheduler.load("a.pt2")


@pytest.mark.parametrize("seed", range(40))
async def test_random_work_loses_nothing(seed):
    """Clients, leases, updates, loads and closes, at random: each request is answered by its
    own model, or told why not.
    """
    draw = random.Random(seed)
    async with shelf(draw.randint(2, 4)) as its:
        runners = {name: await its.load(name) for name in "abcdef"}
        answered = 0

        async def client(times):
            nonlocal answered
            for _ in range(times):
                runner = draw.choice(list(runners.values()))
                kind = draw.random()
                try:
                    if kind < 0.7:
                        with anyio.move_on_after(draw.choice([0, 0.001, 10])):
                            assert len(await runner.run()) == 1
                            answered += 1
                    elif kind < 0.8:
                        async with runner.lease() as lease:
                            await lease.run()
                    elif kind < 0.95:
                        keep = draw.random() < 0.2
                        await runner.update({"0": draw.randint(2, 9)}, keep_previous=keep)
                    else:
                        await runner.free_previous()
                except MemoryLimitError:
                    pass
                its.check()

        await asyncio.gather(*(client(25) for _ in range(6)))
        for runner in runners.values():
            await runner.free_previous()
        for runner in runners.values():
            numbers = set(container_of(runner).weights.values())
            assert await runner.run() == numbers
        its.check()
        assert answered > 20
