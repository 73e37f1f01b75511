"""One runner on several devices: where its requests go, one set of weights, and devices that
leave while it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

import anyio
import pytest
import structlog

import aoti_sched
from aoti_sched import (
    Batching,
    DeviceConfig,
    Limits,
    Priority,
    Scheduler,
    SchedulerConfig,
)
from aoti_sched.queue.invariants import check
from aoti_sched.testing import FakeBackend, FakeCall, ManualClock, settle
from tests.inside import alone, replicas_of, serving, updates_of
from tests.unit.engine.support import Held, until, weights


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


class Pair:
    """A scheduler on fake devices, stepped by hand, and a runner on all of them.

    Its results are the weights they were made with.
    """

    def __init__(self, scheduler, clock, backends):
        self.scheduler = scheduler
        self.clock = clock
        self.backends = backends
        self.seconds = dict.fromkeys(backends, 0.0)

    async def load(self, name="m", devices=None, **options):
        for device, backend in self.backends.items():
            backend.weights[name] = weights(1)
            backend.models[name] = lambda x=None, device=device: self.run(name, device)
        devices = list(self.backends) if devices is None else devices
        return await self.scheduler.load(f"{name}.pt2", devices=devices, **options)

    def run(self, name, device):
        self.clock.advance(self.seconds[device])
        replicas = replicas_of(self.scheduler.runners[name])
        replica = next(replica for replica in replicas if replica.device == device)
        return tuple(replica.container.weights.values())

    async def step(self, device, error=None):
        await self.backends[device].step(error)

    @property
    def running(self):
        return [backend.running for backend in self.backends.values()]

    async def serve(self):
        """Step until nothing runs."""
        while any(self.running):
            for device, backend in self.backends.items():
                if backend.running:
                    await self.step(device)

    async def learn(self, runner):
        """As many runs as it takes to know how long they are, on each."""
        for _ in range(8 * len(self.backends)):
            future = runner.submit()
            await self.step(future.trace.device)
            await future

    def check(self):
        runners = self.scheduler.runners.values()
        for dispatcher in {each.dispatcher for runner in runners for each in replicas_of(runner)}:
            check(dispatcher.queue)


@contextlib.asynccontextmanager
async def devices(count=2, *, lanes=1, auto=False, config=None):
    """What hangs in the block is a TimeoutError after half a minute."""
    clock = ManualClock()
    names = [f"cpu:{number}" for number in range(count)]
    backends = {name: FakeBackend(auto=auto, lanes=lanes, clock=clock, name=name) for name in names}
    async with Scheduler(config, devices=backends, clock=clock) as scheduler:
        its = Pair(scheduler, clock, backends)
        try:
            with anyio.fail_after(30):
                yield its
        finally:
            closing = asyncio.ensure_future(scheduler.terminate())
            await settle()
            for backend in backends.values():
                backend.finish_all()
            await closing


def places(futures):
    return [future.trace.device for future in futures]


# --- where requests go ----------------------------------------------------------------------------


async def test_equal_devices_take_turns():
    async with devices(3) as its:
        runner = await its.load()
        assert places([runner.submit() for _ in range(6)]) == ["cpu:0", "cpu:1", "cpu:2"] * 2
        assert its.running == [1, 1, 1]
        await its.serve()


async def test_a_slower_device_gets_less():
    async with devices() as its:
        runner = await its.load()
        its.seconds = {"cpu:0": 3.0, "cpu:1": 1.0}
        await its.learn(runner)
        futures = [runner.submit() for _ in range(8)]
        assert places(futures).count("cpu:0") == 2
        await its.serve()
        assert await asyncio.gather(*futures) == [(1, 1)] * 8


async def test_what_another_model_keeps_a_device_busy_with_counts():
    async with devices() as its:
        its.seconds = dict.fromkeys(its.seconds, 1.0)
        runner = await its.load()
        await its.learn(runner)
        its.backends["cpu:0"].models["other"] = lambda: its.clock.advance(5.0)
        other = await its.scheduler.load("other.pt2", device="cpu:0")
        for _ in range(8):
            future = other.submit()
            await its.step("cpu:0")
            await future
        running = other.submit()
        assert places([runner.submit() for _ in range(4)]) == ["cpu:1"] * 4
        await its.serve()
        await running


async def test_classes_timeouts_and_tenants_mean_the_same_on_each():
    async with devices() as its:
        runner = await its.load(limits=Limits(tenant_jobs=1))
        blocked = [runner.submit() for _ in range(2)]
        low = [runner.options(priority=Priority.LOW, tenant=name).submit() for name in "ab"]
        late = [runner.options(timeout=1.0, tenant=name).submit() for name in "cd"]
        high = [runner.options(priority=Priority.HIGH, tenant=name).submit() for name in "ef"]
        assert (
            sorted(places(low))
            == sorted(places(late))
            == sorted(places(high))
            == ["cpu:0", "cpu:1"]
        )
        its.clock.advance(1.5)
        for future in late:
            with pytest.raises(
                aoti_sched.DeadlineExceededError, match="runner 'm': the request's timeout of 1"
            ):
                await future
        for device in its.backends:
            await its.step(device)
            await its.step(device)
        assert [future.done() for future in (*blocked, *high, *low)] == [True] * 4 + [False] * 2
        await its.serve()


async def test_a_full_replica_is_passed_over():
    async with devices() as its:
        runner = await its.load(limits=Limits(jobs=2))
        lease_futures = [runner.submit() for _ in range(2 + 4)]
        assert sorted(places(lease_futures)) == ["cpu:0"] * 3 + ["cpu:1"] * 3
        with pytest.raises(
            aoti_sched.QueueFullError, match="runner 'm' has 2 jobs queued, its bound is 2"
        ):
            runner.submit()
        await its.step("cpu:1")
        assert places([runner.submit()]) == ["cpu:1"]
        await its.serve()


async def test_what_one_asks_for_and_gets_is_of_one_runner():
    async with devices() as its:
        runner = await its.load(instances=2)
        info, stats = runner.info, runner.stats()
        assert (runner.name, runner.device, runner.epoch) == ("m", "cpu:0, cpu:1", 1)
        assert (info.device, info.instances, info.epoch) == ("cpu:0, cpu:1", 4, 1)
        assert [one.device for one in info.replicas] == ["cpu:0", "cpu:1"]
        assert dict(its.scheduler.runners) == {"m": runner}
        assert (stats.free_slots, list(stats.replicas)) == (4, ["cpu:0", "cpu:1"])
        assert repr(runner) == "<Runner 'm' on cpu:0, cpu:1>"
        futures = [runner.submit() for _ in range(5)]
        stats = runner.stats()
        assert (stats.submitted, stats.running, stats.queued, stats.phase) == (5, 2, 3, "OPEN")
        assert [one.submitted for one in stats.replicas.values()] == [3, 2]
        await its.serve()
        await asyncio.gather(*futures)
        assert (runner.stats().completed, runner.stats().free_slots) == (5, 4)
        devices_stats = its.scheduler.stats().devices
        assert [devices_stats[name].runners["m"].completed for name in its.backends] == [3, 2]


async def test_a_runner_whose_runs_fail_on_one_device_is_failing(logs):
    async with devices() as its:
        runner = await its.load(on_failure="rebuild")
        for number in range(10):
            future = runner.submit()
            await its.step(future.trace.device, ValueError("no") if number % 2 else None)
            await asyncio.wait([future])
        assert runner.stats().health == "failing"
        (entry,) = [entry for entry in logs if entry["event"] == "runs fail again and again"]
        assert (entry["runner"], entry["device"]) == ("m", "cpu:1")
        await until(lambda: [entry for entry in logs if entry["event"] == "container rebuilt"])


# --- leases ---------------------------------------------------------------------------------------


async def test_leases_are_spread_and_each_stays_where_it_is():
    async with devices() as its:
        runner = await its.load()
        async with runner.lease() as one, runner.options(tenant="t").lease() as other:
            for lease, device in ((one, "cpu:0"), (other, "cpu:1")):
                future = lease.submit()
                assert future.trace.device == device
                await its.step(device)
                assert await future == (1, 1)
            assert runner.stats().held_leases == 2
        assert (runner.stats().held_leases, runner.stats().free_slots) == (0, 2)


async def test_requests_go_past_a_device_whose_slots_are_leased():
    async with devices() as its:
        runner = await its.load()
        async with runner.lease():
            assert places([runner.submit() for _ in range(3)]) == ["cpu:1"] * 3
            await its.serve()


# --- weights --------------------------------------------------------------------------------------


async def test_new_weights_are_on_all_devices_at_one_instant():
    async with devices() as its:
        runner = await its.load()
        old = [runner.submit() for _ in range(2)]
        update = asyncio.ensure_future(runner.update(weights(2)))
        await until(lambda: runner.stats().updating)
        queued = [runner.submit() for _ in range(4)]
        await its.step("cpu:0")
        assert its.running == [0, 1]  # the new set waits for the other device
        await its.step("cpu:1")
        report = await update
        await its.serve()
        assert [await future for future in (*old, *queued)] == [(1, 1)] * 2 + [(2, 2)] * 4
        assert {future.trace.epoch for future in queued} == {2}
        assert (report.runner, report.epoch, report.bytes, report.waited) == ("m", 2, 4, 4)
        assert (runner.epoch, runner.info.previous_epoch) == (2, 1)


async def test_weights_that_can_be_read_but_once_are_on_all_devices():
    async with devices(auto=True) as its:
        runner = await its.load()
        await runner.update((name, value) for name, value in weights(2).items())
        assert [await runner.run() for _ in range(2)] == [(2, 2)] * 2


async def test_the_steps_of_an_update_are_of_one_runner():
    async with devices(auto=True) as its:
        runner = await its.load()
        await runner.stage(weights(2))
        assert [replica.container.inactive for replica in replicas_of(runner)] == [weights(2)] * 2
        assert await runner.extract(inactive=True) == weights(2)
        await runner.discard()
        assert [replica.container.inactive for replica in replicas_of(runner)] == [None] * 2
        with pytest.raises(aoti_sched.UpdateError, match="nothing to publish"):
            await runner.commit()
        await runner.stage(weights(3))
        assert (await runner.commit()).epoch == 2
        assert (await runner.rollback()).epoch == 1
        assert [await runner.run() for _ in range(2)] == [(1, 1)] * 2
        await runner.free_previous()
        assert runner.info.inactive_bytes == 0
        assert await runner.extract() == weights(1)


async def test_several_runners_are_updated_together_wherever_they_are():
    async with devices(auto=True) as its:
        many = await its.load("m")
        one = await its.load("n", ["cpu:1"])
        reports = await its.scheduler.update({many: weights(2), one: weights(2)})
        assert [reports[runner].epoch for runner in (many, one)] == [2, 2]
        assert [await many.run(), await many.run(), await one.run()] == [(2, 2)] * 3


@pytest.mark.parametrize("step", ["stage", "swap"])
async def test_what_fails_on_one_device_changes_nothing_on_the_others(step):
    async with devices(auto=True) as its:
        runner = await its.load()
        replicas_of(runner)[1].container.faults[step] = RuntimeError("no memory")
        with pytest.raises(RuntimeError, match="no memory"):
            await runner.update(weights(2))
        assert [await runner.run() for _ in range(4)] == [(1, 1)] * 4
        assert {replica.epoch for replica in replicas_of(runner)} == {1}
        assert runner.info.staged is False
        await runner.update(weights(3))
        assert [await runner.run() for _ in range(4)] == [(3, 3)] * 4


async def test_a_device_that_can_not_go_back_to_its_weights_leaves():
    async with devices(3, auto=True) as its:
        runner = await its.load()
        first, second, third = replicas_of(runner)
        swap = first.container.swap

        def once():
            swap()
            first.container.swap = fails

        def fails():
            raise RuntimeError("stuck")

        first.container.swap = once
        second.container.faults["swap"] = RuntimeError("no")
        with pytest.raises(RuntimeError, match="no"):
            await runner.update(weights(2))
        assert serving(runner) == (second, third)
        assert [await runner.run() for _ in range(4)] == [(1, 1)] * 4
        await runner.update(weights(3))
        assert [await runner.run() for _ in range(4)] == [(3, 3)] * 4


async def test_an_epoch_to_come_is_waited_for_on_any_device():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.options(min_epoch=2).submit() for _ in range(4)]
        assert (runner.stats().waiting, sorted(places(futures))) == (
            4,
            ["cpu:0"] * 2 + ["cpu:1"] * 2,
        )
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert places(futures) == ["cpu:1"] * 4
        await runner.update(weights(2))
        await its.serve()
        assert await asyncio.gather(*futures) == [(2, 2)] * 4
        await draining


# --- a device leaves ------------------------------------------------------------------------------


async def test_what_is_queued_on_a_device_that_is_drained_moves_and_what_runs_is_finished():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(6)]
        high = [runner.options(priority=Priority.HIGH).submit() for _ in range(2)]
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert places(futures) == ["cpu:0"] + ["cpu:1"] * 5
        assert runner.stats().replicas["cpu:0"].phase == "DRAINING"
        assert not draining.done()
        assert places([runner.submit(), runner.submit()]) == ["cpu:1"] * 2
        await its.step("cpu:0")
        await draining
        assert its.backends["cpu:0"].containers[0].closed
        await its.step("cpu:1")
        await its.step("cpu:1")
        await its.step("cpu:1")
        assert [future.done() for future in high] == [True] * 2  # in their order
        await its.serve()
        assert await asyncio.gather(*futures, *high) == [(1, 1)] * 8
        stats = runner.stats()
        assert (stats.submitted, stats.completed, stats.withdrawn) == (10, 10, 3)
        assert stats.replicas["cpu:0"].phase == "DRAINED"
        assert (stats.phase, [one.device for one in runner.info.replicas]) == ("OPEN", ["cpu:1"])
        its.check()


async def test_who_was_moved_keeps_its_deadline_and_how_long_it_has_waited():
    async with devices() as its:
        runner = await its.load()
        blocked = [runner.submit() for _ in range(2)]
        future = runner.options(timeout=2.0).submit()
        its.clock.advance(1.0)
        draining = asyncio.ensure_future(its.scheduler.drain_device(future.trace.device))
        await settle()
        assert (future.trace.device, future.trace.queued, its.clock.time()) == (
            "cpu:1",
            1000.0,
            1001.0,
        )
        its.clock.advance(1.0)
        with pytest.raises(
            aoti_sched.DeadlineExceededError, match="timeout of 2 s passed while it was queued"
        ):
            await future
        await its.serve()
        await asyncio.gather(draining, *blocked)


async def test_nobody_who_moves_is_refused_for_want_of_room():
    async with devices() as its:
        runner = await its.load(limits=Limits(jobs=2))
        futures = [runner.submit() for _ in range(6)]
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert (runner.stats().queued, runner.stats().waiting) == (2, 2)
        await its.serve()
        assert await asyncio.gather(*futures) == [(1, 1)] * 6
        await draining


async def test_one_that_could_never_be_queued_where_it_has_to_move_is_told(monkeypatch):
    config = SchedulerConfig(devices={"cpu:1": DeviceConfig(limits=Limits(bytes=1))})
    async with devices(config=config) as its:
        runner = await its.load()
        monkeypatch.setattr(FakeCall, "nbytes", 2)
        running, queued = (runner.submit() for _ in range(2))
        assert places([running, queued]) == ["cpu:0"] * 2  # the other one would not take them
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        with pytest.raises(
            aoti_sched.QueueFullError, match="can never be queued: its inputs are 2 bytes"
        ):
            await queued
        await its.serve()
        await asyncio.gather(draining, running)
        its.check()


async def test_one_that_moved_can_be_cancelled():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(4)]
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        futures[2].cancel()
        assert runner.stats().queued == 1
        await its.serve()
        assert [future.cancelled() for future in futures] == [False, False, True, False]
        await draining
        its.check()


async def test_a_lease_on_a_device_that_is_drained_is_held_to_its_end():
    async with devices() as its:
        runner = await its.load()
        async with runner.lease() as lease:
            draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
            await settle()
            futures = [lease.submit() for _ in range(2)]
            assert places(futures) == ["cpu:0"] * 2
            await its.serve()
            assert await asyncio.gather(*futures) == [(1, 1)] * 2
            assert not draining.done()
        await draining


@pytest.mark.parametrize("leaves", ["takes it", "gives up", "gives up when it is granted"])
async def test_who_waits_for_a_lease_moves(leaves):
    async with devices() as its:
        runner = await its.load()
        running = [runner.submit() for _ in range(2)]
        context = runner.lease()
        entering = asyncio.ensure_future(context.__aenter__())
        await settle()
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        if leaves == "gives up":
            entering.cancel()
            await settle()
        await its.step("cpu:0")
        await draining
        if leaves == "gives up when it is granted":
            its.backends["cpu:1"]._executor.step()
            await until(lambda: runner.stats().held_leases == 1)
            running.append(runner.submit())
            entering.cancel()
        else:
            await its.step("cpu:1")
        if leaves == "takes it":
            lease = await entering
            future = lease.submit()
            assert future.trace.device == "cpu:1"
            await its.serve()
            assert await future == (1, 1)
            await context.__aexit__(None, None, None)
        else:
            await asyncio.wait([entering])
            assert entering.cancelled()
        its.check()
        await its.serve()
        await asyncio.gather(*running)
        assert (runner.stats().held_leases, runner.stats().replicas["cpu:1"].free_slots) == (0, 1)


async def test_who_moved_may_have_company():
    async with devices() as its:
        runner = await its.load(batching=True)
        blocked = [runner.submit() for _ in range(2)]
        await settle()
        futures = [runner.submit() for _ in range(6)]
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        await its.serve()
        assert await asyncio.gather(*blocked, *futures) == [(1, 1)] * 8
        assert {future.trace.batch_size for future in futures} == {6}
        await draining


async def test_who_moved_counts_against_its_tenant():
    async with devices() as its:
        runner = await its.load(overflow="wait", limits=Limits(tenant_jobs=1))
        futures = [runner.options(tenant="a").submit() for _ in range(4)]
        assert (runner.stats().queued, runner.stats().waiting) == (2, 0)
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert (runner.stats().queued, runner.stats().waiting) == (1, 1)
        await its.serve()
        await asyncio.gather(draining, *futures)


async def test_draining_a_device_twice_and_giving_up_on_it():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(2)]
        given_up = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        again = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert not again.done()
        await its.serve()
        await again
        assert its.backends["cpu:0"].containers[0].closed
        await its.scheduler.drain_device("cpu:0")
        await asyncio.gather(*futures)


async def test_without_a_device_left_requests_say_why():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(4)]
        first = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        last = asyncio.ensure_future(its.scheduler.drain_device("cpu:1"))
        await settle()
        sentence = (
            "runner 'm': no device is left to run on: 'cpu:0' was drained; 'cpu:1' was drained"
        )
        with pytest.raises(aoti_sched.RunnerClosedError, match=sentence):
            runner.submit()
        with pytest.raises(aoti_sched.RunnerClosedError, match=sentence):
            await runner.lease().__aenter__()
        with pytest.raises(aoti_sched.RunnerClosedError):
            await runner.update(weights(2))
        await its.serve()
        assert await asyncio.gather(*futures) == [(1, 1)] * 4  # what was accepted is finished
        await asyncio.gather(first, last)
        assert dict(its.scheduler.runners) == {}
        with pytest.raises(aoti_sched.RunnerClosedError, match=sentence):
            runner.submit()


async def test_a_runner_on_the_drained_device_alone_finishes_and_is_closed():
    async with devices() as its:
        alone = await its.load("alone", ["cpu:0"])
        elsewhere = await its.load("elsewhere", ["cpu:1"])
        async with alone.lease() as lease:
            draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
            await settle()
            futures = [lease.submit() for _ in range(2)]  # what is held is held to its end
        with pytest.raises(
            aoti_sched.RunnerClosedError, match="no device is left to run on: 'cpu:0' was drained"
        ):
            alone.submit()
        await its.serve()
        await draining
        assert await asyncio.gather(*futures) == [(1, 1)] * 2
        assert dict(its.scheduler.runners) == {"elsewhere": elsewhere}


async def test_a_drained_device_takes_no_models():
    async with devices() as its:
        await its.load()
        await its.scheduler.drain_device("cpu:0")
        for wanted in (["cpu:0", "cpu:1"], ["cpu:0"]):
            with pytest.raises(aoti_sched.ConfigError, match="device 'cpu:0' was drained"):
                await its.load("n", wanted)
        with pytest.raises(aoti_sched.ConfigError, match="device 'cpu:0' was drained"):
            await its.scheduler.load("n.pt2", device="cpu:0")
        one = await its.load("n", "cpu:*")
        assert one.device == "cpu:1"
        with pytest.raises(
            aoti_sched.ConfigError,
            match=r"'cuda:7'.*no such device is in use, but 'cpu:0', 'cpu:1'",
        ):
            await its.scheduler.drain_device("cuda:7")


# --- a device leaves during something else --------------------------------------------------------


async def test_an_update_goes_on_without_a_device_that_leaves_while_it_is_staged():
    async with devices(auto=True) as its:
        runner = await its.load()
        held = Held(replicas_of(runner)[0], "stage")
        update = asyncio.ensure_future(runner.update(weights(2)))
        await held.reached()
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert not draining.done()  # nothing of it is freed before the update is through
        held.go_on()
        assert (await update).epoch == 2
        await draining
        assert [await runner.run() for _ in range(2)] == [(2, 2)] * 2


async def test_an_update_goes_on_without_a_device_whose_staging_fails_when_it_has_left():
    async with devices(auto=True) as its:
        runner = await its.load()
        replicas_of(runner)[0].container.faults["stage"] = RuntimeError("lost")
        held = Held(replicas_of(runner)[0], "stage")
        update = asyncio.ensure_future(runner.update(weights(2)))
        await held.reached()
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        held.go_on()
        assert (await update).bytes == 2
        await draining


async def test_an_update_goes_on_without_a_device_that_leaves_at_the_barrier():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(4)]
        update = asyncio.ensure_future(runner.update(weights(2)))
        await until(lambda: runner.stats().updating)
        replicas_of(runner)[0].container.faults["swap"] = RuntimeError("lost")
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert places(futures) == ["cpu:0", "cpu:1", "cpu:1", "cpu:1"]
        await its.step("cpu:0")
        await its.step("cpu:1")
        assert (await update).epoch == 2
        await its.serve()
        assert await asyncio.gather(*futures) == [(1, 1), (1, 1), (2, 2), (2, 2)]
        await draining
        assert [replica.epoch for replica in replicas_of(runner)] == [1, 2]
        its.check()


@pytest.mark.parametrize(
    "what", ["update", "stage", "commit", "rollback", "free_previous", "extract"]
)
async def test_who_waits_for_its_turn_goes_on_without_a_device_that_leaves_meanwhile(what, logs):
    async with devices(auto=True) as its:
        runner = await its.load()
        await runner.update(weights(2))
        second = replicas_of(runner)[1]
        held = Held(second, "extract" if what == "rollback" else "stage")
        if what == "rollback":  # staging would leave nothing to go back to
            blocking = asyncio.ensure_future(
                updates_of(runner).extract(alone(second), inactive=False)
            )
        else:
            blocking = asyncio.ensure_future(runner.stage(weights(3)))
        await held.reached()
        arguments = [weights(4)] if what in ("update", "stage") else []
        waiting = asyncio.ensure_future(getattr(runner, what)(*arguments))
        await settle()
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert not waiting.done()
        held.go_on()
        await blocking
        await waiting
        await draining
        now = {"update": 4, "commit": 3, "rollback": 1}.get(what, 2)
        assert [await runner.run() for _ in range(2)] == [(now, now)] * 2
        assert not [
            entry for entry in logs if entry["event"] == "weights not staged where none are wanted"
        ]


async def test_an_update_that_loses_its_last_device_fails():
    async with devices(auto=True) as its:
        runner = await its.load()
        held = Held(replicas_of(runner)[0], "stage")
        update = asyncio.ensure_future(runner.update(weights(2)))
        await held.reached()
        drains = [asyncio.ensure_future(its.scheduler.drain_device(name)) for name in its.backends]
        await settle()
        held.go_on()
        with pytest.raises(aoti_sched.RunnerClosedError):
            await update
        await asyncio.gather(*drains)


async def test_closing_waits_for_a_device_that_is_leaving():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(4)]
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        closing = asyncio.ensure_future(runner.aclose())
        await settle()
        with pytest.raises(aoti_sched.RunnerClosedError, match="runner 'm' is draining"):
            runner.submit()
        for _ in range(3):
            await its.step("cpu:1")
        assert not closing.done()
        await its.step("cpu:0")
        await asyncio.gather(closing, draining)
        assert await asyncio.gather(*futures) == [(1, 1)] * 4
        assert all(backend.containers[0].closed for backend in its.backends.values())


async def test_what_is_queued_stays_where_it_is_when_the_runner_is_closing():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(4)]
        closing = asyncio.ensure_future(runner.aclose())
        await settle()
        draining = asyncio.ensure_future(its.scheduler.drain_device("cpu:0"))
        await settle()
        assert places(futures) == ["cpu:0", "cpu:1"] * 2
        await its.serve()
        await asyncio.gather(closing, draining, *futures)


@pytest.mark.parametrize("end", ["drain", "terminate", "aclose"])
async def test_all_replicas_end_together(end):
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(4)]
        ending = asyncio.ensure_future(getattr(runner, end)())
        await settle()
        await its.serve()
        await ending
        states = [future.trace.state for future in futures]
        assert states == ["DONE"] * 2 + (["REVOKED"] if end == "terminate" else ["DONE"]) * 2
        await asyncio.wait(futures)
        assert [future.exception() is None for future in futures] == [
            state == "DONE" for state in states
        ]


# --- a device is lost -----------------------------------------------------------------------------


async def test_what_is_queued_on_a_device_that_is_lost_moves(logs):
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(6)]
        await its.step("cpu:0", aoti_sched.DeviceLostError("it fell off the bus", device="cpu:0"))
        assert places(futures) == ["cpu:0"] + ["cpu:1"] * 5
        with pytest.raises(
            aoti_sched.DeviceLostError, match="fell off"
        ):  # what ran there ends as it ends
            await futures[0]
        await its.serve()
        assert await asyncio.gather(*futures[1:]) == [(1, 1)] * 5
        assert places([runner.submit() for _ in range(2)]) == ["cpu:1"] * 2
        await until(lambda: its.backends["cpu:0"].containers[0].closed)
        (left,) = [entry for entry in logs if entry["event"] == "replica left"]
        assert (left["device"], left["moved"]) == ("cpu:0", 2)
        assert left["why"] == "'cpu:0' was lost: it fell off the bus"
        await its.serve()
        its.check()


def takes_nothing(backend):
    """A device that is found to be lost when the next run is handed to it."""

    def submit(lane, work):
        raise aoti_sched.DeviceLostError("gone", device=backend.name)

    backend._executor.submit = submit


async def test_what_is_queued_on_a_device_that_takes_no_more_runs_moves():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(8)]
        takes_nothing(its.backends["cpu:0"])
        await its.step("cpu:0")  # this one was taken before
        assert places(futures) == ["cpu:0", "cpu:1", "cpu:0", "cpu:1"] + ["cpu:1"] * 4
        with pytest.raises(aoti_sched.DeviceLostError, match="gone"):  # this one had left the queue
            await futures[2]
        await its.serve()
        assert await asyncio.gather(*futures[:2], *futures[3:]) == [(1, 1)] * 7
        its.check()


async def test_a_run_on_the_loop_may_meet_a_lost_device():
    async with devices() as its:
        runner = await its.load(placement="inline")

        def gone():
            raise aoti_sched.DeviceLostError("gone", device="cpu:0")

        replicas_of(runner)[0].container.function = gone
        with pytest.raises(aoti_sched.DeviceLostError, match="gone"):
            await runner.submit()
        assert serving(runner) == replicas_of(runner)[1:]
        assert [await runner.run() for _ in range(2)] == [(1, 1)] * 2


async def test_who_gets_a_lost_device_s_room_is_woken_in_time():
    """What is found out in the midst of one fact's commands is heeded by those that are still
    to be carried out.
    """
    config = SchedulerConfig(devices={"cpu:0": DeviceConfig(limits=Limits(jobs=2))})
    async with devices(lanes=2, config=config) as its:
        runner = await its.load()
        other = await its.load("other", ["cpu:0"])
        gathers = await its.load(
            "gathers", ["cpu:0"], overflow="wait", batching=Batching(max_delay=1.0)
        )
        async with other.lease() as lease:
            futures = [runner.submit() for _ in range(6)]
            gathered = gathers.submit()
            assert gathered.trace.state == "WAITING"
            submit = its.backends["cpu:0"]._executor.submit
            takes_nothing(its.backends["cpu:0"])
            late = lease.options(timeout=5.0).submit()
            its.backends["cpu:0"]._executor.submit = submit
            assert (type(late.exception()), gathered.trace.state) == (
                aoti_sched.DeviceLostError,
                "QUEUED",
            )
            its.clock.advance(1.0)
            assert gathered.trace.state == "RUNNING"
        await its.serve()
        await asyncio.gather(gathered, *futures)


async def test_the_last_device_stays_and_says_itself_that_it_is_lost():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(4)]
        for device in ("cpu:0", "cpu:1", "cpu:1", "cpu:1"):
            await its.step(device, aoti_sched.DeviceLostError(f"{device} is gone", device=device))
        errors = [str(future.exception()) for future in futures]
        assert errors == ["cpu:0 is gone"] + ["cpu:1 is gone"] * 3
        assert [replica.device for replica in serving(runner)] == ["cpu:1"]


async def test_a_lost_device_does_not_stop_an_update_of_the_others():
    async with devices() as its:
        runner = await its.load()
        futures = [runner.submit() for _ in range(2)]
        update = asyncio.ensure_future(runner.update(weights(2)))
        await until(lambda: runner.stats().updating)
        await its.step("cpu:0", aoti_sched.DeviceLostError("gone", device="cpu:0"))
        await its.step("cpu:1")
        assert (await update).epoch == 2
        assert type(futures[0].exception()) is aoti_sched.DeviceLostError
        assert await futures[1] == (1, 1)


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"devices": []}, "name one or more devices, each once"),
        ({"devices": ["cpu:0", "cpu:0"]}, "name one or more devices, each once"),
        ({"devices": ["cpu:0", "cpu:*"]}, "name one or more devices, each once"),
        ({"devices": ["cpu:0"], "device": "cpu:1"}, "give device= or devices=, and not both"),
        ({"devices": "mps:*"}, r"devices='mps:\*': there is none in service"),
    ],
)
async def test_devices_that_can_not_be_meant_are_refused(options, sentence):
    if options["devices"] == "mps:*":
        pytest.importorskip("torch")  # asked how many devices there are
    async with devices() as its:
        its.backends["cpu:0"].models["m"] = lambda: None
        with pytest.raises(aoti_sched.ConfigError, match=sentence):
            await its.scheduler.load("m.pt2", **options)
        assert dict(its.scheduler.runners) == {}


async def test_all_of_a_kind_is_all_there_are():
    async with devices(3) as its:
        assert (await its.load("m", "cpu:*")).device == "cpu:0, cpu:1, cpu:2"


async def test_a_device_is_known_by_the_name_that_it_has_in_the_scheduler():
    backends = {name: FakeBackend({"m": lambda: 1}, auto=True) for name in ("cuda:0", "cuda:1")}
    async with Scheduler(devices=backends) as scheduler:
        runner = await scheduler.load("m.pt2", devices="cuda:*")
        assert [await runner.run() for _ in range(4)] == [1] * 4
        assert [one.completed for one in runner.stats().replicas.values()] == [2, 2]
        await scheduler.drain_device("cuda:0")
        assert [one.device for one in runner.info.replicas] == ["cuda:1"]


async def test_a_load_that_fails_on_one_device_leaves_nothing_on_the_others():
    async with devices() as its:
        its.backends["cpu:0"].models["m"] = lambda: None
        with pytest.raises(aoti_sched.PackageNotFoundError):
            await its.scheduler.load("m.pt2", devices=["cpu:0", "cpu:1"])
        assert its.backends["cpu:0"].containers[0].closed
        await its.load()  # the name is free


async def test_a_cancelled_load_leaves_nothing_anywhere():
    async with devices() as its:
        loading = asyncio.ensure_future(its.load())
        await until(lambda: its.backends["cpu:0"].containers)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await until(lambda: "m" not in its.scheduler._lifecycle._lives)
        await until(lambda: all(c.closed for b in its.backends.values() for c in b.containers))
        assert dict(its.scheduler.runners) == {}


async def test_a_device_that_is_drained_while_a_model_loads_there_does_not_get_it():
    async with devices() as its:
        await its.load()
        backend, load = its.backends["cpu:1"], its.backends["cpu:1"].load
        loaded = []

        def slow(request):
            loaded.append(asyncio.run_coroutine_threadsafe(drained(), loop).result(10))
            return load(request)

        async def drained():
            await its.scheduler.drain_device("cpu:0")
            return True

        loop, backend.load = asyncio.get_running_loop(), slow
        with pytest.raises(aoti_sched.ConfigError, match="device 'cpu:0' was drained"):
            await its.load("n")
        assert loaded
        await until(lambda: all(container.closed for container in its.backends["cpu:0"].containers))


async def test_devices_come_from_a_configuration_too(tmp_path):
    (tmp_path / "it.toml").write_text('[models.m]\npath = "m.pt2"\ndevices = ["cpu:0", "cpu:1"]\n')
    config = aoti_sched.config_file.read_config(tmp_path / "it.toml")
    backends = {
        name: FakeBackend({"m": lambda: 1}, auto=True, name=name) for name in ("cpu:0", "cpu:1")
    }
    async with Scheduler(config, devices=backends) as scheduler:
        assert await scheduler.runners["m"].run() == 1
        assert scheduler.runners["m"].device == "cpu:0, cpu:1"


# --- anything, in any order -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
async def test_each_request_is_answered_once_and_by_one_set_of_weights(seed):
    """Requests, leases, updates, cancellations, and devices that are drained or lost, until one
    is left.
    """
    draw = random.Random(seed)
    async with devices(3, lanes=draw.randint(1, 2)) as its:
        its.seconds = {name: draw.choice([0.0, 1.0, 1.0, 3.0]) for name in its.backends}
        options = {"overflow": "wait", "limits": Limits(jobs=4)} if draw.random() < 0.5 else {}
        runner = await its.load(instances=draw.randint(1, 2), **options)
        futures, tasks, drains, answers = [], [], [], []
        numbers, staying = iter(range(2, 99)), set(its.backends)

        def answered(future):
            answers.append(future)

        async def hold():
            async with runner.lease() as lease:
                for _ in range(2):
                    assert len(set(await lease.run())) == 1

        for _ in range(120):
            what = draw.choices(
                ["submit", "step", "cancel", "update", "hold", "leave", "time"],
                [40, 40, 4, 3, 4, 1, 4],
            )[0]
            if what == "submit":
                wish = {
                    "priority": draw.choice(list(Priority)),
                    "tenant": draw.choice([None, "a", "b"]),
                }
                wish["timeout"] = draw.choice([None, None, 5.0])
                future = runner.options(**wish).submit()
                future.add_done_callback(answered)
                futures.append(future)
            elif what == "step" and any(its.running):
                device = draw.choice(
                    [name for name, backend in its.backends.items() if backend.running]
                )
                error = ValueError("a bad one") if draw.random() < 0.1 else None
                await its.step(device, error)
            elif what == "cancel" and futures:
                draw.choice(futures).cancel()
            elif what == "update":
                tasks.append(asyncio.ensure_future(runner.update(weights(next(numbers)))))
            elif what == "hold":
                tasks.append(asyncio.ensure_future(hold()))
            elif what == "time":
                its.clock.advance(1.0)
            elif what == "leave" and len(staying) > 1:
                device = draw.choice(sorted(staying))
                staying.remove(device)
                if draw.random() < 0.5 and its.backends[device].running:
                    await its.step(device, aoti_sched.DeviceLostError("gone", device=device))
                else:
                    drains.append(asyncio.ensure_future(its.scheduler.drain_device(device)))
            if draw.random() < 0.3:
                await settle()
            its.check()
        while any(its.running) or not all(task.done() for task in (*tasks, *drains)):
            await its.serve()
            await asyncio.sleep(0)
        await settle()
        its.check()
        assert sorted(map(id, answers)) == sorted(map(id, futures))
        for future in futures:
            if not future.cancelled() and future.exception() is None:
                assert len(set(future.result())) == 1
        served = [future for future in futures if future.trace.state == "DONE"]
        by_epoch = {(future.trace.epoch, future.result()) for future in served}
        assert len({epoch for epoch, _ in by_epoch}) == len(by_epoch), (
            "an epoch is one set, on all devices"
        )
        stats = runner.stats()
        ends = stats.completed + stats.failed + stats.cancelled + stats.expired + stats.rejected
        assert stats.submitted == ends + stats.revoked
        for drain in drains:
            await drain
        await asyncio.gather(*tasks, return_exceptions=True)
        assert set(runner.stats().replicas) == set(its.backends)
