"""The soak: random work on real models, everything that can happen to a request at once, then
nothing is left.

200 clients call four runners with random inputs, cancel, set timeouts, send what does not fit, hold
leases, and close runners that others use, while they are loaded again, and while their weights are
replaced by equal ones. They are tenants of models with different shares, whose queues wait, shed or
predict, and one is built anew when its runs fail. Every request, lease and update ends exactly
once, every result is the eager module's, and at the end nothing is left of it all.
`AOTI_SCHED_SOAK_SECONDS` says how long (10), and `AOTI_SCHED_SOAK_SEED` repeats a run's decisions;
the interleaving is the machine's own.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch
from torch.testing import assert_close

from aoti_sched import (
    DeadlineExceededError,
    DeviceConfig,
    InputMismatchError,
    LeaseError,
    Limits,
    Priority,
    QueueFullError,
    RunError,
    Runner,
    RunnerClosedError,
    Scheduler,
    SchedulerConfig,
    UpdateError,
)
from aoti_sched.backends.aoti.raw_container import RawContainer
from tests.compiled.conftest import EXECUTORS, living_lanes
from tests.models import build

SECONDS = float(os.environ.get("AOTI_SCHED_SOAK_SECONDS", "10"))
SEED = int(os.environ.get("AOTI_SCHED_SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
CLIENTS = 200
INPUTS = 32
TENANTS = (None, "one", "another", "third")
GROWTH = 24 << 20
"""Bytes that the process may grow by in the second half; a leak of a kilobyte per request is
more.
"""


@dataclass
class Model:
    """What to load, and its right answers by input."""

    name: str
    settings: dict[str, object]
    inputs: list[tuple[torch.Tensor, ...]]
    misfits: list[tuple[object, ...]]
    failing: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    answers: list[object] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module = build(self.name).module()
        self.weights = module.state_dict()
        with torch.no_grad():
            self.answers = [module(*args) for args in self.inputs]


def models(rng: random.Random) -> list[Model]:
    torch.manual_seed(rng.randrange(1 << 32))

    def attention_args() -> tuple[torch.Tensor, torch.Tensor]:
        batch, length = rng.randint(1, 8), rng.randint(1, 32)
        return torch.randn(batch, length, 16), torch.arange(length) < torch.randint(
            1, length + 1, (batch, 1)
        )

    return [
        Model(
            "mlp",
            {
                "instances": 2,
                "overflow": "shed",
                "admission": "predictive",
                "limits": Limits(jobs=32),
            },
            [(torch.randn(rng.randint(1, 64), 8),) for _ in range(INPUTS)],
            [
                (torch.randn(65, 8),),
                (torch.randn(2, 8).double(),),
                (),
                (None,),
                (torch.randn(8, 2).t(),),
            ],
        ),
        Model(
            "attention",
            {"overflow": "wait", "limits": Limits(jobs=16, tenant_jobs=8), "share": 2.0},
            [attention_args() for _ in range(INPUTS)],
            [(torch.randn(2, 5, 16), torch.ones(2, 6, dtype=torch.bool)), (torch.randn(2, 5, 16),)],
        ),
        Model(
            "failing",
            {"limits": Limits(jobs=24, tenant_jobs=12), "instances": 2, "on_failure": "rebuild"},
            [(torch.randint(10, (rng.randint(1, 64),)),) for _ in range(INPUTS)],
            [(torch.zeros(3),), (torch.zeros(65, dtype=torch.int64),)],
            [(torch.tensor([10]),), (torch.tensor([3, -11, 4]),)],
        ),
        Model(
            "canary",
            {"timeout": 30.0},
            [(torch.randn(32, 16),) for _ in range(INPUTS)],
            [(torch.randn(31, 16),)],
        ),
    ]


class Soak:
    """One scheduler under 200 clients.

    What began is counted by kind ("request", "lease", "update"), how it ended, too.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.models = models(rng)
        self.runners: dict[str, Runner] = {}
        self.began: Counter[str] = Counter()
        self.ends: Counter[tuple[str, str]] = Counter()
        self.over = False

    async def run(self, seconds: float) -> None:
        self.over = False
        self.began.clear()
        self.ends.clear()
        loop = asyncio.get_running_loop()
        config = SchedulerConfig(devices={"cpu": DeviceConfig(max_wait=0.05)})
        async with Scheduler(config) as scheduler:
            for model in self.models:
                await self.load(scheduler, model)
            loop.call_later(seconds, self.stop)
            clients = [self.client(random.Random(self.rng.random())) for _ in range(CLIENTS)]
            await asyncio.gather(
                *clients,
                self.replace_runners(scheduler, random.Random(self.rng.random())),
                self.replace_weights(random.Random(self.rng.random())),
            )
            for runner in self.runners.values():
                self.account_for(runner)
                await self.must_be_home(runner)
            assert scheduler.stats().devices["cpu"].busy_lanes == 0
            assert scheduler.stats().devices["cpu"].queued == 0
        assert not scheduler.runners
        self.runners.clear()

    def stop(self) -> None:
        self.over = True

    async def load(self, scheduler: Scheduler, model: Model) -> None:
        path = build(model.name).path
        self.runners[model.name] = await scheduler.load(path, name=model.name, **model.settings)

    async def replace_runners(self, scheduler: Scheduler, rng: random.Random) -> None:
        """Close a runner that is in use and load it again, over and over; sometimes give up a
        load midway.
        """
        while not self.over:
            model = rng.choice(self.models)
            runner = self.runners[model.name]
            await (runner.terminate() if rng.random() < 0.5 else runner.aclose())
            self.account_for(runner)
            assert (runner.stats().queued, runner.stats().running, runner.stats().held_leases) == (
                0,
                0,
                0,
            )
            if rng.random() < 0.3:
                task = asyncio.create_task(self.load(scheduler, model))
                for _ in range(rng.randrange(20)):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                if not task.cancelled():
                    task.result()
                    continue
            await self.load(scheduler, model)

    async def replace_weights(self, rng: random.Random) -> None:
        """Update, in one step or two, go back, give up midway: the answers stay the same."""
        while not self.over:
            model = rng.choice(self.models)
            change, expected = self.change(rng, model, self.runners[model.name])
            with self.one("update") as ends:
                task = asyncio.create_task(change)
                if rng.random() < 0.2:
                    for _ in range(rng.randrange(6)):
                        await asyncio.sleep(0)
                    task.cancel()
                    expected = (*expected, asyncio.CancelledError)
                try:
                    await task
                except expected as error:
                    ends(type(error).__name__)
                else:
                    ends("done")

    def change(
        self, rng: random.Random, model: Model, runner: Runner
    ) -> tuple[Coroutine[Any, Any, object], tuple[type[BaseException], ...]]:
        """A change of a runner's weights, and the errors that it may rightly end with."""
        closed = (RunnerClosedError,)
        match rng.randrange(6):
            case 0:
                return runner.update(model.weights), closed
            case 1:
                timeout = rng.choice([1e-4, 1e-3, 1e-2])
                return runner.update(model.weights, timeout=timeout), (
                    *closed,
                    DeadlineExceededError,
                )
            case 2:
                return runner.update({}, partial=True, keep_previous=False), closed
            case 3:
                return runner.rollback(), (*closed, UpdateError)  # nothing is kept
            case 4:
                return runner.stage(model.weights), closed
            case _:
                return runner.commit(), (*closed, UpdateError)  # nothing is staged

    async def client(self, rng: random.Random) -> None:
        calls = (
            self.plain,
            self.plain,
            self.cancelled,
            self.timed_out,
            self.misfit,
            self.failed,
            self.leased,
        )
        while not self.over:
            model = rng.choice(self.models)
            runner = self.runners[model.name]
            await rng.choice(calls)(rng, model, runner)
            # A refusal needs no turn of the loop, and would keep the others from theirs.
            await asyncio.sleep(0)

    # --- what clients do --------------------------------------------------------------------------

    async def plain(self, rng: random.Random, model: Model, runner: Runner) -> None:
        which = rng.randrange(INPUTS)
        view = runner.options(priority=rng.choice(list(Priority)), tenant=rng.choice(TENANTS))
        await self.ending(view.run(*model.inputs[which]), model, which)

    async def cancelled(self, rng: random.Random, model: Model, runner: Runner) -> None:
        which = rng.randrange(INPUTS)
        task = asyncio.create_task(runner.run(*model.inputs[which]))
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        task.cancel()
        await self.ending(task, model, which)

    async def timed_out(self, rng: random.Random, model: Model, runner: Runner) -> None:
        which = rng.randrange(INPUTS)
        view = runner.options(
            timeout=rng.choice([0, 1e-5, 1e-4, 1e-3, 1e-2]), tenant=rng.choice(TENANTS)
        )
        if rng.random() < 0.5:
            await self.ending(view.run(*model.inputs[which]), model, which)
        else:
            await self.ending(
                asyncio.wait_for(runner.run(*model.inputs[which]), 1e-3), model, which
            )

    async def misfit(self, rng: random.Random, model: Model, runner: Runner) -> None:
        with pytest.raises(InputMismatchError, match=f"model '{model.name}'"):
            runner.submit(*rng.choice(model.misfits))

    async def failed(self, rng: random.Random, model: Model, runner: Runner) -> None:
        if model.failing:
            await self.ending(runner.run(*rng.choice(model.failing)), model, None)

    async def leased(self, rng: random.Random, model: Model, runner: Runner) -> None:
        view = runner.options(timeout=rng.choice([0.001, 0.1, 10.0]))
        with self.one("lease") as ends:
            try:
                async with view.lease() as lease:
                    ends("granted")
                    for _ in range(rng.randrange(4)):
                        which = rng.randrange(INPUTS)
                        if rng.random() < 0.2:
                            task = asyncio.create_task(lease.run(*model.inputs[which]))
                            await asyncio.sleep(0)
                            task.cancel()
                            await self.ending(task, model, which)
                        else:
                            await self.ending(lease.run(*model.inputs[which]), model, which)
                    if rng.random() < 0.2:
                        lease.release()
                        with pytest.raises((LeaseError, RunnerClosedError)):
                            lease.submit(*model.inputs[0])
            except (DeadlineExceededError, RunnerClosedError, QueueFullError) as error:
                ends(type(error).__name__)

    async def ending(self, request, model: Model, which: int | None) -> None:
        """Await a request to its one end, which must be a right one."""
        with self.one("request") as ends:
            try:
                result = await request
            except (DeadlineExceededError, RunnerClosedError, QueueFullError) as error:
                ends(type(error).__name__)
            except RunError:
                assert which is None, "a good request failed"
                ends("RunError")
            except asyncio.TimeoutError:
                ends("wait_for")
            except asyncio.CancelledError:
                ends("cancelled")
            else:
                assert which is not None, "a bad request succeeded"
                assert_close(result, model.answers[which])
                ends("right")

    # --- the account ------------------------------------------------------------------------------

    @contextmanager
    def one(self, kind: str) -> Iterator[Callable[[str], None]]:
        """One of this kind begins; within the block it is to tell how it ended, once."""
        self.began[kind] += 1
        ends: list[str] = []
        yield ends.append
        assert len(ends) == 1, f"a {kind} ended {len(ends)} times: {ends}"
        self.ends[kind, ends[0]] += 1

    def account_for(self, runner: Runner) -> None:
        stats = runner.stats()
        ended = ("completed", "failed", "rejected", "expired", "cancelled", "revoked", "shed")
        assert stats.submitted == sum(getattr(stats, kind) for kind in ended), stats

    async def must_be_home(self, runner: Runner) -> None:
        """Whatever callers left behind on the lanes is over: a request of each slot goes
        through.
        """
        model = next(model for model in self.models if model.name == runner.name)
        leases = [runner.lease() for _ in range(runner.info.instances)]
        for lease in leases:
            assert_close(await (await lease.__aenter__()).run(*model.inputs[0]), model.answers[0])
        for lease in leases:
            await lease.__aexit__(None, None, None)
        stats = runner.stats()
        assert (stats.waiting, stats.queued, stats.queued_bytes, stats.running) == (0, 0, 0, 0)
        assert (stats.held_leases, stats.free_slots) == (0, runner.info.instances)


