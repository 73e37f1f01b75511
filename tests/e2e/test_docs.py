"""Every python block of the README and the docs runs, on a fake backend, with what its page takes for granted."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import aoti_sched
from aoti_sched.testing import FakeBackend

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    f"{page.name} {number}": block
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1
    )
}
COMPLETE = {
    "README.md 2",
    "README.md 3",
}  # `test_readme.py` runs these as they stand, on a compiled model
TESTS = {name for name, block in BLOCKS.items() if block.startswith("async def test_")}
MODELS = {"encoder": lambda *_: "vectors", "ranker": lambda *_: "scores"}
MODELS |= {f"expert{number}": lambda _: "answer" for number in range(4)}


def backends():
    """The devices that the pages name, with the models they load."""
    found = {}
    for name in ("cpu", "cpu:0", "cpu:1", "cuda:0"):
        found[name] = FakeBackend(
            MODELS, weights={key: {"w": 0} for key in MODELS}, name=name, auto=True
        )
        found[name].records_runs = name == "cuda:0"
    return found


async def execute(block, **names):
    """Run a block, which may await, with these names; return what it leaves."""
    code = compile(block, "<block>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names = {
        **vars(aoti_sched),
        "aoti_sched": aoti_sched,
        "asyncio": asyncio,
        "pytest": pytest,
        **names,
    }
    awaited = eval(code, names)
    if inspect.iscoroutine(awaited):
        await awaited
    return names


@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - COMPLETE - TESTS))
async def test_a_block_runs(name):
    async with aoti_sched.Scheduler(devices=backends()) as scheduler:
        await execute(
            BLOCKS[name],
            aoti_sched=SimpleNamespace(
                Scheduler=partial(aoti_sched.Scheduler, devices=backends()),
                compile_package=inspect.signature(
                    aoti_sched.compile_package
                ).bind,  # other tests compile
            ),
            scheduler=scheduler,
            encoder=await scheduler.load("encoder.pt2", name="loaded before"),
            ranker=await scheduler.load("ranker.pt2", name="loaded before, too"),
            packages=[f"expert{number}.pt2" for number in range(4)],
            module=SimpleNamespace(state_dict=lambda: {"w": 1}, eval=lambda: None),
            **{key: {"w": 2} for key in ("a", "b", "weights")},
            **dict.fromkeys(("tokens", "x", "ids", "mask", "batch", "sequence"), 1),
        )


async def search(encoder, query):
    return await encoder.run(query)


async def deploy(ranker, weights):
    await ranker.update(weights)
    if await ranker.run(5) < 5:
        await ranker.rollback()


@pytest.mark.parametrize("name", sorted(TESTS))
async def test_a_test_in_the_docs_passes(name, aoti_backend, aoti_clock, aoti_scheduler):
    names = await execute(BLOCKS[name], search=search, deploy=deploy)
    (test,) = [names[one] for one in names if one.startswith("test_")]
    fixtures = {
        "aoti_backend": aoti_backend,
        "aoti_clock": aoti_clock,
        "aoti_scheduler": aoti_scheduler,
    }
    await test(**{wanted: fixtures[wanted] for wanted in inspect.signature(test).parameters})


def test_the_changelog_says_each_thing_once():
    subjects = re.findall(r"^- ([A-Z][\w ]+):", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert subjects
    assert [subject for subject in {*subjects} if subjects.count(subject) > 1] == []


def test_every_page_that_a_page_names_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([\w/.-]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} names {target}"
