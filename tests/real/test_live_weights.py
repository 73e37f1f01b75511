"""New weights under full load, on really compiled models: each answer shows which set it was computed from.

A client notes what had been published before and after each request, so what an answer may show is known exactly: one
of the epochs that served meanwhile, the one that its trace names, and nothing mixed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random

import anyio
import psutil
import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from aoti_sched import ConstantMismatchError, Runner, Scheduler, UpdateError
from examples.semantic_search import packages
from tests.models import build
from tests.real.conftest import EXECUTORS

CLIENTS = 64


def canary_weights(number: int) -> dict[str, torch.Tensor]:
    """A set whose constants all carry one number."""
    return {
        "first": torch.full((16, 16), float(number)),
        "middle": torch.full((64,), float(number)),
        "count": torch.full((3, 3), number),
        "last": torch.full((5, 7), float(number)),
    }


def number_in(outputs: tuple[torch.Tensor, torch.Tensor]) -> int:
    """The one number that all constants carried during the run."""
    numbers = set(outputs[0].flatten().tolist())
    assert len(numbers) == 1, f"torn weights: {sorted(numbers)}"
    return int(numbers.pop())


class Served(logging.Handler):
    """Runners of one model whose weights change while clients call them in turn.

    The log tells of a publication in the very turn of the loop in which it happens, so `history` is never late.
    """

    def __init__(self, *runners: Runner) -> None:
        super().__init__()
        self.runners = runners
        self.history = [1]  # the epochs that served, one after the other
        self.numbers = {1: 1}  # what the set of each epoch carries
        self.answers = 0
        self.over = False

    def emit(self, record: logging.LogRecord) -> None:
        del record
        epoch = self.runners[0].epoch
        if epoch != self.history[-1]:
            self.history.append(epoch)

    async def client(self) -> None:
        x = torch.randn(32, 16)
        while not self.over:
            began, epochs = len(self.history), []
            for runner in self.runners:
                before = len(self.history)
                future = runner.submit(x)
                number = number_in(await future)
                epoch = future.trace.epoch
                assert number == self.numbers[epoch]
                assert epoch in self.history[before - 1 :]
                epochs.append(epoch)
                self.answers += 1
            if began == len(self.history):  # nothing was published meanwhile
                assert len(set(epochs)) == 1
            await asyncio.sleep(0)  # runs that go inline need no turn of the loop

    async def change(self, scheduler: Scheduler, times: int, rng: random.Random) -> None:
        """Update, stage and commit, roll back, at random; then let the clients end."""
        for number in range(2, times + 2):
            back = self.runners[0].info.previous_epoch
            if back is not None and rng.random() < 0.2:
                reports = await scheduler.rollback(*self.runners)
                assert {report.epoch for report in reports.values()} == {back}
                continue
            epoch = max(self.numbers) + 1
            self.numbers[epoch] = number
            weights = {runner: canary_weights(number) for runner in self.runners}
            if rng.random() < 0.2:
                for runner in self.runners:
                    await runner.stage(weights[runner])
                reports = await scheduler.commit(*self.runners)
            else:
                reports = await scheduler.update(weights)
            assert {report.epoch for report in reports.values()} == {epoch}
        self.over = True

    async def under_load(self, scheduler: Scheduler, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
        logger = logging.getLogger("aoti_sched")
        monkeypatch.setattr(logger, "handlers", [self])
        monkeypatch.setattr(logger, "propagate", False)
        monkeypatch.setattr(logger, "disabled", False)
        logger.setLevel(logging.INFO)
        try:
            clients = [self.client() for _ in range(CLIENTS)]
            with anyio.fail_after(240):
                await asyncio.gather(self.change(scheduler, times, random.Random(times)), *clients)
        finally:
            logger.setLevel(logging.NOTSET)
        assert len(self.history) == times + 1
        assert self.answers > times
        for runner in self.runners:
            stats = runner.stats()
            assert (stats.failed, stats.rejected, stats.revoked, stats.expired) == (0, 0, 0, 0)
            assert stats.completed == stats.submitted


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    return request.param


@pytest.mark.parametrize("placement", ["lane", "auto"])
async def test_each_of_a_thousand_sets_is_seen_whole_and_where_the_trace_says(
    executor, placement, monkeypatch
):
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path, instances=3, placement=placement, overflow="wait")
        await Served(runner).under_load(scheduler, 1000, monkeypatch)


@pytest.mark.parametrize("count", [2, 4])
async def test_runners_that_are_updated_together_are_never_seen_apart(executor, count, monkeypatch):
    async with Scheduler() as scheduler:
        path = build("canary").path
        runners = [
            await scheduler.load(path, name=f"canary{index}", instances=1 + index % 2)
            for index in range(count)
        ]
        await Served(*runners).under_load(scheduler, 200, monkeypatch)


@pytest.mark.parametrize("name", ["folding", "folded_output", "weights_blob", "weights_pickle", "mlp"])
async def test_answers_are_the_eager_modules_on_the_epochs_weights(executor, name):
    """Folded constants, weights that lie beside the library, several instances."""
    built = build(name)
    over = False
    sets, expected = {}, {}

    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path, instances=2)
        module = built.module()
        values = {key: value for key, value in module.state_dict().items() if key in runner.constants()}
        with torch.no_grad():
            for epoch in range(1, 41):
                sets[epoch] = {key: value.clone() for key, value in values.items()}
                expected[epoch] = module(*built.args)
                for value in values.values():
                    value.add_(torch.randn_like(value) * 0.5)

        async def client():
            while not over:
                future = runner.submit(*built.args)
                answer = await future
                assert_close(answer, expected[future.trace.epoch], rtol=1e-4, atol=1e-4)
                await asyncio.sleep(0)

        async def change():
            nonlocal over
            for epoch in range(2, 41):
                report = await runner.update(sets[epoch])
                assert report.epoch == epoch
                if epoch % 5 == 0:
                    await runner.rollback()
                    await asyncio.sleep(0.002)
                    assert (await runner.rollback()).epoch == epoch
            over = True

        with anyio.fail_after(120):
            await asyncio.gather(change(), *(client() for _ in range(16)))
        assert runner.stats().failed == 0


async def test_minilms_embeddings_change_with_its_weights_and_come_back_bit_for_bit():
    encoder = packages.ensure_packages(Console(quiet=True))["encoder"]
    tokens = torch.randint(1000, 20000, (4, 16))
    mask = torch.ones_like(tokens)
    async with Scheduler() as scheduler:
        runner = await scheduler.load(encoder)
        before = await runner.run(tokens, mask)
        weights = await runner.extract()
        changed = {
            name: value * 1.01 if value.is_floating_point() else value
            for name, value in weights.items()
            if runner.constants()[name].type != "folded"
        }
        report = await runner.update(changed, check_finite=True)
        assert report.bytes > 80_000_000
        during = await runner.run(tokens, mask)
        assert not torch.allclose(during, before)
        await runner.rollback()
        assert torch.equal(await runner.run(tokens, mask), before)
        await runner.rollback()
        assert torch.equal(await runner.run(tokens, mask), during)


async def test_a_thousand_updates_leave_nothing_behind():
    process = psutil.Process()
    sets = [canary_weights(number) for number in range(8)]
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path, instances=2)

        async def updates(count):
            for number in range(count):
                await runner.update(sets[number % 8])
                if number % 100 == 0:
                    await runner.free_previous()
            gc.collect()
            return process.memory_info().rss, process.num_fds()

        await updates(300)
        memory, descriptors = await updates(200)
        after, descriptors_after = await updates(1000)
    assert after - memory < 4 << 20
    assert descriptors_after == descriptors


async def test_a_refused_set_lists_every_fault_and_changes_nothing():
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path)
        await runner.update(canary_weights(2))
        bad = canary_weights(3)
        bad["first"] = torch.zeros(16, 15)
        bad["middle"] = bad["middle"].double()
        del bad["count"]
        bad["surplus"] = torch.zeros(1)
        with pytest.raises(ConstantMismatchError) as caught:
            await runner.update(bad)
        assert {fqn for fqn, _ in caught.value.faults} == {"first", "middle", "count", "surplus"}
        assert all(fqn in str(caught.value) for fqn in ("first", "middle", "count", "surplus"))
        assert runner.epoch == 2
        assert number_in(await runner.run(torch.randn(32, 16))) == 2
        await runner.rollback()  # what was kept is still there
        assert number_in(await runner.run(torch.randn(32, 16))) == 1


async def test_part_of_the_weights_is_merged_over_those_that_serve():
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path)
        await runner.update({"middle": torch.full((64,), 7.0)}, partial=True)
        seen = (await runner.run(torch.randn(32, 16)))[0]
        assert sorted(set(seen.flatten().tolist())) == [1.0, 7.0]
        await runner.update(
            {"first": torch.full((16, 16), 7.0), "last": torch.full((5, 7), 7.0)}, partial=True
        )
        await runner.update({"count": torch.full((3, 3), 7)}, partial=True)
        assert number_in(await runner.run(torch.randn(32, 16))) == 7


async def test_a_frozen_model_says_that_its_weights_are_code():
    built = build("frozen")
    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path)
        with pytest.raises(UpdateError, match=r"runner .model.: its weights can.t be updated live"):
            await runner.update(built.module().state_dict())
        assert runner.epoch == 1
