"""Runners of models that torch 2.12 compiled: their weights are updated through C++ maps, where
the native module is there.
"""

import sys

import pytest
import torch

from aoti_sched import ConstantMismatchError, Scheduler, UpdateError
from aoti_sched.backends import opening
from tests.compiled.backends.older import NATIVE, OlderLibrary, with_maps
from tests.compiled.test_live_weights import canary_weights
from tests.models import build


@pytest.fixture(autouse=True)
def older_models(monkeypatch):
    monkeypatch.setattr(opening, "Library", OlderLibrary)


async def numbers_seen(runner):
    return set((await runner.run(torch.randn(32, 16)))[0].flatten().tolist())


@with_maps
async def test_a_runner_is_updated_in_full_and_in_part_and_rolled_back():
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path, instances=2)
        assert "UpdateConstantBufferPairs (torch 2.13)" in " ".join(runner.info.notes)
        assert (await runner.update(canary_weights(2))).epoch == 2
        assert await numbers_seen(runner) == {2.0}
        with pytest.raises(ConstantMismatchError):
            await runner.update({**canary_weights(3), "last": torch.zeros(7, 5)})
        await runner.update({"last": torch.full((5, 7), 4.0)}, partial=True)
        assert await numbers_seen(runner) == {2.0, 4.0}
        await runner.rollback()
        assert await numbers_seen(runner) == {2.0}
        assert torch.equal((await runner.extract())["last"], torch.full((5, 7), 2.0))


async def test_without_the_native_module_an_update_is_refused_with_what_to_do_and_it_serves_on(
    monkeypatch,
):
    monkeypatch.setenv("AOTI_SCHED_EXECUTOR", "threads")
    monkeypatch.setitem(sys.modules, NATIVE, None)
    async with Scheduler() as scheduler:
        runner = await scheduler.load(build("canary").path)
        words = (
            r"can't be updated live: a torch before 2\.13 .* C\+\+ map, .* install a compiler "
            r"\(g\+\+\)"
        )
        with pytest.raises(UpdateError, match=words):
            await runner.update(canary_weights(2))
        assert await numbers_seen(runner) == {1.0}
