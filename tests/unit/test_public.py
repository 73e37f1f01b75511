"""The small things of the public face: the version, lazy names, last numbers, phases, pruning."""

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import structlog

import aoti_sched
from aoti_sched import Phase, SchedulerConfig
from aoti_sched.package import prune as pruning
from aoti_sched.queue.runner_state import Phase as PhaseOfRules
from aoti_sched.testing import FakeBackend, fake_scheduler, settle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


def test_the_version_is_that_of_the_package():
    (stated,) = re.findall(
        r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert aoti_sched.__version__ == stated


def test_every_public_name_is_there_and_no_other_is():
    assert [name for name in aoti_sched.__all__ if not hasattr(aoti_sched, name)] == []
    with pytest.raises(AttributeError, match="module 'aoti_sched' has no attribute 'nothing'"):
        aoti_sched.nothing  # noqa: B018


def test_an_import_brings_no_more_than_it_needs():
    program = "import aoti_sched, json, sys; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = set(json.loads(ran.stdout))
    heavy = {"torch", "numpy", "structlog", "filelock", "zipfile", "tomli", "pytest"}
    assert not heavy & modules
    assert not {"aoti_sched.compile", "aoti_sched.package", "aoti_sched.engine.loader"} & modules


# --- numbers --------------------------------------------------------------------------------------


async def test_a_closed_scheduler_gives_the_last_numbers():
    backend = FakeBackend({"a": len, "b": len}, auto=True)
    async with fake_scheduler(backend) as scheduler:
        a, b = await scheduler.load("a.pt2"), await scheduler.load("b.pt2")
        for _ in range(3):
            await a.run("abc")
        await b.aclose()  # closed before: it is not there at the end
        await a.run("abc")
    stats = scheduler.stats().devices["cpu"]
    assert list(stats.runners) == ["a"]
    assert (stats.runners["a"].completed, stats.runners["a"].phase) == (4, Phase.DRAINED)
    assert a.stats().completed == 4
    assert (stats.busy_lanes, stats.queued) == (0, 0)


async def test_requests_that_end_while_the_scheduler_closes_are_counted():
    backend = FakeBackend({"a": len}, lanes=1)
    scheduler = aoti_sched.Scheduler(devices={"cpu": backend})
    async with scheduler:
        runner = await scheduler.load("a.pt2")
        futures = [runner.submit("abc") for _ in range(3)]
        backend.finish_all()
    assert [await future for future in futures] == [3, 3, 3]
    assert scheduler.stats().devices["cpu"].runners["a"].completed == 3


def test_a_scheduler_that_was_never_entered_has_no_numbers():
    assert aoti_sched.Scheduler().stats().devices == {}


def test_the_phases_are_those_of_the_rules():
    assert [phase.name for phase in Phase] == [phase.name for phase in PhaseOfRules]


async def test_a_phase_is_its_name_as_text_and_in_json(aoti_backend, aoti_scheduler):
    aoti_backend.models["a"] = len
    runner = await aoti_scheduler.load("a.pt2")
    phase = runner.stats().phase
    assert phase is Phase.OPEN
    assert (phase == "OPEN", f"{phase}", str(phase)) == (True, "OPEN", "OPEN")
    stats = runner.stats()
    assert msgspec.json.decode(msgspec.json.encode(stats), type=type(stats)) == stats


# --- the cache ------------------------------------------------------------------------------------


async def entered(monkeypatch, prune, **settings):
    monkeypatch.setattr("aoti_sched.engine.pruning.prune", prune)
    backend = FakeBackend(auto=True)
    async with fake_scheduler(backend, config=SchedulerConfig(**settings)):
        await settle()


async def test_a_scheduler_prunes_the_cache_on_entry(monkeypatch, logs, tmp_path):
    calls = []

    def prune(folder, *, limit, age):
        calls.append((folder, limit, age))
        return pruning.Pruned(2, 100, 50)

    await entered(monkeypatch, prune, cache_dir=str(tmp_path), cache_limit=100, cache_age=60.0)
    assert calls == [(tmp_path, 100, 60.0)]
    (entry,) = [entry for entry in logs if entry["event"] == "cache pruned"]
    assert (entry["entries"], entry["bytes"], entry["left_bytes"]) == (2, 100, 50)


async def test_a_cache_that_cannot_be_pruned_is_a_warning(monkeypatch, logs):
    def prune(folder, *, limit, age):
        raise OSError("read-only")

    await entered(monkeypatch, prune, cache_limit=100)
    (entry,) = [entry for entry in logs if entry["event"] == "cache not pruned"]
    assert entry["error"] == "read-only"


async def test_a_cache_without_limits_is_left_alone(monkeypatch):
    await entered(monkeypatch, None)
