"""What tests of the public front on really compiled models share."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch

from aoti_sched import Scheduler
from tests.forks import Forks
from tests.threads import named

ROOT = Path(__file__).resolve().parents[2]
NATIVE = importlib.util.find_spec("aoti_sched.backends.native._native") is not None
EXECUTORS = ["native", "threads"] if NATIVE else ["threads"]  # without a compiler there is the one


def living_lanes() -> list[str]:
    """The names of this process's lanes.

    One that was joined may take a moment to vanish from /proc.
    """
    names = []
    for _ in range(10_000):
        names = [name for name, _ in named("aoti:")]
        if not names:
            break
        os.sched_yield()
    return names


@pytest.fixture(autouse=True, scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Packages are unpacked here and not in the user's cache; processes that tests start
    inherit it.
    """
    directory = tmp_path_factory.mktemp("extracted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AOTI_SCHED_CACHE", str(directory))
        yield directory


@pytest.fixture(autouse=True, scope="package")
def one_eager_thread() -> Iterator[None]:
    """Eager modules answer on one thread.

    On two, the first call of sin, tanh and the like is rarely wrong by 1e-4: MKL then chooses its
    kernels, and torch 2.13 lets both threads into that at once.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that fail ten thousand runs on purpose need not read of each, nor keep each in
    memory.
    """
    monkeypatch.setattr(logging.getLogger("aoti_sched"), "disabled", True)


@pytest.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    async with Scheduler() as scheduler:
        yield scheduler


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    made = Forks("torch", "aoti_sched.scheduler", options=("-X", "faulthandler"))
    yield made
    made.close()


@pytest.fixture
def python(forks: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a copy of an interpreter that has imported torch; one that hangs fails
    the test.
    """

    def run(
        program: str, *arguments: object, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return forks.run(
            "-c",
            textwrap.dedent(program),
            [*map(str, arguments)],
            environment={**os.environ, **environment},
            folder=ROOT,
            timeout=240,
        )

    return run
