"""A package in memory on a really compiled model: loaded, run, parked and brought back."""

from __future__ import annotations

import hashlib
import io
import sys

import pytest
import torch
from torch.testing import assert_close

from aoti_sched import DeviceConfig, PackageHashError, Scheduler, SchedulerConfig
from tests.models import build
from tests.unit.engine.support import until

X = torch.ones(3, 8)


@pytest.fixture(scope="module")
def contents():
    return build("mlp").path.read_bytes()


@pytest.fixture
def expected():
    return build("mlp").module()(X)


@pytest.mark.parametrize("wrap", [bytes, io.BytesIO])
async def test_a_model_in_memory_answers_as_the_file_does_and_its_bytes_are_not_kept(
    contents, expected, wrap
):
    contents = bytes(bytearray(contents))  # one that only this test holds
    references = sys.getrefcount(contents)
    digest = hashlib.sha256(contents).hexdigest()
    async with Scheduler() as scheduler:
        runner = await scheduler.load(wrap(contents), name="mlp", sha256=digest)
        assert_close(await runner.run(X), expected)
        assert (runner.info.sha256, runner.info.path) == (digest, "model.pt2 (in memory)")
        # The worker thread of the load may still be dropping what it has loaded.
        await until(lambda: sys.getrefcount(contents) == references)
        with pytest.raises(PackageHashError, match=r"model.pt2 \(in memory\): expected sha256"):
            await scheduler.load(wrap(contents), sha256="0" * 64)


async def test_a_model_in_memory_comes_back_from_parking(contents, expected):
    limit = {"memory_limit": 1100, "evict": "lru", "lanes": 1}
    config = SchedulerConfig(devices={"cpu": DeviceConfig(**limit)})
    async with Scheduler(config) as scheduler:
        runners = [await scheduler.load(contents, name=name) for name in ("a", "b")]
        assert runners[0].stats().parked
        for runner in (*runners, *runners):
            assert_close(await runner.run(X), expected)
