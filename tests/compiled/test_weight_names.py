"""`update(module.state_dict())` for ordinary modules: names that no constant has, several names
of one tensor, buffers left out.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from aoti_sched import ConstantMismatchError, Scheduler, UpdateError
from tests.models import build

UNUSED = {"norm.num_batches_tracked", "unused.weight", "unused.bias"}


def changed():
    """The `ordinary` module with other values in all that its state dict has."""
    module = build("ordinary").module()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module


async def answers(runner, module):
    args = build("ordinary").args
    with torch.no_grad():
        assert_close(await runner.run(*args), module(*args))


@pytest.mark.parametrize("devices", [None, ["cpu:0", "cpu:1"]])
async def test_a_state_dict_updates_a_module_as_it_is(devices):
    module = changed()
    cores = {f"cpu:{core}": {"affinity": [core]} for core in (0, 1)}
    async with Scheduler(config=cores_of(cores)) as scheduler:
        runner = await scheduler.load(build("ordinary").path, devices=devices)
        report = await runner.update(module.state_dict())
        assert set(report.ignored) == UNUSED | {"_extra_state"}
        for _ in range(4):  # on each device
            await answers(runner, module)


def cores_of(cores):
    import msgspec

    from aoti_sched import SchedulerConfig

    return msgspec.convert({"devices": cores}, SchedulerConfig)


async def test_what_extract_gives_goes_back_as_it_is():
    module = changed()
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("ordinary").path)
        first = await runner.extract()
        await runner.update(module.state_dict())
        second = await runner.extract()
        assert (await runner.update(first)).ignored == ()
        await answers(runner, build("ordinary").module())
        await runner.update(second)
        await answers(runner, module)
        assert {"scale", "_tensor_constant0"} < second.keys()
        third = await runner.extract()
        assert third.keys() == second.keys()
        assert all(torch.equal(third[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize("left_out", ["embed.weight", "head.weight", "twin", "norm.weight"])
async def test_tied_weights_go_by_either_name(left_out):
    module = changed()
    state = module.state_dict()
    del state[left_out]
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("ordinary").path)
        await runner.update(state)
        await answers(runner, module)


async def test_tied_weights_that_disagree_are_refused():
    state = changed().state_dict()
    state["head.weight"] = state["head.weight"] + 1
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("ordinary").path)
        with pytest.raises(
            ConstantMismatchError, match=r"is the same tensor as .embed\.weight."
        ) as caught:
            await runner.update(state)
        assert [name for name, _ in caught.value.faults] == ["head.weight"]
        await answers(runner, build("ordinary").module())


async def test_tied_weights_may_both_be_nan():
    state = changed().state_dict()
    both = torch.full((12, 6), float("nan"))
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("ordinary").path)
        await runner.update({**state, "head.weight": both.clone(), "embed.weight": both})
        assert (await runner.run(*build("ordinary").args)).isnan().all()


async def test_an_unknown_name_and_a_missing_one_stay_errors():
    state = changed().state_dict()
    del state["embed.weight"], state["head.weight"], state["temperature"]
    state["embed.wieght"] = torch.zeros(12, 6)
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("ordinary").path)
        for strict in (True, False):
            with pytest.raises(ConstantMismatchError) as caught:
                await runner.update(state, strict=strict)
            unknown = {"embed.wieght"} if strict else set()
            assert {name for name, _ in caught.value.faults} == {
                "head.weight",
                "temperature",
            } | unknown
        report = await runner.update(
            {"oops": torch.zeros(1), "twin": torch.ones(6)}, partial=True, strict=False
        )
        assert report.ignored == ("oops",)


async def test_state_dicts_from_files_are_taken_too(tmp_path):
    module = changed()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    tensors = {key: value for key, value in module.state_dict().items() if key != "_extra_state"}
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("ordinary").path)
        for file in ("a.pt", "a.safetensors"):
            await runner.update(build("ordinary").module().state_dict())
            report = await runner.update(tmp_path / file)
            assert set(report.ignored) - {"_extra_state"} == UNUSED
            await answers(runner, module)


async def test_a_buffer_that_state_dict_leaves_out_can_be_given():
    module = changed()
    module.scale.copy_(torch.arange(6.0))
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("ordinary").path)
        await runner.update({**module.state_dict(), "scale": module.scale})
        await answers(runner, module)
        await runner.update(module.state_dict())  # and keeps that value
        await answers(runner, module)


async def test_a_torch_package_ignores_names_that_it_cannot_know_when_it_is_told_to():
    """Its small constants are code: the values of those must be the compiled ones, which
    nothing here can tell.
    """
    module = build("conv").module()
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("conv").path)
        with pytest.raises(
            ConstantMismatchError,
            match=r"strict=False \(weights_strict at load\) ignores such names",
        ):
            await runner.update(module.state_dict())
        with torch.no_grad():
            module.conv.weight.mul_(2)
        report = await runner.update(module.state_dict(), strict=False)
        assert "norm.num_batches_tracked" in report.ignored
        assert set(report.ignored) == module.state_dict().keys() - runner.constants().keys()
        with torch.no_grad():
            assert_close(
                await runner.run(*build("conv").args),
                module(*build("conv").args),
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("scalars", "it has none"),
        ("pair", "it has none, or all of them were compiled into its code"),
    ],
)
async def test_a_model_without_weights_says_so(name, why):
    async with Scheduler() as scheduler:
        runner = await scheduler.load(
            build(name).path, model_name="double" if name == "pair" else None
        )
        with pytest.raises(UpdateError, match=rf"can't be updated live: {why}") as caught:
            await runner.update({})
        assert "freeze=True" not in str(caught.value)
