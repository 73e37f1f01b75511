"""What type checkers say of programs that use the package, and that it is so when they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import aoti_sched
from aoti_sched import BlockingScheduler, ConfigError, LoadSettings, Scheduler
from aoti_sched.testing import FakeBackend, fake_scheduler
from tests.e2e import typed_client

CLIENT = Path(typed_client.__file__)
SETTINGS = """
[mypy]
strict = True
[mypy-torch.*]
follow_imports = skip
[mypy-aoti_sched.*]
ignore_errors = True
"""
"""Torch's own types do not matter here, and reading them takes a minute."""
WRONG = """
from aoti_sched import BlockingRunner, Runnable, Runner, Scheduler

class Encoder:
    def forward(self, words: list[str], scale: int = 1) -> list[int]:
        return [scale * len(word) for word in words]

async def main(scheduler: Scheduler, runner: Runner, plain: BlockingRunner) -> None:
    await runner.options(timeout=1).update({})
    async with runner.lease() as lease:
        lease.options().stats()
    encoder = await scheduler.load("m.pt2", signature=Encoder.forward)
    await encoder.run(3)
    encoder.options(timeout=1).submit(["a"], scal=2)
    async with encoder.lease() as held:
        await held.run()
    text: str = await encoder.run(["a"])
    numbers: Runnable[[int], int] = encoder
    await scheduler.load("m.pt2", instance=2)
    await scheduler.load("m.pt2", signature=3)
    plain.options(timeout=1).update({})
"""
WRONG_LINES = [9, 11, 13, 14, 16, 17, 18, 19, 20, 21]
"""Lines of `WRONG` that are wrong."""


def lines_of(errors):
    return sorted({line for line, _ in errors}), errors


@pytest.fixture
def programs(tmp_path):
    (tmp_path / "right.py").write_text(CLIENT.read_text())
    (tmp_path / "wrong.py").write_text(WRONG)
    return tmp_path


def test_mypy_takes_the_right_client_and_refuses_each_wrong_line(programs):
    pytest.importorskip("mypy")
    (programs / "mypy.ini").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", programs, "right.py", "wrong.py"],
        cwd=programs,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line.split(":", 2) for line in done.stdout.splitlines() if ": error:" in line]
    assert [error for error in errors if error[0] != "wrong.py"] == []
    lines, told = lines_of([(int(line), text) for _, line, text in errors])
    assert (lines, done.stderr) == (WRONG_LINES, ""), told


def test_pyright_takes_the_right_client_and_refuses_each_wrong_line(programs):
    pytest.importorskip("pyright")
    config = {"typeCheckingMode": "strict", "include": ["right.py", "wrong.py"]}
    (programs / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=programs,
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright can't be fetched here: {done.stderr[-200:]}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"])
        for one in found
        if one["severity"] == "error"
    ]
    assert [error for error in errors if error[0] != "wrong.py"] == []
    lines, told = lines_of([(line, text) for _, line, text in errors])
    assert lines == WRONG_LINES, told


# --- what is stated is so -------------------------------------------------------------------------


def encode(words, scale=1, **_):
    return typed_client.Encoder().forward(words, scale) if isinstance(words, list) else []


@pytest.fixture
def backend():
    weights = {"encoder": {"w": 0}, "untyped": {"w": 0}}
    return FakeBackend({"encoder": encode}, weights=weights, auto=True)


async def test_the_typed_client_runs(backend):
    async with fake_scheduler(backend) as scheduler:
        await typed_client.main(scheduler)


def test_the_typed_client_of_plain_calls_runs(backend):
    with BlockingScheduler(devices={"cpu": backend}) as scheduler:
        typed_client.blocking(scheduler)


def test_the_settings_are_those_of_load():
    import inspect

    parameters = inspect.signature(Scheduler.load).parameters
    hints = {
        name: one.annotation
        for name, one in parameters.items()
        if name in LoadSettings.__annotations__
    }
    assert set(parameters) - {"self", "path", "signature"} == set(hints)
    assert hints == {
        name: kind.__forward_arg__ for name, kind in LoadSettings.__annotations__.items()
    }


def test_generics_take_their_types_when_a_program_runs():
    from collections.abc import Callable

    for kind in (aoti_sched.Runner, aoti_sched.RunnerView, aoti_sched.Lease, aoti_sched.Runnable):
        assert kind[[int, str], bytes].__origin__ is kind
    assert aoti_sched.RunFuture[int].__origin__ is aoti_sched.RunFuture

    def takes(model: aoti_sched.Runner[[int], str]) -> Callable[[int], str]: ...

    assert "model" in get_type_hints(takes, {**globals(), "Callable": Callable})


# --- a signature that does not fit ----------------------------------------------------------------


class Model:
    def forward(self, x, y): ...


@pytest.mark.parametrize("signature", [3, Model().forward, "forward"])
async def test_what_is_no_function_of_a_class_is_no_signature(backend, signature):
    async with fake_scheduler(backend) as scheduler:
        with pytest.raises(ConfigError, match="signature: expected a function of a class"):
            await scheduler.load("encoder.pt2", signature=signature)
        assert scheduler.runners == {}
