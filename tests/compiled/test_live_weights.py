"""New weights under full load, on really compiled models: each answer shows which set it was
computed from.

A client notes what had been published before and after each request, so what an answer may show is
known exactly: one of the epochs that served meanwhile, the one that its trace names, and nothing
mixed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading

import anyio
import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch.testing import assert_close

from aoti_sched import (
    ConstantMismatchError,
    RunError,
    Runner,
    Scheduler,
    SchedulerConfig,
    UpdateError,
    WeightsFileError,
)
from aoti_sched.backends.aoti import container
from examples.semantic_search import packages
from tests.compiled.conftest import EXECUTORS
from tests.inside import container_of
from tests.models import build

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

    The log tells of a publication in the next turn of the loop. A client that is woken sooner looks
    by itself, so `history` is never late.
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
        self.look()

    def look(self) -> None:
        epoch = self.runners[0].epoch
        if epoch != self.history[-1]:
            self.history.append(epoch)

    async def client(self) -> None:
        x = torch.randn(32, 16)
        while not self.over:
            self.look()
            began, epochs = len(self.history), []
            for runner in self.runners:
                before = len(self.history)
                future = runner.submit(x)
                number = number_in(await future)
                self.look()
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

    async def under_load(
        self, scheduler: Scheduler, times: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        runner = await scheduler.load(
            build("canary").path, instances=3, placement=placement, overflow="wait"
        )
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


@pytest.mark.parametrize(
    "name", ["folding", "folded_output", "weights_blob", "weights_pickle", "mlp"]
)
async def test_answers_are_the_eager_modules_on_the_epochs_weights(executor, name):
    """Folded constants, weights that lie beside the library, several instances."""
    built = build(name)
    over = False
    sets, expected = {}, {}

    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path, instances=2)
        module = built.module()
        values = {
            key: value for key, value in module.state_dict().items() if key in runner.constants()
        }
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
                    back = await runner.rollback()
                    future = runner.submit(*built.args)
                    await future
                    assert future.trace.epoch == back.epoch
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
    # The record of the last facts is full before memory is looked at.
    async with Scheduler(SchedulerConfig(flight_facts=100)) as scheduler:
        runner = await scheduler.load(build("canary").path, instances=2)

        async def updates(count):
            for number in range(count):
                await runner.update(sets[number % 8])
                if number % 100 == 0:
                    await runner.free_previous()
            gc.collect()
            tensors = sum(type(each) is torch.Tensor for each in gc.get_objects())
            return process.memory_info().rss, (process.num_fds(), tensors)

        await updates(300)
        memory, handles = await updates(200)
        after, handles_after = await updates(1000)
    assert after - memory < 4 << 20
    assert handles_after == handles


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


@pytest.mark.parametrize(
    ("name", "tensor", "fault"),
    [
        ("first", torch.zeros(16, 15), r"wants shape \(16, 16\), got \(16, 15\)"),
        ("first", torch.zeros(16, 16).double(), "wants float32, got float64"),
        ("first", torch.zeros(16, 16).to_sparse(), "wants a dense tensor"),
        ("first", torch.zeros(16, 16, device="meta"), "wants a tensor on cpu, got one on meta"),
        ("count", torch.zeros(3, 3), "wants int64, got float32"),
        ("last", torch.full((5, 7), float("nan")), "has values that are not finite"),
        ("last", torch.full((5, 7), float("-inf")), "has values that are not finite"),
        ("surplus", torch.zeros(1), "is no constant of it"),
    ],
)
async def test_what_does_not_fit_is_named_with_what_was_wanted(name, tensor, fault):
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path)
        weights = {**canary_weights(2), name: tensor}
        with pytest.raises(ConstantMismatchError, match=f"{name}.*{fault}") as caught:
            await runner.update(weights, check_finite=True)
        assert [fqn for fqn, _ in caught.value.faults] == [name]
        assert number_in(await runner.run(torch.randn(32, 16))) == 1
        await runner.update(canary_weights(3), check_finite=True)
        assert number_in(await runner.run(torch.randn(32, 16))) == 3


async def test_a_name_that_comes_twice_and_one_that_is_folded_are_faults_too():
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("folding").path)
        (folded,) = [name for name, spec in runner.constants().items() if spec.folded]
        given = build("folding").module().state_dict()
        pairs = [*given.items(), ("bias", given["bias"]), (folded, torch.zeros(4, 4))]
        with pytest.raises(ConstantMismatchError) as caught:
            await runner.update(iter(pairs))
        assert caught.value.faults == (
            ("bias", "is given twice"),
            (folded, "is computed from other constants; give those"),
        )


async def test_infinities_pass_where_nobody_asks():
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path)
        await runner.update({**canary_weights(2), "last": torch.full((5, 7), float("inf"))})
        assert float("inf") in (await runner.run(torch.randn(32, 16)))[0]


async def test_views_of_all_kinds_arrive_as_what_they_show():
    """Strides, an offset, a storage that holds more, an expanded one: the runtime would copy
    what lies beneath.
    """
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path)
        shown = {
            "first": torch.arange(256.0).reshape(16, 16).t(),
            "middle": torch.arange(300.0)[100:228:2],
            "count": torch.arange(3).expand(3, 3),
            "last": torch.arange(70.0).reshape(10, 7)[5:],
        }
        await runner.update(shown)
        extracted = await runner.extract()
        assert all(torch.equal(extracted[name], tensor) for name, tensor in shown.items())


class Hangs(torch.Tensor):
    """A tensor whose copies wait until they are let go."""

    entered = threading.Event()
    let_go = threading.Event()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.detach, torch.Tensor.copy_):
            cls.entered.set()
            assert cls.let_go.wait(60)
        return super().__torch_function__(func, types, args, kwargs or {})


async def test_an_update_leaves_a_tensor_behind_whose_own_code_hangs():
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path)
        hanging = {**canary_weights(3), "first": canary_weights(3)["first"].as_subclass(Hangs)}
        try:
            with anyio.fail_after(60), pytest.raises(TimeoutError):
                await runner.update(hanging, timeout=1.0)
            assert Hangs.entered.is_set()
            with anyio.fail_after(60):
                await runner.update(canary_weights(2))
            assert number_in(await runner.run(torch.randn(32, 16))) == 2
        finally:
            Hangs.let_go.set()
        await runner.update(hanging)
        assert number_in(await runner.run(torch.randn(32, 16))) == 3


async def test_weights_come_from_files_and_a_file_that_can_not_be_trusted_changes_nothing(tmp_path):
    one, other, changing = (tmp_path / name for name in ("two.safetensors", "three.pt", "changing"))
    save_file(canary_weights(2), one)
    torch.save({"state_dict": canary_weights(3)}, other)
    save_file(canary_weights(4), changing)

    async def seen():
        return number_in(await runner.run(torch.randn(32, 16)))

    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path)
        await runner.update(one)
        assert await seen() == 2
        await runner.update(str(other), check_finite=True)
        assert await seen() == 3

        (tmp_path / "cut").write_bytes(one.read_bytes()[:-1])
        (tmp_path / "foreign").write_bytes(b"no weights at all")
        for file, fault in [
            ("cut", "is truncated"),
            ("foreign", "is neither"),
            ("none", "There is no"),
        ]:
            with pytest.raises(WeightsFileError, match=fault):
                await runner.update(tmp_path / file)
        choose = container.choose

        def meanwhile(*args, **kwargs):
            chosen = choose(*args, **kwargs)
            chosen.read()
            save_file(canary_weights(5), changing)
            return chosen

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(container, "choose", meanwhile)
            with pytest.raises(WeightsFileError, match="changed while it was being read"):
                await runner.update(changing)
        assert (runner.epoch, await seen()) == (3, 3)
        await runner.rollback()
        assert await seen() == 2
        await runner.update(changing)
        assert await seen() == 5


async def test_a_container_whose_fold_failed_is_rebuilt_under_load_and_serves_what_it_served(
    executor, monkeypatch
):
    built = build("folding")
    module = built.module()
    over = False
    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path, instances=2, overflow="wait")
        with torch.no_grad():
            module.weight.mul_(2)
            await runner.update(module.state_dict())
            expected = module(*built.args)

        async def client():
            while not over:
                future = runner.submit(*built.args)
                assert_close(await future, expected)
                assert future.trace.epoch == 2
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for _ in range(5):
            old = container_of(runner).c_run.container
            with monkeypatch.context() as patch:
                patch.setattr(container_of(runner)._raw, "fold", broken)
                with pytest.raises(RunError, match="no fold"):
                    await runner.update(
                        {name: value * 3 for name, value in module.state_dict().items()}
                    )
            assert container_of(runner).c_run.container != old
            assert (runner.info.staged, runner.info.previous_epoch, runner.epoch) == (
                False,
                None,
                2,
            )
        over = True
        await asyncio.gather(*clients)
        assert runner.stats().failed == 0
        with torch.no_grad():
            module.weight.mul_(2)
            assert (await runner.update(module.state_dict())).epoch == 3
            assert_close(await runner.run(*built.args), module(*built.args))


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_swap_that_fails_on_one_of_three_is_taken_back_on_those_before(
    executor, which, monkeypatch
):
    async with Scheduler() as scheduler:
        path = build("canary").path
        runners = [await scheduler.load(path, name=f"canary{index}") for index in range(3)]

        async def seen():
            return [number_in(await runner.run(torch.randn(32, 16))) for runner in runners]

        def no_swap():
            raise RunError("no swap")

        with monkeypatch.context() as patch:
            patch.setattr(container_of(runners[which]), "swap", no_swap)
            with pytest.raises(RunError, match="no swap"):
                await scheduler.update({runner: canary_weights(2) for runner in runners})
        assert await seen() == [1, 1, 1]
        assert [(runner.epoch, runner.info.inactive_bytes) for runner in runners] == [(1, 0)] * 3
        await scheduler.update({runner: canary_weights(3) for runner in runners})
        assert await seen() == [3, 3, 3]
        await scheduler.rollback(*runners)
        assert await seen() == [1, 1, 1]


def broken(*, inactive):
    assert inactive
    raise RunError("no fold")


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
