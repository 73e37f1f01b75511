"""Free-threaded Python is refused, when the native module is built and when it is imported."""

import importlib
import subprocess
import sysconfig

import pytest

from aoti_sched.backends import native
from tests.native.library import NATIVE

SENTENCE = "free-threaded Python is not supported. Use a build of Python that has the GIL."


def test_the_build_is_refused(tmp_path):
    (tmp_path / "nanobind").mkdir()
    (tmp_path / "nanobind" / "nanobind.h").touch()
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{tmp_path}", "-DPy_GIL_DISABLED"]
    result = subprocess.run(
        [*command, str(NATIVE / "gil.hpp")], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert SENTENCE in result.stderr


def test_the_import_is_refused(monkeypatch):
    known = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else known(name)
    )
    with pytest.raises(ImportError, match=SENTENCE.replace(".", "[.]")):
        importlib.reload(native)
    monkeypatch.undo()
    importlib.reload(native)
