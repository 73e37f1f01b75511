"""What tests of the public front on really compiled models share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import structlog

from aoti_sched import Scheduler

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Packages are unpacked here and not in the user's cache; processes that tests start inherit it."""
    directory = tmp_path_factory.mktemp("extracted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AOTI_SCHED_CACHE", str(directory))
        yield directory


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Tests that fail ten thousand runs on purpose need not read of each."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    async with Scheduler() as scheduler:
        yield scheduler


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a process of its own; one that hangs fails the test."""

    def run(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program), *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run
