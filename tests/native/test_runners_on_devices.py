"""A scheduler on a device, simulated: requests, weights, and what becomes of them when the
device is lost.
"""

import asyncio
import random
import threading

import pytest
import torch

from aoti_sched import (
    Batching,
    ConfigError,
    DeviceConfig,
    DeviceLostError,
    DynamicDim,
    InputMismatchError,
    ResourcesError,
    RunError,
    Scheduler,
    SchedulerConfig,
    TensorSpec,
)
from tests.compiled.backends.simulation import KINDS, launch, needs_native, open_device
from tests.native.simulated import model_path, simulator

SPECS = [TensorSpec("x", "float32", (DynamicDim("n", 1, 1000), 4), order=(0, 1))]


@pytest.fixture(autouse=True)
def sim():
    sim = simulator()
    yield sim
    sim.go()
    fault = sim.faults()
    sim.repair()
    assert fault == ""


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
async def scheduler(kind):
    device = open_device(kind)
    async with Scheduler(devices={device.name: device}) as scheduler:
        yield scheduler
        simulator().go()


@pytest.fixture
def load(scheduler):
    async def load(**options):
        name = next(iter(scheduler._devices.opened))
        return await scheduler.load(
            model_path(), **{"name": "times", "device": name, "inputs": SPECS, **options}
        )

    return load


async def test_requests_run_on_the_device_and_stay_there(load):
    runner = await load(instances=2)
    inputs = [torch.full((rows, 4), float(rows)).to("sim") for rows in range(1, 20)]
    for x, y in zip(inputs, await asyncio.gather(*map(runner.run, inputs)), strict=True):
        assert y.device.type == "sim"
        assert torch.equal(y.cpu(), x.cpu())


async def test_requests_from_the_host_go_there_and_come_home(load):
    runner = await load(instances=2, copy_inputs=True, copy_outputs="cpu")
    inputs = [torch.full((rows, 4), float(rows)) for rows in range(1, 20)]
    for x, y in zip(inputs, await asyncio.gather(*map(runner.run, inputs)), strict=True):
        assert torch.equal(y, x)


@pytest.mark.parametrize("specs", [SPECS, None], ids=["with specs", "by arity"])
async def test_an_input_on_the_host_is_refused_and_the_way_out_is_named(load, scheduler, specs):
    runner = await load(inputs=specs)
    wanted = next(iter(scheduler._devices.opened))
    with pytest.raises(InputMismatchError) as caught:
        await runner.run(torch.ones(2, 4))
    assert caught.value.got == "cpu"
    assert caught.value.expected == f"device {wanted}"
    assert (
        caught.value.hint
        == f"Move it with .to({wanted!r}), or load the model with copy_inputs=True."
    )
    assert caught.value.input == ("x" if specs else "input 0")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("specs", [SPECS, None], ids=["with specs", "by arity"])
async def test_an_input_on_another_device_of_the_kind_is_refused(load, specs):
    runner = await load(inputs=specs, copy_inputs=True)
    with pytest.raises(InputMismatchError) as caught:
        await runner.run(torch.ones(2, 4).to("sim:1"))
    assert (caught.value.expected, caught.value.got) == ("device sim:0", "sim:1")
    assert caught.value.hint == "Move it with .to('sim:0')."


async def test_requests_that_come_together_run_as_one(load):
    runner = await load(
        copy_inputs=True, copy_outputs="cpu", batching=Batching(max_size=16, max_delay=0.0, dim=0)
    )
    inputs = [torch.full((1, 4), float(number)) for number in range(8)]
    for x, y in zip(inputs, await asyncio.gather(*map(runner.run, inputs)), strict=True):
        assert torch.equal(y, x)
    assert runner.stats().batches >= 1


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [*((kind, False) for kind in KINDS), ("cuda", True)],
    ids=[*KINDS, "cuda graphs"],
)
async def test_weights_are_replaced_under_load_and_no_run_reads_what_is_written(load, sim, graphs):
    runner = await load(instances=2, copy_inputs=True, copy_outputs="cpu", cuda_graphs=graphs)
    sim.take(100)
    values = set()
    over = False
    seen = asyncio.Condition()

    async def ask():
        while not over:
            future = runner.submit(torch.ones(1, 4))
            value = (await future)[0, 0].item()
            assert value == future.trace.epoch
            values.add(value)
            async with seen:
                seen.notify_all()

    asking = [asyncio.ensure_future(ask()) for _ in range(4)]
    for epoch in range(2, 8):
        where = "cpu" if epoch % 2 else "sim"
        report = await runner.update({"weight": torch.full((4,), float(epoch)).to(where)})
        assert report.epoch == epoch
        async with seen:
            await seen.wait_for(lambda epoch=epoch: float(epoch) in values)
    over = True
    await asyncio.gather(*asking)
    assert values >= {2.0, 3.0, 4.0, 5.0, 6.0, 7.0}
    assert runner.info.cuda_graphs == (4 if graphs else 0)  # two slots, two buffers, one size


