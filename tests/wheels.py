"""Wheels as `pip wheel .` builds them, with a compiler and without one. `make wheels` runs this; the suite does not, for pip
fetches what builds the native module."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISSING = "/nonexistent"


def wheel(into: Path, **environment: str) -> Path:
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", into, ROOT)
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = into.glob("*.whl")
    return built


def files(built: Path) -> list[str]:
    return zipfile.ZipFile(built).namelist()


def lanes(built: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """What the package says of its lanes, unpacked: without `site`, which would find the one that is installed here."""
    zipfile.ZipFile(built).extractall(into)
    path = os.pathsep.join([str(into), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return subprocess.run(
        (sys.executable, "-S", "-m", "aoti_sched.backends.native"),
        env={**os.environ, "PYTHONPATH": path},
        cwd=into,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(tmp_path_factory.mktemp("fallback"), CC=MISSING, CXX=MISSING)


def test_a_wheel_brings_the_native_module_for_this_python(native, tmp_path):
    (module,) = [name for name in files(native) if name.endswith(".so")]
    assert module.startswith("aoti_sched/backends/native/_native.")
    assert not native.name.endswith("-none-any.whl")
    said = lanes(native, tmp_path)
    assert (said.returncode, said.stdout) == (0, "aoti_sched: lanes are native threads\n")


def test_without_a_compiler_a_wheel_is_built_all_the_same_for_every_python(fallback, tmp_path):
    assert [name for name in files(fallback) if name.endswith(".so")] == []
    assert fallback.name.endswith("-py3-none-any.whl")
    said = lanes(fallback, tmp_path)
    assert (said.returncode, said.stdout) == (1, "")
    assert "LANES ARE PYTHON THREADS" in said.stderr


def test_both_wheels_bring_the_same_python_and_no_sources(native, fallback):
    def contents(built: Path) -> set[str]:
        return {name for name in files(built) if name.startswith("aoti_sched/") and not name.endswith(".so")}

    assert contents(native) == contents(fallback)
    assert {"aoti_sched/py.typed", "aoti_sched/backends/native/_native.pyi"} <= contents(native)
    assert {Path(name).suffix for name in contents(native)} == {".py", ".pyi", ".typed"}
