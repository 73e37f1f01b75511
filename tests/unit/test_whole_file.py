"""A file is written whole, or not at all, and errors name the file that was asked for."""

from __future__ import annotations

import pytest

from aoti_sched.whole_file import whole_file


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with whole_file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.json"]


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(KeyError), whole_file(path) as beside:
        raise KeyError(beside.write_text("half"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("path", ["folder", "nowhere/file.json", ".", "..", "/"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory") as caught, whole_file(path) as beside:
        beside.write_text("new")
    assert str(caught.value).endswith(f"directory: {path!r}")
    assert names(tmp_path) == ["folder"]


def test_a_name_may_be_as_long_as_a_system_takes(tmp_path):
    for name in ("x" * 255, "ö" * 125 + ".json", "x." + "j" * 253):
        with whole_file(tmp_path / name) as beside:
            beside.write_text("new")
        assert (tmp_path / name).read_text() == "new"
    assert len(names(tmp_path)) == 3
