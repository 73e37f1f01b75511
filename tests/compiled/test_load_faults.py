"""Each call into a model's library fails once while the model is loaded: nothing stays, and the
next load works.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from aoti_sched import LoadError, Scheduler
from aoti_sched.backends.aoti.c_abi import Library
from tests.compiled.conftest import living_lanes
from tests.models import build
from tests.unit.engine.support import until

MODELS = ["mlp", "folding", "weights_blob", "weights_pickle"]
FREES = "Delete"


class FailingCalls:
    """Makes the n-th request for a function of any library fail, and counts containers that are
    not freed.

    `Library.call` asks `Library.function`, so each call counts once. The call that frees a
    container never fails.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.start(0)
        self.containers = 0
        function, call = Library.function, Library.call

        def failing(library: Library, name: str) -> object:
            if not name.endswith(FREES):
                self.asked += 1
                if self.asked == self._n:
                    self.failed = name
                    raise LoadError(f"{library.name}: {name} failed: injected")
            return function(library, name)

        def counting(library: Library, name: str, *arguments: object) -> None:
            call(library, name, *arguments)
            self.containers += name.startswith("AOTInductorModelContainerCreate")
            self.containers -= name == "AOTInductorModelContainerDelete"

        monkeypatch.setattr(Library, "function", failing)
        monkeypatch.setattr(Library, "call", counting)

    def start(self, n: int) -> None:
        self.asked, self._n, self.failed = 0, n, ""


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("instances", [1, 2])
@pytest.mark.parametrize("name", MODELS)
async def test_a_load_whose_nth_call_fails_leaves_nothing_and_the_next_one_works(
    name, instances, monkeypatch
):
    built = build(name)
    wanted = built.module().eval()(*built.args)
    calls = FailingCalls(monkeypatch)
    async with Scheduler() as scheduler:
        await (await scheduler.load(built.path)).aclose()  # opens what is opened once
        await until(lambda: not any(name.startswith("aoti load") for name in threads()))
        before = threads(), descriptors()
        n = 0
        while True:
            n += 1
            calls.start(n)
            try:
                runner = await scheduler.load(built.path, name="model", instances=instances)
            except LoadError as error:
                assert calls.failed
                assert f"{calls.failed} failed: injected" in str(error)  # noqa: PT017
            else:
                assert not calls.failed, f"{calls.failed} failed, and the load went on"
                break
            calls.start(0)
            stats = scheduler.stats().devices["cpu"]
            assert (stats.runners, stats.memory.used) == ({}, 0), calls.failed
            assert calls.containers == 0, f"a container stayed at call {n}"
            await until(lambda: "aoti load of model" not in threads())  # its last instants
            assert (threads(), descriptors()) == before, f"at call {n}"
        assert n > 10, "no call was hit"
        found = await runner.run(*built.args)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        await runner.aclose()
        assert calls.containers == 0
    assert living_lanes() == []
