"""The cache of compiled models: built once, all or nothing, and again when what made them
changes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import tests.models as models


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """An empty cache and a compiler that only writes a file; gives the names it was asked for."""
    names = []

    def compile_nothing(name, directory):
        names.append(name)
        (directory / "model.pt2").write_text(name)

    monkeypatch.setattr(models, "CACHE", tmp_path / "models")
    monkeypatch.setattr(models, "_in_own_process", compile_nothing)
    return names


def test_a_model_wanted_by_several_at_once_is_compiled_once(compiled):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: models.build("mlp").path, range(8)))
    assert compiled == ["mlp"]
    assert [path.read_text() for path in paths] == ["mlp"]


def test_a_build_that_is_broken_off_leaves_nothing_and_is_tried_again(compiled, monkeypatch):
    compile_nothing = models._in_own_process

    def break_off(name, directory):
        compile_nothing(name, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_in_own_process", break_off)
    with pytest.raises(KeyboardInterrupt):
        models.build("mlp")
    assert [path.name for path in models.CACHE.iterdir() if path.is_dir()] == []
    monkeypatch.setattr(models, "_in_own_process", compile_nothing)
    assert models.build("mlp").path.read_text() == "mlp"


def test_a_model_is_compiled_again_when_the_compiler_changes(compiled, monkeypatch):
    models.build("mlp")
    monkeypatch.setattr(models, "_environment", lambda: ["another compiler"])
    models.build("mlp")
    assert compiled == ["mlp", "mlp"]
