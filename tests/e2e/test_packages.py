"""The demo's cache of compiled models, and what it says when it can't fill it."""

import io

import pytest
from rich.console import Console

from examples.semantic_search import packages
from examples.semantic_search.__main__ import main


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "CACHE", tmp_path / "cache")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")


@pytest.mark.usefixtures("empty_cache", "no_compiler")
def test_without_a_compiler_the_demo_says_what_to_install_and_fails(capsys):
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "`no-such-compiler`" in said
    assert "apt install g++" in said


@pytest.mark.usefixtures("empty_cache", "no_compiler")
def test_cached_packages_need_no_compiler(console):
    paths = {model: packages.package_path(model) for model in packages.MODELS}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert packages.ensure_packages(console) == paths


def test_the_compiler_asked_for_is_the_program_named_in_cxx(monkeypatch):
    monkeypatch.setenv("CXX", "sh -c")
    assert packages.missing_compiler() is None


def test_another_source_text_is_another_package(monkeypatch, tmp_path):
    before = packages.package_path("encoder")
    for name in ("minilm.py", "digits.py", "packages.py"):
        (tmp_path / name).write_text("# changed\n")
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "packages.py"))
    after = packages.package_path("encoder")
    assert after.name == before.name
    assert after.parent != before.parent


@pytest.mark.usefixtures("empty_cache")
def test_a_failed_build_shows_the_complaints_and_leaves_nothing_behind(console, monkeypatch):
    monkeypatch.setattr(packages, "MODELS", ("no-such-model",))
    monkeypatch.setenv("CXX", "sh")
    with pytest.raises(packages.BuildError, match="KeyError: 'no-such-model'"):
        packages.ensure_packages(console)
    assert list(packages.CACHE.iterdir()) == []
