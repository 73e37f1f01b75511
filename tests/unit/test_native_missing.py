"""Why the native module is missing: no compiler, or a tree that is not installed in place."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aoti_sched.backends.native import missing as module
from aoti_sched.backends.native.missing import missing, tree_not_installed

ROOT = Path(__file__).resolve().parents[2]


class Installed:
    """A distribution with this record of pip."""

    def __init__(self, record):
        self._record = record

    def read_text(self, name):
        assert name == "direct_url.json"
        return self._record


@pytest.fixture
def installed(monkeypatch):
    """Say what is installed, by the records of pip."""

    def say(*records):
        monkeypatch.setattr(
            importlib.metadata, "distributions", lambda name: [Installed(one) for one in records]
        )

    return say


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "a clone"
    (folder / "aoti_sched").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    return folder


def record_of(tree, **folder):
    return json.dumps({"url": tree.as_uri(), "dir_info": folder})


@pytest.mark.parametrize("record", [None, "", "damaged", "{}"])
def test_a_tree_beside_an_installation_from_an_index_is_not_installed(tree, installed, record):
    installed(record)
    assert tree_not_installed(tree / "aoti_sched") == tree


def test_a_tree_is_not_installed_in_place_by_a_plain_installation(tree, installed, tmp_path):
    installed(record_of(tree), record_of(tmp_path, editable=True))
    assert tree_not_installed(tree / "aoti_sched") == tree


def test_a_tree_is_installed_in_place_by_an_editable_installation(tree, installed, tmp_path):
    installed(None, record_of(tree, editable=True))
    assert tree_not_installed(tree / "aoti_sched") is None
    (tmp_path / "link").symlink_to(tree)
    installed(record_of(tmp_path / "link", editable=True))
    assert tree_not_installed(tree / "aoti_sched") is None


def test_a_package_without_a_tree_is_an_installation(tmp_path, installed):
    installed()
    assert tree_not_installed(tmp_path / "aoti_sched") is None


def test_each_cause_has_its_remedy(monkeypatch, tree):
    monkeypatch.setattr(module, "tree_not_installed", lambda: tree)
    why, remedy = missing()
    assert why.endswith(f"the source tree {tree}, which is not installed in place")
    assert remedy == f"run `pip install -e {tree}`"
    monkeypatch.setattr(module, "tree_not_installed", lambda: None)
    why, remedy = missing()
    assert why == "aoti_sched was installed without a C++ compiler"
    assert remedy == "install a compiler (g++) and reinstall aoti_sched"


def test_a_program_in_a_tree_that_is_not_installed_says_so(tmp_path):
    shutil.copytree(ROOT / "aoti_sched", tmp_path / "aoti_sched")
    (tmp_path / "pyproject.toml").touch()
    # Without the site's start, an editable installation of another tree is not found first.
    paths = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    ran = subprocess.run(
        [sys.executable, "-S", "-m", "aoti_sched.backends.native"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert f"the source tree {tmp_path}, which is not installed in place" in ran.stderr
    assert f"pip install -e {tmp_path}" in ran.stderr
