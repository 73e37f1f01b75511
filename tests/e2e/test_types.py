"""What a type checker says of programs that use the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETTINGS = """
[mypy]
strict = True
[mypy-torch.*]
follow_imports = skip
[mypy-aoti_sched.*]
ignore_errors = True
"""
"""Torch's own types do not matter here, and reading them takes a minute."""
RIGHT = """
from aoti_sched import Lease, Runner, RunnerView, Scheduler, UpdateReport
from typing_extensions import assert_type

async def main(scheduler: Scheduler) -> None:
    runner = await scheduler.load("m.pt2")
    assert_type(runner, Runner)
    assert_type(runner.options(timeout=1), RunnerView)
    assert_type(runner.options().options(), RunnerView)
    assert_type(await runner.update({}), UpdateReport)
    view: RunnerView = runner
    async with view.options().lease() as lease:
        assert_type(lease.options(), Lease)
        await lease.options(timeout=1).run()
"""
WRONG = """
from aoti_sched import Runner

async def main(runner: Runner) -> None:
    await runner.options(timeout=1).update({})
    runner.options().options().stats()
    async with runner.lease() as lease:
        lease.options().stats()
"""


def test_a_view_is_no_runner_to_a_type_checker(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "right.py", "wrong.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line.partition("  [")[0] for line in done.stdout.splitlines() if "error:" in line]
    assert (errors, done.stderr) == (
        [
            'wrong.py:5: error: "RunnerView" has no attribute "update"',
            'wrong.py:6: error: "RunnerView" has no attribute "stats"',
            'wrong.py:8: error: "Lease" has no attribute "stats"',
        ],
        "",
    )
