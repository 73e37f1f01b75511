"""Every Python block of README.md and docs/ runs, on models that two of these blocks compile.

README.md compiles `mlp.pt2`, which is also the pages' `ranker.pt2`.
docs/packages.md compiles `encoder.pt2`.
A block that can't run here says why in an HTML comment above it.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import aoti_sched

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"(?:<!-- not run: (.*?) -->\n+)?```python\n(.*?)```", re.DOTALL)
FOUND = {
    f"{page.name} {number}": match.groups()
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text()), 1)
}
BLOCKS = {name: block for name, (reason, block) in FOUND.items() if not reason}
NOT_RUN = {name: reason for name, (reason, _) in FOUND.items() if reason}

COMPILE, SERVE = "README.md 2", "README.md 3"
COMPILE_ENCODER = "packages.md 1"
PROGRAMS = {COMPILE, SERVE, COMPILE_ENCODER}
TESTS = {name for name, block in BLOCKS.items() if block.startswith("async def test_")}

# What the pages take for granted: a module, and requests for it.
ENCODER = """
import torch, aoti_sched

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 16)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1)
        return torch.tanh((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))

torch.manual_seed(0)
module = Encoder()
ids, mask = torch.randint(100, (2, 7)), torch.ones(2, 7)
batch, sequence = torch.export.Dim("batch", max=64), torch.export.Dim("sequence", max=32)
"""


# The glue around the kernels computes the same unoptimized, and compiles faster.
QUICK = {"AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0"}


def program(text, folder):
    """Run a block as a program of its own, and return what it prints."""
    command = [sys.executable, "-W", "ignore", "-c", text]
    ran = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **QUICK},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the packages that the pages name, compiled as the pages say."""
    folder = tmp_path_factory.mktemp("docs")
    program(BLOCKS[COMPILE], folder)
    program(ENCODER + BLOCKS[COMPILE_ENCODER], folder)
    shutil.copy(folder / "mlp.pt2", folder / "ranker.pt2")
    return folder


def granted():
    """Return what the pages take for granted, by name."""
    public = {name: getattr(aoti_sched, name) for name in aoti_sched.__all__}
    names = {**public, "aoti_sched": aoti_sched, "asyncio": asyncio, "pytest": pytest}
    exec(ENCODER, names)
    torch = names["torch"]
    ranker = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    return names | {
        "module": ranker,
        "a": names["module"].state_dict(),
        "b": ranker.state_dict(),
        "weights": names["module"].state_dict(),
        "x": torch.randn(3, 16),
        "packages": ["ranker.pt2", "encoder.pt2", "mlp.pt2", "ranker.pt2"],
    }


async def execute(block, names):
    """Run a block, which may await, with these names; return what it leaves."""
    code = compile(block, "<block>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    awaited = eval(code, names)
    if inspect.iscoroutine(awaited):
        await awaited
    return names


def test_the_first_five_minutes_print_what_the_readme_says(workplace):
    page = (ROOT / "README.md").read_text()
    printed = re.search(r"The last lines? prints?:\s+```\n(.*?)\n```", page, re.DOTALL)
    assert printed[1] in program(BLOCKS[SERVE], workplace)


# A block may read a file that one before it on its page has written.
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in PROGRAMS | TESTS])
async def test_a_block_runs(name, workplace, monkeypatch, tmp_path):
    if "affinity=" in BLOCKS[name] and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the block divides two cores, and this process has one")
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("AOTI_SCHED_CACHE", str(tmp_path))
    names = granted()
    if "Scheduler(" in BLOCKS[name]:
        await execute(BLOCKS[name], names)
        return
    async with aoti_sched.Scheduler() as scheduler:
        encoder = await scheduler.load("encoder.pt2", name="the encoder")
        ranker = await scheduler.load("ranker.pt2", name="the ranker")
        await ranker.update(names["module"].state_dict())  # so that there is a set to go back to
        names |= {"scheduler": scheduler, "encoder": encoder, "ranker": ranker, "stable": ranker}
        names["canary"] = await scheduler.load("ranker.pt2", name="the canary")
        await execute(BLOCKS[name], names)


async def search(encoder, query):
    return await encoder.run(query)


async def deploy(ranker, weights):
    await ranker.update(weights)
    if await ranker.run(5) < 5:
        await ranker.rollback()


@pytest.mark.parametrize("name", sorted(TESTS))
async def test_a_test_in_the_docs_passes(name, aoti_backend, aoti_clock, aoti_scheduler):
    names = await execute(BLOCKS[name], granted() | {"search": search, "deploy": deploy})
    (test,) = [names[one] for one in names if one.startswith("test_")]
    fixtures = {
        "aoti_backend": aoti_backend,
        "aoti_clock": aoti_clock,
        "aoti_scheduler": aoti_scheduler,
    }
    await test(**{wanted: fixtures[wanted] for wanted in inspect.signature(test).parameters})


def test_these_blocks_alone_are_not_run():
    assert NOT_RUN == {
        "devices.md 1": "it needs a CUDA device",
        "devices.md 2": "it needs a CUDA device",
    }


def test_the_pages_have_no_python_without_a_block():
    for page in PAGES:
        text = BLOCK.sub("", page.read_text())
        assert "await scheduler.load(" not in "".join(re.findall(r"```.*?```", text, re.DOTALL))
        assert "```py" not in text, page.name


def test_the_changelog_says_each_thing_once():
    page = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^#+ .*|^- \*\*.*?\*\*", page, re.MULTILINE)
    assert len(headings) > 3
    assert [heading for heading in {*headings} if headings.count(heading) > 1] == []


def test_every_page_that_a_page_names_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([\w/.-]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} names {target}"
