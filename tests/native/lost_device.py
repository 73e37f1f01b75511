"""A process that loses one of its two devices while models run on both, and goes on to its end.

The models are as torch 2.12 compiles them: freeing them on the lost device would end the process.

python -m tests.native.lost_device (eager|graphs|parked)
"""

from __future__ import annotations

import asyncio
import sys

import torch

from aoti_sched import DeviceConfig, DeviceLostError, Scheduler, SchedulerConfig
from tests.native.simulated import model_path, simulator

HOST = {"copy_inputs": True, "copy_outputs": "cpu"}


async def main(how: str) -> None:
    sim = simulator()
    devices = {device.name: device for device in (sim.cuda(0), sim.cuda(1))}
    # With room for one model's weights and a half, one of two models on a device is evicted.
    settings = DeviceConfig(memory_limit=24, evict="lru") if how == "parked" else DeviceConfig()
    config = SchedulerConfig(devices=dict.fromkeys(devices, settings))
    path = model_path(older=how != "graphs")  # those of older models are refused
    options = {**HOST, "instances": 2, "cuda_graphs": how == "graphs"}
    x = torch.ones(2, 4)
    async with Scheduler(config, devices=devices) as scheduler:
        both = await scheduler.load(path, name="both", devices=[*devices], **options)
        lost = await scheduler.load(path, name="lost", device="sim:0", **options)
        for runner in (both, lost, both):
            await runner.run(x)
        sim.break_device(index=0)
        runs = [runner.submit(x) for runner in (lost, both) for _ in range(20)]
        ends = await asyncio.gather(*runs, return_exceptions=True)
        failed = [end for end in ends if isinstance(end, BaseException)]
        assert {type(error) for error in failed} == {DeviceLostError}, failed
        assert all(isinstance(end, DeviceLostError) for end in ends[:20]), ends[:20]
        assert len(failed) < 40, "the healthy replica serves on"
        assert torch.equal(await both.run(x), x)
        if how != "parked":  # its weights are the only ones on the healthy device
            await both.update({"weight": torch.full((4,), 2.0)})
            assert torch.equal(await both.run(x), 2 * x)
        assert scheduler.stats().devices["sim:0"].lost
        assert not scheduler.stats().devices["sim:1"].lost
        await lost.aclose()
    assert sim.faults() == "", sim.faults()
    print("ended well")


asyncio.run(main(sys.argv[1]))
