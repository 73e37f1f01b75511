"""What torch's modules for devices do that the simulated device does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from aoti_sched.backends.accelerators.xpu import POOL, XpuDevice
from aoti_sched.errors import LoadError


class Pool:
    """As torch hands out an XPU's streams: one after the other, and the first is the current."""

    def __init__(self):
        self.made = 0

    def Stream(self, index):
        self.made += 1
        number = (self.made - 1) % POOL
        return SimpleNamespace(sycl_queue=number, device_type=12, device_index=0, stream_id=number)

    def current_stream(self, index):
        return SimpleNamespace(sycl_queue=0)


def test_a_slot_never_gets_the_stream_that_all_other_work_of_the_process_is_on():
    device = XpuDevice(0, module=Pool())
    streams = [device.open_stream() for _ in range(POOL - 1)]
    assert sorted(stream.handle for stream in streams) == list(range(1, POOL))
    with pytest.raises(LoadError, match="streams are taken"):
        device.open_stream()
