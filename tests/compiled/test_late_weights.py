"""Weights that come after loading: from a file or as tensors, for packages without any and in
place of those they have.
"""

from __future__ import annotations

import asyncio
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from aoti_sched import (
    ConstantMismatchError,
    DeviceConfig,
    LoadError,
    MissingWeightsError,
    RunnerClosedError,
    Scheduler,
    SchedulerConfig,
    WeightsFileError,
    WeightsTypeError,
)
from aoti_sched.backends import opening
from aoti_sched.backends.aoti.opened_files import OpenFiles
from tests.inside import container_of, serving, submit_to
from tests.models import build
from tests.unit.engine.support import until

NAMES = ["weights_none", "late", "weights_blob", "weights_pickle", "mlp", "folding"]


def changed(name):
    """A model's module with other weights, but for those of which torch alone makes code."""
    module = build(name).module()
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if not (name.startswith("weights") and key == "1.bias"):
                tensor.copy_(torch.rand_like(tensor))
    return module


def file_of(module, path, *, save="safetensors"):
    state = module.state_dict()
    if save == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


async def answers(runner, name, module):
    args = build(name).args
    await must_be_of(runner.submit(*args), args, module)


async def must_be_of(future, args, module):
    with torch.no_grad():
        assert_close(await future, module(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["state dict", "safetensors", "checkpoint"])
@pytest.mark.parametrize("name", NAMES)
async def test_weights_come_after_loading(name, given, tmp_path):
    module = changed(name)
    weights = (
        module.state_dict()
        if given == "state dict"
        else file_of(module, tmp_path / "new", save=given)
    )
    async with Scheduler() as scheduler:
        strict = not name.startswith("weights")
        runner = await scheduler.load(
            build(name).path, weights=weights, weights_strict=strict, instances=2
        )
        await answers(runner, name, module)
        assert any("'1.bias'" in note for note in runner.info.notes) is not strict
        other = changed(name)
        await runner.update(other.state_dict(), strict=strict)
        await answers(runner, name, other)
        await runner.rollback()
        await answers(runner, name, module)


async def test_without_them_the_error_names_the_way():
    async with Scheduler() as scheduler:
        with pytest.raises(
            MissingWeightsError, match=r'load\(\.\.\., weights="model.safetensors"\)'
        ):
            await scheduler.load(build("late").path)


async def test_weights_come_from_the_configuration(tmp_path):
    module = changed("late")
    file_of(module, tmp_path / "late.safetensors")
    (tmp_path / "late.pt2").symlink_to(build("late").path)
    (tmp_path / "serve.toml").write_text(
        '[models.late]\npath = "late.pt2"\nweights = "late.safetensors"\n'
    )
    async with Scheduler.from_config(tmp_path / "serve.toml") as scheduler:
        await answers(scheduler.runners["late"], "late", module)


async def test_several_devices_get_the_same_weights(tmp_path):
    module = changed("late")
    devices = {f"cpu:{core}": DeviceConfig(affinity=(core,)) for core in (0, 1)}
    async with Scheduler(config=SchedulerConfig(devices=devices)) as scheduler:
        for number, weights in enumerate((module.state_dict(), file_of(module, tmp_path / "new"))):
            runner = await scheduler.load(
                build("late").path, name=str(number), devices=["cpu:0", "cpu:1"], weights=weights
            )
            args = build("late").args
            for replica in serving(runner):
                await must_be_of(submit_to(replica, *args), args, module)


async def test_what_does_not_fit_loads_nothing(tmp_path):
    state = changed("late").state_dict()
    state["surplus"], state["shift"] = torch.zeros(1), torch.zeros(13)
    del state["weight"]
    torch.save(state, tmp_path / "wrong.pt")
    async with Scheduler() as scheduler:
        for weights in (state, tmp_path / "wrong.pt"):
            with pytest.raises(ConstantMismatchError) as caught:
                await scheduler.load(build("late").path, weights=weights)
            assert {name for name, _ in caught.value.faults} == {"surplus", "shift", "weight"}
        with pytest.raises(WeightsFileError, match="There is no weights file"):
            await scheduler.load(build("late").path, weights="nothing.pt")
        with pytest.raises(
            WeightsTypeError, match="expected the path of a weights file, or a mapping"
        ):
            await scheduler.load(build("late").path, weights=iter(state.items()))
        with pytest.raises(
            LoadError, match=r"weights= was given, but they were compiled into its code"
        ):
            await scheduler.load(build("frozen").path, weights={})
        assert not scheduler.runners


@pytest.mark.parametrize("name", ["late", "mlp"])
async def test_a_parked_model_comes_back_with_the_weights_of_its_file(name, tmp_path):
    module = changed(name)
    path = file_of(module, tmp_path / "new")
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build(name).path, weights=path)
        container = container_of(runner)
        assert container.unparkable == ""
        container.park()
        container.unpark()
        await answers(runner, name, module)
        container.rebuild()
        await answers(runner, name, module)
        container.park()
        os.utime(path, ns=(1, 1))
        with pytest.raises(WeightsFileError, match="changed"):
            container.unpark()
        os.utime(path, ns=container._given._seen[path][3:] * 2)
        container.unpark()
        await answers(runner, name, module)