@pytest.mark.parametrize("kind", ["cuda"])
async def test_recorded_runs_serve_requests_of_any_sizes_alone_and_together(load):
    options = {"copy_inputs": True, "copy_outputs": "cpu", "cuda_graphs": True, "instances": 2}
    alone = await load(name="alone", **options)
    together = await load(
        name="together", **options, batching=Batching(max_size=8, dim=0, pad_to="powers_of_two")
    )
    # Warming up records a run in each slot; trying whether rows are independent runs other sizes.
    assert (alone.info.cuda_graphs, together.info.cuda_graphs) == (2, 3)
    for _ in range(3):
        inputs = [torch.full((rows, 4), float(rows)) for rows in (1, 2, 3, 1, 2, 3)]
        for runner in (alone, together):
            for x, y in zip(inputs, await asyncio.gather(*map(runner.run, inputs)), strict=True):
                assert torch.equal(y, x)
    assert alone.info.cuda_graphs <= 6
    assert together.info.cuda_graphs <= 8
    assert together.stats().batches >= 1


@pytest.mark.parametrize("kind", ["xpu", "mps"])
async def test_cuda_graphs_are_refused_where_there_are_none(load):
    with pytest.raises(
        ConfigError, match=r"cuda_graphs=True, but 'sim.*' has no such thing; it is for 'cuda'"
    ):
        await load(cuda_graphs=True)


@pytest.mark.parametrize("kind", ["xpu", "mps"])
async def test_priorities_of_streams_are_refused_where_there_are_none(load):
    with pytest.raises(ConfigError, match=r"stream_priority=-1, but 'sim.*' has no such thing"):
        await load(stream_priority=-1)


async def test_a_runner_says_that_no_real_device_of_its_kind_has_been_tried(load):
    runner = await load()
    assert runner.info.verified is False
    assert any("was tested on a simulated device only" in note for note in runner.info.notes)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
async def test_another_threads_current_stream_is_what_its_request_is_ordered_with(
    load, scheduler, sim
):
    runner = await load()
    device = next(iter(scheduler._devices.opened.values()))
    mine = device.open_stream()
    x = torch.ones(1, 4).to("sim")
    sim.synchronize()
    sim.hold()

    def call():
        with mine.current():
            launch(mine.handle, writes=[x])
            y = runner.run_blocking(x)
            sim.hold()
            launch(mine.handle, reads=[y])

    calling = asyncio.ensure_future(asyncio.to_thread(call))
    await asyncio.to_thread(sim.wait_until_waiting, 1)
    sim.go()
    await calling
    second = runner.submit(
        x
    )  # in the first one's memory, were it not recorded on the thread's stream
    sim.go()
    await second
    mine.close()


