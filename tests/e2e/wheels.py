"""Wheels as `pip wheel .` builds them, with a compiler and without one.

`make wheels` runs this, after it has made the environment with what pyproject.toml asks for to
build, and the build in which all is compiled already.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "aoti_sched" / "expose" / "page"
MISSING = "/nonexistent"
BUILDER = Path(sys.prefix) / "builder" / "bin" / "python"
BUILD = Path(sys.prefix) / "compiled" / "build"


def wheel(into: Path, build: Path, *settings: str, **environment: str) -> Path:
    # An option that is not set has its default, and not its value in the build before.
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    settings = (f"build-dir={build}", *settings)
    command = (
        BUILDER,
        *("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", into),
        *(f"--config-settings={setting}" for setting in settings),
        ROOT,
    )
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = into.glob("*.whl")
    return built


def native_wheel(into: Path, *settings: str) -> Path:
    # As strict as the build was, since another option of the compiler would begin it again.
    return wheel(into, BUILD, "cmake.define.WARNINGS_AS_ERRORS=ON", *settings)


def files(built: Path) -> list[str]:
    return zipfile.ZipFile(built).namelist()


def lanes(built: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """What the package says of its lanes, unpacked: without `site`, which would find the one
    that is installed here.
    """
    into.mkdir(exist_ok=True)
    zipfile.ZipFile(built).extractall(into)
    path = os.pathsep.join(
        [str(into), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    )
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
    return native_wheel(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fallback")
    return wheel(folder / "wheel", folder / "build", CC=MISSING, CXX=MISSING)


def test_a_wheel_brings_the_native_module_and_compiled_rules_for_this_python(native, tmp_path):
    modules = {name.partition(".")[0] for name in files(native) if name.endswith(".so")}
    queue = (ROOT / "aoti_sched" / "queue").rglob("[!_]*.py")
    rules = {str(path.relative_to(ROOT).with_suffix("")) for path in queue}
    assert modules == {
        "aoti_sched/backends/native/_native",
        "aoti_sched/backends/native/proxy_model",
        "aoti_sched/_compiled__mypyc",  # what the following share
        "aoti_sched/engine/dispatcher",
        "aoti_sched/engine/observers",
        "aoti_sched/engine/traces",
        "aoti_sched/model/call_spec",
        "aoti_sched/model/input_check",
        *rules,
    }
    assert not native.name.endswith("-none-any.whl")
    said = lanes(native, tmp_path)
    assert (said.returncode, said.stdout) == (
        0,
        "aoti_sched: lanes are native threads, the rules are compiled\n",
    )


def test_without_a_compiler_a_wheel_is_built_all_the_same_for_every_python(fallback, tmp_path):
    assert [name for name in files(fallback) if name.endswith(".so")] == []
    assert fallback.name.endswith("-py3-none-any.whl")
    said = lanes(fallback, tmp_path)
    assert (said.returncode, said.stdout) == (1, "")
    assert "LANES ARE PYTHON THREADS" in said.stderr


def test_a_wheel_can_be_had_in_which_only_the_lanes_are_native(tmp_path):
    built = native_wheel(tmp_path / "built", "cmake.define.COMPILED_MODULES=OFF")
    said = lanes(built, tmp_path / "unpacked")
    assert (said.returncode, said.stdout) == (
        0,
        "aoti_sched: lanes are native threads, the rules are Python\n",
    )


def test_both_wheels_bring_the_same_python_and_no_sources(native, fallback):
    def contents(built: Path) -> set[str]:
        return {
            name
            for name in files(built)
            if name.startswith("aoti_sched/") and not name.endswith(".so")
        }

    assert contents(native) == contents(fallback)
    assert {"aoti_sched/py.typed", "aoti_sched/backends/native/_native.pyi"} <= contents(native)
    page = {f"aoti_sched/expose/page/{path.name}" for path in PAGE.iterdir()}
    assert {"aoti_sched/expose/page/index.html"} < page <= contents(native)
    suffixes = {Path(name).suffix for name in contents(native) - page}
    assert suffixes == {".py", ".pyi", ".typed"}