@pytest.fixture
def dead_network(monkeypatch):
    """Files of weights block when they are opened, from `blocks.set()` to `go_on.set()`."""
    network = SimpleNamespace(
        blocks=threading.Event(), entered=threading.Event(), go_on=threading.Event()
    )
    opens = OpenFiles.open

    def open_later(self, path):
        if network.blocks.is_set():
            network.entered.set()
            assert network.go_on.wait(60)
        return opens(self, path)

    monkeypatch.setattr(OpenFiles, "open", open_later)
    yield network
    network.go_on.set()


async def no_thread_reads():
    names = ("aoti load of", "aoti weights of")
    await until(lambda: not any(t.name.startswith(names) for t in threading.enumerate()))


@pytest.mark.parametrize("ends", ["the scheduler closes", "the caller is cancelled"])
async def test_a_load_whose_file_blocks_is_left_behind(ends, tmp_path, dead_network):
    module = changed("late")
    path = file_of(module, tmp_path / "new")
    dead_network.blocks.set()
    async with Scheduler() as scheduler:
        load = asyncio.ensure_future(scheduler.load(build("late").path, weights=path))
        await until(dead_network.entered.is_set)
        if ends == "the scheduler closes":
            await scheduler.aclose()
            with pytest.raises(RunnerClosedError, match="abandoned"):
                await load
        else:
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            dead_network.blocks.clear()
            runner = await scheduler.load(build("late").path, weights=path)
            dead_network.go_on.set()
            await no_thread_reads()
            await answers(runner, "late", module)


async def test_a_return_whose_file_blocks_is_left_behind(tmp_path, dead_network):
    module = changed("late")
    path = file_of(module, tmp_path / "new")
    async with Scheduler() as scheduler:
        size = container_of(await scheduler.load(build("late").path, weights=path)).constant_bytes
    config = SchedulerConfig(devices={"cpu": DeviceConfig(memory_limit=2 * size, evict="lru")})
    async with Scheduler(config) as scheduler:
        a, b, c = [
            await scheduler.load(build("late").path, name=name, weights=path) for name in "abc"
        ]
        args = build("late").args
        dead_network.blocks.set()
        request = a.submit(*args)
        await until(dead_network.entered.is_set)
        await must_be_of(c.submit(*args), args, module)
        await a.terminate()
        with pytest.raises(RunnerClosedError):
            await request
        dead_network.blocks.clear()
        dead_network.go_on.set()
        await no_thread_reads()
        for runner in (b, c, b):
            await must_be_of(runner.submit(*args), args, module)


async def test_tensors_that_were_given_stay_in_memory_and_are_the_models_own():
    module = changed("late")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("late").path, weights=state)
        for tensor in state.values():
            tensor.zero_()
        await answers(runner, "late", module)
        assert "only memory has them" in container_of(runner).unparkable
        container_of(runner).rebuild()
        await answers(runner, "late", module)


async def test_a_model_of_torchs_own_runner_takes_them_too(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_proxy_executor", lambda *_: (None, "there is none"))
    module = build("custom_late").module()
    with torch.no_grad():
        module.weight.mul_(3)
    async with Scheduler() as scheduler:
        for number, weights in enumerate((module.state_dict(), file_of(module, tmp_path / "new"))):
            runner = await scheduler.load(
                build("custom_late").path, name=str(number), weights=weights
            )
            await answers(runner, "custom_late", module)
            container_of(runner).park()
            container_of(runner).unpark()
            await answers(runner, "custom_late", module)


async def test_names_that_the_model_has_no_use_for_are_noted():
    module = build("ordinary").module()
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("ordinary").path, weights=module.state_dict())
        assert any(
            "has no use for" in note and "unused.weight" in note for note in runner.info.notes
        )
        await answers(runner, "ordinary", module)