@pytest.mark.parametrize("kind", ["cuda"])
async def test_when_a_device_is_lost_what_is_queued_fails_at_once_and_the_numbers_say_so(
    load, scheduler, sim
):
    runner = await load(copy_inputs=True, copy_outputs="cpu")
    assert scheduler.stats().devices["sim:0"].lost == ""
    sim.break_device()
    futures = [runner.submit(torch.ones(1, 4)) for _ in range(10)]
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [DeviceLostError] * 10
    assert scheduler.stats().devices["sim:0"].lost.startswith("CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(DeviceLostError, match=r"Restart the process to use the device again"):
        await runner.run(torch.ones(1, 4))


@pytest.mark.parametrize("kind", ["cuda"])
async def test_a_device_that_the_callers_own_work_broke_is_lost_as_well(load, scheduler, sim):
    runner = await load()
    x = torch.ones(1, 4).to("sim")
    sim.break_device()
    launch(0, reads=[x])
    with sim.module.in_context(), pytest.raises(RunError):
        sim.driver.call("cuStreamSynchronize", None)
    for _ in range(2):
        with pytest.raises(
            DeviceLostError, match="device sim:0 is lost: CUDA_ERROR_ILLEGAL_ADDRESS"
        ):
            await runner.run(x)
    assert scheduler.stats().devices["sim:0"].lost.startswith("CUDA_ERROR_ILLEGAL_ADDRESS")


@pytest.mark.parametrize("kind", ["cuda"])
async def test_where_outputs_shall_go_is_the_host_or_nowhere(load):
    with pytest.raises(ConfigError, match="copy_outputs"):
        await load(copy_outputs="cuda:1")


@pytest.mark.parametrize("kind", ["cuda"])
async def test_a_cancelled_request_leaves_nothing_behind(load, sim):
    runner = await load(copy_inputs=True)
    sim.hold()
    future = runner.submit(torch.ones(1, 4))
    await asyncio.to_thread(sim.wait_until_waiting, 1)
    assert future.cancel()
    sim.go()
    assert (await runner.run(torch.ones(1, 4)))[0, 0].item() == 1.0


@pytest.fixture
async def two():
    """A scheduler on two devices, and how to load the model on both."""
    devices = {device.name: device for device in (simulator().cuda(0), simulator().cuda(1))}
    async with Scheduler(devices=devices) as scheduler:

        async def load(**options):
            return await scheduler.load(
                model_path(), **{"name": "times", "devices": [*devices], "inputs": SPECS, **options}
            )

        yield scheduler, load
        simulator().go()


HOST = {"copy_inputs": True, "copy_outputs": "cpu"}


async def test_a_runner_on_two_devices_takes_requests_from_the_host_to_either(two):
    _, load = two
    runner = await load(**HOST)
    inputs = [torch.full((rows, 4), float(rows)) for rows in range(1, 21)]
    for x, y in zip(inputs, await asyncio.gather(*map(runner.run, inputs)), strict=True):
        assert torch.equal(y, x)
    await runner.update({"weight": torch.full((4,), 2.0)})
    assert [await runner.run(inputs[0]) for _ in range(4)] == [pytest.approx(2 * inputs[0])] * 4
    assert [one.completed > 0 for one in runner.stats().replicas.values()] == [True, True]
    async with runner.lease() as lease:
        assert torch.equal(await lease.run(inputs[0]), 2 * inputs[0])


async def test_what_is_queued_on_a_device_that_is_lost_runs_on_the_other(two, sim):
    _, load = two
    runner = await load(**HOST)
    sim.hold()
    inputs = [torch.full((1, 4), float(number)) for number in range(20)]
    futures = [runner.submit(x) for x in inputs]
    await asyncio.to_thread(sim.wait_until_waiting, 2)
    sim.break_device(index=0)
    sim.go()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    failed = [y for y in outcomes if isinstance(y, Exception)]
    assert len(failed) <= 2  # was given to a lane of it
    assert {type(error) for error in failed} == {DeviceLostError}
    assert all(torch.equal(y, x) for x, y in zip(inputs, outcomes, strict=True) if y not in failed)
    assert [one.device for one in runner.info.replicas] == ["sim:1"]
    assert torch.equal(await runner.run(inputs[3]), inputs[3])


async def test_a_runner_on_two_devices_refuses_an_input_that_lies_on_one(two):
    _, load = two
    runner = await load(**HOST)
    with pytest.raises(InputMismatchError) as caught:
        await runner.run(torch.ones(1, 4).to("sim:1"))
    assert (caught.value.expected, caught.value.got) == ("device cpu", "sim:1")


@pytest.mark.parametrize("options", [{}, {"copy_inputs": True}, {"copy_outputs": "cpu"}])
async def test_a_runner_on_two_devices_takes_from_the_host_and_brings_there_or_is_refused(
    two, options
):
    scheduler, load = two
    with pytest.raises(ConfigError, match="Set copy_inputs=True, copy_outputs='cpu'"):
        await load(**options)
    assert dict(scheduler.runners) == {}


@pytest.mark.parametrize(
    "launchers", [None, *(pytest.param(n, marks=needs_native) for n in (1, 2))]
)
async def test_as_many_runs_are_on_a_device_at_once_as_there_are_lanes(sim, launchers):
    device = open_device("cuda")
    config = SchedulerConfig(devices={device.name: DeviceConfig(lanes=12, launchers=launchers)})
    async with Scheduler(config, devices={device.name: device}) as scheduler:
        runner = await scheduler.load(
            model_path(),
            name="times",
            device=device.name,
            instances=12,
            inputs=SPECS,
            copy_inputs=True,
        )
        sim.hold()
        futures = [runner.submit(torch.ones(1, 4)) for _ in range(12)]
        if launchers is None:
            await asyncio.to_thread(sim.wait_until_waiting, 12)
        else:
            await asyncio.to_thread(sim.wait_until_pending, 24)  # each copies and runs
        sim.go()
        await asyncio.gather(*futures)


async def test_models_make_room_for_others_on_a_device_and_come_back_with_the_weights_they_had(
    kind,
):
    device = open_device(kind)
    config = SchedulerConfig(devices={device.name: DeviceConfig(memory_limit=40, evict="lru")})
    async with Scheduler(config, devices={device.name: device}) as scheduler:
        options = {
            "device": device.name,
            "inputs": SPECS,
            "copy_inputs": True,
            "copy_outputs": "cpu",
        }
        first = await scheduler.load(model_path(), name="first", **options)
        assert first.stats().memory == 16
        await first.update({"weight": torch.full((4,), 3.0)}, keep_previous=False)
        others = [
            await scheduler.load(model_path(), name=f"other{number}", **options)
            for number in range(3)
        ]
        assert first.stats().parked
        x = torch.ones(2, 4)
        for _ in range(3):
            for runner in (first, *others):
                wanted = 3 if runner is first else 1
                assert torch.equal(await runner.run(x), wanted * x)
        memory = scheduler.stats().devices[device.name].memory
        assert memory.used == 32
        for thread in threading.enumerate():
            if thread.name.endswith(":memory"):
                thread.join()
        memory = scheduler.stats().devices[device.name].memory
        assert (memory.workspace > 0) == (kind == "cuda")


async def test_each_slot_stays_on_one_lane_and_so_needs_one_workspace(sim):
    """Libraries such as cuBLAS keep a workspace for each thread and stream that have met."""
    device, draw = open_device("cuda"), random.Random(1)
    config = SchedulerConfig(devices={device.name: DeviceConfig(lanes=4)})
    async with Scheduler(config, devices={device.name: device}) as scheduler:
        runners = [
            await scheduler.load(
                model_path(chain=True),
                name=name,
                device=device.name,
                inputs=SPECS,
                instances=slots,
            )
            for name, slots in (("a", 1), ("b", 1), ("c", 2))
        ]
        x = torch.ones(1, 4).to("sim")
        sim.clear_workspaces()
        for _ in range(30):
            some = draw.sample(runners, draw.randint(1, 3))
            await asyncio.gather(*(runner.run(x) for runner in some for _ in range(2)))
        assert sim.workspaces() == 4
    sim.clear_workspaces()


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, [3, 5, 32]),
        ({"lanes": 4}, [4, 4, 4]),
        ({"cores": 4}, [3, 4, 4]),
        ({"affinity": (0, 0)}, [2, 2, 2]),
    ],
    ids=["default", "lanes", "cores", "affinity"],
)
async def test_a_device_has_a_lane_for_each_instance_unless_settings_say_otherwise(
    sim, settings, counts
):
    device = open_device("cuda")
    config = SchedulerConfig(devices={device.name: DeviceConfig(**settings)})
    async with Scheduler(config, devices={device.name: device}) as scheduler:
        seen = []
        for name, instances in (("a", 3), ("b", 2), ("c", 40)):
            runner = await scheduler.load(
                model_path(),
                name=name,
                device=device.name,
                instances=instances,
                inputs=SPECS,
                warmup=False,
                copy_inputs=True,
            )
            stats = scheduler.stats().devices[device.name]
            seen.append((stats.lanes, stats.cores))
        most = counts[-1]
        assert [lanes for lanes, _ in seen] == counts
        assert settings or seen == [(count, count) for count in counts]
        sim.hold()
        futures = [runner.submit(torch.ones(1, 4)) for _ in range(40)]
        await asyncio.to_thread(sim.wait_until_waiting, most)
        assert scheduler.stats().devices[device.name].busy_lanes == most
        sim.go()
        await asyncio.gather(*futures)


