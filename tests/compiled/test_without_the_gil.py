"""A run on a native lane never waits for the GIL, from its beginning to its end."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time

import pytest
import torch
from torch.utils._pytree import tree_map_only

from aoti_sched import Batching, Scheduler
from tests.compiled.conftest import NATIVE
from tests.models import build

pytestmark = pytest.mark.skipif(not NATIVE, reason="no native module was built")

HELD = 0.25
"""Seconds for which a thread keeps the GIL. The runs take a thousandth of that."""


@pytest.fixture(autouse=True)
def patient():
    """Let no thread ask another one for the GIL within a test."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    yield
    sys.setswitchinterval(before)


def keep_the_gil():
    """Keep the GIL for `HELD` seconds, and return the time at the end."""
    until = time.monotonic() + HELD
    while time.monotonic() < until:
        pass
    return time.monotonic()


def own(arguments):
    """Return copies without other owners, whose last handle torch frees under the GIL."""
    return tree_map_only(torch.Tensor, torch.clone, arguments)


async def ended_meanwhile(future):
    """Return whether a run ended while the GIL was kept."""
    until = keep_the_gil()
    await future
    return future.trace.finished < until


@pytest.mark.parametrize(
    ("name", "gil"),
    [
        ("mlp", "released"),
        ("signature", "released"),  # several inputs and outputs, nested
        ("aliasing", "released"),  # outputs that are inputs
        ("linear_algebra", "released"),  # through the dispatcher
        ("custom_op", "held"),  # an operator in Python, which shows that a run can wait
    ],
)
async def test_a_run_ends_while_another_thread_has_the_gil(name, gil):
    built = build(name)
    args, kwargs = built.definition.args, built.definition.kwargs
    async with Scheduler() as scheduler:
        runner = await scheduler.load(built.path, name=name, placement="lane")
        assert runner.info.gil == gil
        await runner.run(*own(args), **own(kwargs))
        ended = await ended_meanwhile(runner.submit(*own(args), **own(kwargs)))
        assert ended == (gil == "released")


async def test_a_run_under_a_lease_does():
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("mlp").path, placement="lane")
        x = build("mlp").definition.args[0]
        await runner.run(x)
        async with runner.lease() as lease:
            assert await ended_meanwhile(lease.submit(x.clone()))


async def test_a_batch_does():
    async with Scheduler() as scheduler:
        runner = await scheduler.load(
            build("mlp").path, placement="lane", instances=1, batching=Batching(max_size=8)
        )
        x = build("mlp").definition.args[0]
        for _ in itertools.repeat(None, 3):  # until it is known what rows cost
            await asyncio.gather(*(runner.run(x.clone()) for _ in range(8)))
        futures = [runner.submit(x.clone()) for _ in range(8)]
        await asyncio.sleep(0)  # the batch is launched at the end of the loop's turn
        until = keep_the_gil()
        await asyncio.gather(*futures)
        meanwhile = [future.trace.batch_size for future in futures if future.trace.finished < until]
        assert meanwhile
        assert min(meanwhile) > 1