class Census:
    """What a process has: to be the same before and after."""

    def __init__(self) -> None:
        gc.collect()
        objects = gc.get_objects()
        self.tensors = sum(type(each) is torch.Tensor for each in objects)
        self.containers = sum(
            type(each) is RawContainer and each._handle is not None for each in objects
        )
        process = psutil.Process()
        self.descriptors = process.num_fds()
        self.lanes = living_lanes()
        self.memory = process.memory_info().rss


@pytest.mark.soak
@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_soak(executor, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", executor)
    sys.__stderr__.write(
        f"\nsoak on {executor}: seed {SEED}, {SECONDS:g} s (AOTI_SCHED_SOAK_SEED={SEED} repeats "
        f"its decisions)\n"
    )
    rng = random.Random(SEED)
    soak = Soak(rng)
    asyncio.run(soak.run(SECONDS / 2))  # until whatever is allocated once has been
    before = Census()
    asyncio.run(soak.run(SECONDS / 2))
    after = Census()
    sys.__stderr__.write(
        f"soak: {dict(soak.began)} in its second half, memory grew by "
        f"{(after.memory - before.memory) / 2**20:.1f} MiB; "
        f"{ {f'{kind} {end}': count for (kind, end), count in sorted(soak.ends.items())} }\n"
    )
    for kind, began in soak.began.items():
        assert sum(count for (of, _), count in soak.ends.items() if of == kind) == began
    for end in [("request", "right"), ("lease", "granted"), ("update", "done")]:
        assert soak.ends[end] > 0
    assert (after.tensors, after.containers, after.descriptors, after.lanes) == (
        before.tensors,
        before.containers,
        before.descriptors,
        before.lanes,
    )
    assert after.memory - before.memory < GROWTH