async def test_models_that_are_loaded_at_once_have_their_lanes(sim):
    device = open_device("cuda")
    async with Scheduler(devices={device.name: device}) as scheduler:
        await asyncio.gather(
            *(
                scheduler.load(
                    model_path(), name=name, device=device.name, instances=2, inputs=SPECS
                )
                for name in "abcd"
            )
        )
        dispatcher = scheduler._devices.dispatchers[device.name]
        assert (dispatcher.queue.lanes.count, dispatcher.executor.lanes) == (8, 8)


async def test_a_model_whose_lanes_can_not_be_opened_is_not_loaded(sim, monkeypatch):
    device = open_device("cuda")
    async with Scheduler(devices={device.name: device}) as scheduler:

        def load(name):
            return scheduler.load(
                model_path(), name=name, device=device.name, instances=2, inputs=SPECS
            )

        await load("a")
        streams = sim.streams()
        executor = scheduler._devices.dispatchers[device.name].executor
        grow = executor.grow

        def refuse(lanes):
            raise ResourcesError(f"{lanes} lanes")

        monkeypatch.setattr(executor, "grow", refuse)
        with pytest.raises(ResourcesError, match="4 lanes"):
            await load("b")
        assert (sim.streams(), scheduler.stats().devices[device.name].lanes) == (streams, 2)
        monkeypatch.setattr(executor, "grow", grow)
        await load("b")
        assert scheduler.stats().devices[device.name].lanes == 4
