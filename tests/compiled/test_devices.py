"""Really compiled models on every device there is: the same tests on the CPU, which is
everywhere, and on CUDA, XPU and MPS where they are.

Where a device is missing, its tests are skipped with the reason. `pytest -m cuda` runs those of
CUDA alone.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from aoti_sched import InputMismatchError, Scheduler
from aoti_sched.backends.devices import open_device
from aoti_sched.errors import ConfigError, UpdateError
from tests.device.models import to
from tests.models import DEFINITIONS

DEVICES = [
    "cpu",
    *(
        pytest.param(name, marks=getattr(pytest.mark, name.partition(":")[0]))
        for name in ("cuda:0", "xpu:0", "mps")
    ),
]
MODELS = ("mlp", "attention", "conv", "folding", "aliasing")


class Model:
    """A model compiled for a device, and the module it was compiled from, there."""

    def __init__(self, name: str, path: Any, device: str) -> None:
        definition = DEFINITIONS[name]()
        self.path = path
        self.device = device
        self.args = definition.args
        self.kwargs = dict(definition.kwargs)
        self.module = definition.module().to(device)

    def matches(self, outputs: Any, module: Any = None) -> bool:
        with torch.no_grad():
            expected = (module or self.module)(
                *to(self.device, self.args), **to(self.device, self.kwargs)
            )
        pairs = zip(_leaves(outputs), _leaves(expected), strict=True)
        return all(
            torch.allclose(got.cpu(), want.cpu(), atol=1e-3, rtol=1e-3) for got, want in pairs
        )


def _leaves(values: Any) -> list[torch.Tensor]:
    return [
        leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)
    ]


@pytest.fixture(params=DEVICES)
def device(request):
    try:
        open_device(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """Where compiled packages are: `tests.device` compiles them beforehand, all at once."""
    made_before = os.environ.get("AOTI_SCHED_DEVICE_PACKAGES")
    return Path(made_before) if made_before else tmp_path_factory.mktemp("packages")


@pytest.fixture
def model(device, built, packages, python):
    """`model("mlp")`: compiled for the device; in a process of its own, once."""

    def compiled(name):
        if device == "cpu":
            return Model(name, built(name).path, device)
        path = packages / f"{name}.pt2"
        if not path.exists():
            result = python(
                "from tests.device.models import main; import sys; main(*sys.argv[1:])",
                name,
                device,
                path,
            )
            assert result.returncode == 0, result.stderr
        return Model(name, path, device)

    return compiled


@pytest.fixture
async def scheduler():
    async with Scheduler() as scheduler:
        yield scheduler


@pytest.mark.parametrize("name", MODELS)
async def test_a_model_gives_what_its_module_gives(scheduler, model, device, name):
    one = model(name)
    runner = await scheduler.load(one.path, device=device, instances=2)
    for _ in range(3):
        outputs = await runner.run(*to(device, one.args), **to(device, one.kwargs))
        assert one.matches(outputs)
        assert all(leaf.device.type == torch.device(device).type for leaf in _leaves(outputs))


async def test_inputs_are_brought_from_the_host_and_outputs_come_home(scheduler, model, device):
    one = model("mlp")
    runner = await scheduler.load(
        one.path, device=device, copy_inputs=True, copy_outputs="cpu", instances=2
    )
    for outputs in await asyncio.gather(*(runner.run(*one.args) for _ in range(50))):
        assert one.matches(outputs)
        assert all(leaf.is_cpu for leaf in _leaves(outputs))


async def test_an_input_on_the_host_is_refused_unless_it_may_be_brought(scheduler, model, device):
    if device == "cpu":
        pytest.skip("on the CPU, every input is on the device")
    one = model("mlp")
    runner = await scheduler.load(one.path, device=device)
    with pytest.raises(InputMismatchError, match="copy_inputs=True"):
        await runner.run(*one.args)


async def test_many_requests_at_once_do_not_meet(scheduler, model, device):
    one = model("mlp")
    runner = await scheduler.load(one.path, device=device, instances=4)
    (x,) = to(device, one.args)
    inputs = [x + number for number in range(100)]
    outputs = await asyncio.gather(*map(runner.run, inputs))
    with torch.no_grad():
        for got, given in zip(outputs, inputs, strict=True):
            assert torch.allclose(got, one.module(given), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("name", ["mlp", "folding"])
async def test_weights_are_replaced_and_taken_back(scheduler, model, device, name, where):
    one = model(name)
    runner = await scheduler.load(one.path, device=device)
    other = DEFINITIONS[name]().module().to(device)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    weights = other.state_dict()
    await runner.update(to("cpu", weights) if where == "host" else weights)
    assert one.matches(await runner.run(*to(device, one.args)), other)
    await runner.rollback()
    assert one.matches(await runner.run(*to(device, one.args)))
    extracted = await runner.extract()
    assert all(
        torch.equal(extracted[key], value)
        for key, value in one.module.state_dict().items()
        if key in extracted
    )


async def test_inputs_that_another_stream_still_makes_are_waited_for(scheduler, model, device):
    if device in ("cpu", "mps"):
        pytest.skip(f"{device} has one stream")
    one = model("mlp")
    runner = await scheduler.load(one.path, device=device, instances=2)
    (x,) = to(device, one.args)
    mine = getattr(torch, device.partition(":")[0]).Stream(device)
    for number in range(50):
        with getattr(torch, device.partition(":")[0]).stream(mine):
            big = torch.full((2000, 2000), 1.0, device=device)
            for _ in range(5):
                big = big @ big * 0.0005
            given = x + number + big[0, 0] * 0
            future = runner.submit(given)
        got = await future
        with torch.no_grad():
            assert torch.allclose(got, one.module(x + number), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("name", ["mlp", "attention", "conv", "aliasing"])
async def test_recorded_runs_give_what_their_model_gives_with_any_weights(
    scheduler, model, device, name
):
    one = model(name)
    runner = await scheduler.load(one.path, device=device, instances=2, cuda_graphs=True)
    inputs = to(device, one.args), to(device, one.kwargs)
    halved = DEFINITIONS[name]().module().to(device)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        with pytest.raises(UpdateError, match="while the second of its buffers serves"):
            await runner.update(halved.state_dict())
        sets = [None]  # what such a torch compiles takes no weights while its runs are recorded
    else:
        sets = [one.module, halved, one.module, halved]
    for module in sets:
        if module is not None:
            await runner.update(module.state_dict())
        for _ in range(3):
            for outputs in await asyncio.gather(
                *(runner.run(*inputs[0], **inputs[1]) for _ in range(20))
            ):
                assert one.matches(outputs, module)
    assert runner.info.cuda_graphs > 0


async def test_whether_a_device_was_tried_is_said(scheduler, model, device):
    runner = await scheduler.load(model("mlp").path, device=device)
    assert runner.info.verified is (device == "cpu")
