"""Runners on fake devices whose results tell which set of weights they ran on, and what must be
true after anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import anyio

from aoti_sched import Limits, Runner, Scheduler
from aoti_sched.config import DeviceConfig, SchedulerConfig
from aoti_sched.queue.invariants import check
from aoti_sched.testing import FakeBackend, ManualClock, settle
from tests.inside import container_of, replica_of

PLACES = {"a": "cpu", "b": "other", "c": "cpu"}
"""Runner by device. An update locks and closes them in the order of (device, name): a, c, b."""


def weights(number):
    """The set of this number: both constants carry it."""
    return {"w": number, "b": number}


class Fleet:
    """A scheduler with runners on two fake devices.

    The set that each was loaded with is number 1.
    """

    def __init__(self, scheduler, clock, backends):
        self.scheduler = scheduler
        self.clock = clock
        self.backends = backends
        self.runners = {}
        self.sets = {}  # of each runner: which set each epoch is

    async def load(self, name, **options):
        device = PLACES[name]
        backend = self.backends[device]
        backend.models[name] = lambda: tuple(container_of(self.runners[name]).weights.values())
        backend.weights[name] = weights(1)
        runner = self.runners[name] = await self.scheduler.load(
            f"{name}.pt2", device=device, **options
        )
        self.sets[runner] = {1: 1}
        return runner

    def __iter__(self):
        return iter(self.runners.values())

    def published(self, reports, number):
        """These reports say that the set of this number was published."""
        for runner, report in reports.items():
            assert report.epoch not in self.sets[runner], "an epoch's number is never used twice"
            self.sets[runner][report.epoch] = number

    async def update(self, number, *runners, **options):
        runners = runners or tuple(self)
        reports = await self.scheduler.update({r: weights(number) for r in runners}, **options)
        self.published(reports, number)
        return reports

    @property
    def epochs(self):
        return [runner.epoch for runner in self]

    async def quiet(self):
        """Wait until no update is under way, those included whose callers have left."""
        await until(lambda: not any(replica_of(runner).weights.lock.locked() for runner in self))
        await settle()

    async def must_be_sound(self):
        """Nothing is lost or mixed, and what each runner says of itself is so; for runners that
        nobody uses now.
        """
        await self.quiet()
        for runner in self:
            replica = replica_of(runner)
            check(replica.dispatcher.queue)
            stats, info = runner.stats(), runner.info
            turns = replica.dispatcher.queue.turns.get(replica.state)
            behind_serves = turns is not None and turns.serving is turns.behind
            container = replica.container
            held = container.weights if behind_serves else container.inactive
            assert (stats.updating, stats.held_leases, stats.running, stats.queued) == (
                False,
                0,
                0,
                0,
            )
            assert stats.free_slots == info.instances
            assert info.inactive_bytes == len(held or {})
            assert (info.staged or info.previous_epoch is not None) == (held is not None)
            assert not (info.staged and info.previous_epoch is not None)
            if info.previous_epoch is not None:
                assert held == weights(self.sets[runner][info.previous_epoch])
            number = self.sets[runner][runner.epoch]
            assert await self.answer(runner) == (runner.epoch, number), runner.name

    async def answer(self, runner):
        """Run once: the epoch that the trace names, and the number of the set that gave the
        result.
        """
        future = runner.submit()
        while not future.done():  # on a backend that is stepped by hand, or not
            if self.backends[runner.device].running:
                await self.backends[runner.device].step()
            await asyncio.sleep(0)
        one, other = await future
        assert one == other, "a run saw one set of weights"
        return future.trace.epoch, one


@contextlib.asynccontextmanager
async def fleet(names="abc", *, auto=True, lanes=2, room=None, **options):
    """A `Fleet`; hand-stepped unless `auto`; each device queues so many jobs as it has `room`.

    What hangs in the block is a TimeoutError after half a minute.
    """
    clock = ManualClock()
    limits = DeviceConfig(limits=Limits(jobs=room))
    config = SchedulerConfig(devices=dict.fromkeys(PLACES.values(), limits))
    backends = {
        name: FakeBackend(auto=auto, lanes=lanes, clock=clock, name=name)
        for name in sorted(set(PLACES.values()))
    }
    async with Scheduler(config, devices=backends, clock=clock) as scheduler:
        its = Fleet(scheduler, clock, backends)
        for name in names:
            await its.load(name, **options)
        try:
            with anyio.fail_after(30):
                yield its
        finally:
            closing = asyncio.ensure_future(scheduler.terminate())
            await settle()
            for backend in backends.values():
                backend.finish_all()
            await closing


class Held:
    """A step of a container that waits in its thread until it is let go on; of a replica, or a
    runner on one device.
    """

    def __init__(self, runner, step):
        self._entered = threading.Event()
        self._go_on = threading.Event()
        replica = replica_of(runner) if isinstance(runner, Runner) else runner
        call = getattr(replica.container, step)

        def held(*args, **kwargs):
            self._entered.set()
            assert self._go_on.wait(60), (
                f"{step} was never let go on"
            )  # a test hangs for half of that
            return call(*args, **kwargs)

        setattr(replica.container, step, held)

    async def reached(self):
        await until(self._entered.is_set)

    def go_on(self):
        self._go_on.set()


async def until(condition):
    """Let others run until it is true; for what a thread does there is no event."""
    late = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < late, "it never came true"
        await asyncio.sleep(0)
