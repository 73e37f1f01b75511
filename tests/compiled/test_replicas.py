"""One runner on several CPU devices with cores of their own, on really compiled models; losing
one of them under load.
"""

from __future__ import annotations

import asyncio
import os

import anyio
import pytest
import torch
from torch.testing import assert_close

from aoti_sched import (
    ConfigError,
    DeviceConfig,
    DeviceLostError,
    Priority,
    Scheduler,
    SchedulerConfig,
)
from tests.compiled.conftest import EXECUTORS
from tests.compiled.test_live_weights import Served
from tests.inside import replicas_of, serving
from tests.models import build
from tests.threads import cores_of

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
BOTH = ["cpu:0", "cpu:1"]

pytestmark = pytest.mark.skipif(
    len(CORES) < 2,
    reason="two devices with cores of their own need two cores to which threads can be bound",
)


@pytest.fixture(params=EXECUTORS)
def executor(request, monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", request.param)
    return request.param


@pytest.fixture
async def scheduler(executor):
    devices = {
        name: DeviceConfig(affinity=(core,)) for name, core in zip(BOTH, CORES, strict=False)
    }
    async with Scheduler(SchedulerConfig(devices=devices)) as scheduler:
        yield scheduler


def inputs(number):
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(number))


@pytest.fixture
def expected():
    """Of the inputs of a number, what the eager module makes of them."""
    module = build("mlp").module()

    def answer(number):
        with torch.no_grad():
            return module(inputs(number))

    return answer


class Clients:
    """They call a runner in turn, one input after the other, and keep every request."""

    def __init__(self, runner, count=16):
        self.runner = runner
        self.count = count
        self.futures = {}
        self.over = False

    async def __aenter__(self):
        self._tasks = [asyncio.ensure_future(self.client(number)) for number in range(self.count)]
        return self

    async def client(self, which):
        runner = self.runner.options(tenant=which % 3, priority=Priority(which % 3))
        while not self.over:
            number = len(self.futures)
            future = self.futures[number] = runner.submit(inputs(number))
            await asyncio.wait([future])
            await asyncio.sleep(0)

    async def answered(self, more):
        """Wait until clients have sent this many more requests."""
        wanted = len(self.futures) + more
        with anyio.fail_after(60):
            # There is no event for what clients have sent.
            while len(self.futures) < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0)

    async def __aexit__(self, *_):
        self.over = True
        with anyio.fail_after(60):
            await asyncio.gather(*self._tasks)


async def test_without_named_cores_those_there_are_are_divided(executor):
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("mlp").path, devices=BOTH, placement="lane")
        stats = scheduler.stats().devices
        half = len(CORES) // 2
        assert [stats[name].cores for name in BOTH] == [len(CORES) - half, half]
        shares = CORES[: len(CORES) - half], CORES[len(CORES) - half :]
        for name, cores in zip(BOTH, shares, strict=True):
            for lane, core in enumerate(cores):
                assert cores_of(f"aoti:{name}:{lane}", {core}) == {core}
            listed = ", ".join(map(str, cores))
            assert (
                f"No cores were named for {name!r}; of those there are, it has {listed}."
                in runner.info.notes
            )
        assert [
            future.trace.device for future in [runner.submit(inputs(0)) for _ in range(4)]
        ] == BOTH * 2
        with pytest.raises(
            ConfigError, match=r"device 'cpu:2': the cores were divided among 'cpu:0', 'cpu:1' when"
        ):
            await scheduler.load(build("mlp").path, name="late", device="cpu:2")
        again = await scheduler.load(build("mlp").path, name="again", device="cpu:1")
        assert_close(await again.run(inputs(1)), build("mlp").module()(inputs(1)))


async def test_a_later_device_is_named_beforehand_and_named_cores_keep_their_owner(
    executor,
):
    devices = {"cpu:5": DeviceConfig(), "cpu:1": DeviceConfig(affinity=(CORES[0],))}
    async with Scheduler(SchedulerConfig(devices=devices)) as scheduler:
        for name in ("cpu:1", "cpu:5"):
            await scheduler.load(build("mlp").path, name=name, device=name)
        assert cores_of("aoti:cpu:1:0", {CORES[0]}) == {CORES[0]}
        assert cores_of("aoti:cpu:5:0", {CORES[1]}) == {CORES[1]}
        with pytest.raises(
            ConfigError, match=r"device 'cpu:0': the cores were divided among 'cpu:5'"
        ):
            await scheduler.load(build("mlp").path, name="late", device="cpu:0")


async def test_under_a_quota_devices_get_numbers_of_cores_and_no_lane_is_bound(
    executor, monkeypatch
):
    cores = (list(range(64)), 3)
    monkeypatch.setattr("aoti_sched.engine.devices._cores_here", lambda: cores)
    monkeypatch.setattr("aoti_sched.backends.cpu.available_cores", lambda: 3)
    async with Scheduler() as scheduler:
        await scheduler.load(build("mlp").path, devices=BOTH)
        stats = scheduler.stats().devices
        assert [(stats[name].lanes, stats[name].cores) for name in BOTH] == [(2, 2), (1, 1)]
        assert cores_of("aoti:cpu:0:0", {*CORES}) == {*CORES}


async def test_more_devices_than_cores_are_refused(executor):
    devices = [f"cpu:{number}" for number in range(len(CORES) + 1)]
    async with Scheduler() as scheduler:
        with pytest.raises(
            ConfigError, match=rf"{len(CORES)} cores can't be divided among {len(devices)} devices"
        ):
            await scheduler.load(build("mlp").path, devices=devices)
        assert dict(scheduler.runners) == {}
        await scheduler.load(build("mlp").path, devices=BOTH)


