"""Loading compiled models again: what is not done twice, and what each load still checks."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

import aoti_sched
from aoti_sched import PackageHashError, Scheduler
from aoti_sched.engine import warmup
from aoti_sched.package import archive, known
from aoti_sched.package.prune import prune
from tests.models import build


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of its own that counts as old enough to be described."""
    monkeypatch.setattr(known, "_SETTLED", -1e9)
    monkeypatch.setenv("AOTI_SCHED_CACHE", str(tmp_path / "cache"))
    return shutil.copyfile(build("mlp").path, tmp_path / "mlp.pt2")


@pytest.fixture
def hashed(monkeypatch):
    """The files that were hashed as a whole."""
    files, init = [], archive.FileDigest.__init__

    def count(self, path, contents=None):
        files.append(path)
        init(self, path, contents)

    monkeypatch.setattr(archive.FileDigest, "__init__", count)
    return files


async def test_a_package_is_hashed_at_its_first_load_only(package, hashed):
    x = torch.ones(2, 8)
    async with Scheduler() as scheduler:
        first = await scheduler.load(package, name="first")
        assert len(hashed) == 1
        again = await scheduler.load(package, name="again")
        assert len(hashed) == 1
        assert torch.equal(await first.run(x), await again.run(x))
        ours, theirs = again.info, first.info
        assert (ours.sha256, ours.inputs, ours.outputs, ours.constants, ours.metadata) == (
            theirs.sha256,
            theirs.inputs,
            theirs.outputs,
            theirs.constants,
            theirs.metadata,
        )


async def test_a_hash_that_is_asked_for_is_computed_at_each_load(package, hashed):
    async with Scheduler() as scheduler:
        digest = (await scheduler.load(package, name="first")).info.sha256
        await scheduler.load(package, name="again", sha256=digest)
        assert len(hashed) == 2
        with pytest.raises(PackageHashError):
            await scheduler.load(package, name="other", sha256="0" * 64)


async def test_another_package_at_the_same_path_is_the_one_that_is_loaded(package, hashed):
    async with Scheduler() as scheduler:
        first = await scheduler.load(package, name="first")
        other = package.with_suffix(".new")
        shutil.copyfile(build("conv").path, other)
        os.utime(other, ns=(package.stat().st_atime_ns, package.stat().st_mtime_ns))
        other.replace(package)
        second = await scheduler.load(package, name="second")
        assert second.info.sha256 != first.info.sha256
        assert second.info.signature != first.info.signature


async def test_a_new_weights_update_works_on_a_known_package(package):
    async with Scheduler() as scheduler:
        first = await scheduler.load(package, name="first")
        weights = {name: torch.zeros_like(w) for name, w in (await first.extract()).items()}
        again = await scheduler.load(package, name="again")
        await again.update(weights)
        assert not (await again.run(torch.ones(2, 8))).any()
        assert (await first.run(torch.ones(2, 8))).any()


@pytest.mark.parametrize("instances", [1, 3])
async def test_each_instance_is_warmed_up_once_on_one_row(package, monkeypatch, instances):
    shapes, values_for = [], warmup.values_for

    def recorded(*arguments):
        make = values_for(*arguments)

        def made():
            tensors = make()
            shapes.append(tuple(tensors[0].shape))
            return tensors

        return made

    monkeypatch.setattr("aoti_sched.engine.prepare.values_for", recorded)
    async with Scheduler() as scheduler:
        await scheduler.load(package, instances=instances)
    assert shapes == [(1, 8)] * instances


async def test_pruning_leaves_the_packages_of_running_models(package, tmp_path):
    cache = tmp_path / "cache"
    async with Scheduler() as scheduler:
        mlp = await scheduler.load(package)
        assert prune(cache, limit=1, age=0.0).entries == 0
        await mlp.run(torch.ones(2, 8))
        assert [path for path in cache.iterdir() if path.name.endswith("-model")]


async def test_the_lanes_of_an_opened_device_end_with_the_scheduler(package):
    from tests.compiled.conftest import living_lanes

    async with Scheduler() as scheduler:
        with pytest.raises(aoti_sched.PackageError):
            await scheduler.load(package.with_name("missing.pt2"))
    assert living_lanes() == []