async def test_lanes_and_cores_are_those_of_the_device(scheduler, executor):
    runner = await scheduler.load(build("mlp").path, devices=BOTH, instances=2, placement="lane")
    stats = scheduler.stats().devices
    assert [(stats[name].executor, stats[name].lanes, stats[name].cores) for name in BOTH] == [
        (executor, 1, 1)
    ] * 2
    assert [
        future.trace.device for future in [runner.submit(inputs(0)) for _ in range(4)]
    ] == BOTH * 2
    for name, core in zip(BOTH, CORES, strict=False):
        assert cores_of(f"aoti:{name}:0", {core}) == {core}


@pytest.mark.parametrize("placement", ["lane", "auto"])
async def test_the_results_are_those_of_one_device(scheduler, expected, placement):
    path = build("mlp").path
    many = await scheduler.load(path, name="many", devices=BOTH, placement=placement)
    one = await scheduler.load(path, name="one", placement=placement)
    futures = [many.submit(inputs(number)) for number in range(200)]
    for number, future in enumerate(futures):
        result = await future
        assert_close(result, expected(number))
        assert torch.equal(result, await one.run(inputs(number)))
    assert {future.trace.device for future in futures} == {*BOTH}
    stats = many.stats()
    assert (stats.completed, stats.failed) == (200, 0)
    assert min(replica.completed for replica in stats.replicas.values()) > 0


async def test_a_device_that_is_drained_under_load_loses_nothing(scheduler, expected):
    runner = await scheduler.load(build("mlp").path, devices=BOTH, placement="lane")
    async with Clients(runner) as clients:
        await clients.answered(300)
        await scheduler.drain_device("cpu:1")
        sent = len(clients.futures)
        await clients.answered(300)
    for number, future in clients.futures.items():
        assert_close(await future, expected(number))
    assert {
        future.trace.device for number, future in clients.futures.items() if number >= sent
    } == {"cpu:0"}
    stats = runner.stats()
    assert stats.completed == stats.submitted == len(clients.futures)
    assert (stats.queued, stats.running, stats.replicas["cpu:1"].phase) == (0, 0, "DRAINED")


class Lost:
    """An executor whose device is lost: it takes nothing more."""

    def __init__(self, executor, device):
        self._executor = executor
        self._device = device

    def __getattr__(self, name):
        return getattr(self._executor, name)

    def submit(self, lane, work):
        raise DeviceLostError("the cores were taken away", device=self._device)


async def test_a_device_that_is_lost_under_load_loses_what_was_handed_to_it_alone(
    scheduler, expected
):
    runner = await scheduler.load(build("mlp").path, devices=BOTH, placement="lane")
    async with Clients(runner) as clients:
        await clients.answered(300)
        dispatcher = replicas_of(runner)[1].dispatcher
        dispatcher.executor = Lost(dispatcher.executor, "cpu:1")
        with anyio.fail_after(60):
            while len(serving(runner)) == 2:  # noqa: ASYNC110 -- until something is sent there
                await asyncio.sleep(0)
        await clients.answered(300)
    errors = []
    for number, future in clients.futures.items():
        if future.exception() is None:
            assert_close(future.result(), expected(number))
        else:
            errors.append(future.exception())
    assert {type(error) for error in errors} == {DeviceLostError}
    assert len(errors) <= 2  # what runs on its one lane, and what is next there
    assert [replica.device for replica in serving(runner)] == ["cpu:0"]
    stats = runner.stats()
    assert (stats.completed, stats.failed) == (len(clients.futures) - len(errors), len(errors))


@pytest.mark.parametrize("placement", ["lane", "auto"])
async def test_each_of_many_sets_is_seen_whole_on_all_devices(scheduler, placement, monkeypatch):
    runner = await scheduler.load(
        build("canary").path, devices=BOTH, instances=2, placement=placement
    )
    await Served(runner).under_load(scheduler, 100, monkeypatch)


async def test_folded_constants_are_new_on_all_devices(scheduler):
    built = build("folding")
    runner = await scheduler.load(built.path, devices=BOTH)
    module = built.module()
    values = {key: value for key, value in module.state_dict().items() if key in runner.constants()}
    with torch.no_grad():
        for value in values.values():
            value.add_(torch.randn_like(value) * 0.5)
        expected = module(*built.args)
    await runner.update(values)
    for _ in range(4):
        assert_close(await runner.run(*built.args), expected, rtol=1e-4, atol=1e-4)
    assert min(replica.completed for replica in runner.stats().replicas.values()) > 0


@pytest.mark.parametrize(
    ("devices", "sentence"),
    [
        (
            {"cpu:0": [0], "cpu:1": [0]},
            r"devices.cpu:0: affinity: core \d+ also belongs to 'cpu:1'",
        ),
        ({"cpu:0": [0, 0]}, r"devices.cpu:0: affinity=\[\d+, \d+\]: a core is named twice"),
    ],
)
async def test_devices_without_cores_of_their_own_are_refused(devices, sentence):
    devices = {
        name: DeviceConfig(affinity=tuple(CORES[each] for each in cores))
        for name, cores in devices.items()
    }
    async with Scheduler(SchedulerConfig(devices=devices)) as scheduler:
        with pytest.raises(ConfigError, match=sentence):
            await scheduler.load(build("mlp").path, devices=BOTH)
        await scheduler.load(build("mlp").path)  # the device that is all cores is there


async def test_cores_that_are_not_this_process_s_are_refused():
    config = SchedulerConfig(devices={"cpu:0": DeviceConfig(affinity=(4095,))})
    async with Scheduler(config) as scheduler:
        with pytest.raises(ConfigError, match=r"affinity=\[4095\]: this process may use the cores"):
            await scheduler.load(build("mlp").path, device="cpu:0")
