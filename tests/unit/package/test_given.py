"""A package in memory: what is taken for one, and that it is read and checked as a file is."""

import hashlib
import io
from pathlib import Path

import pytest

from aoti_sched.errors import ConfigError, PackageFormatError, PackageHashError
from aoti_sched.package import open_package
from aoti_sched.package.path_or_bytes import named
from tests.unit.package.files import elf, write_package


@pytest.fixture
def contents(tmp_path):
    return write_package(tmp_path / "m.pt2").read_bytes()


def test_bytes_that_begin_as_a_package_are_one_and_others_are_a_path(contents):
    assert named(contents) == ("model.pt2 (in memory)", contents)
    assert named(elf()) == ("model.so (in memory)", elf())
    assert named(b"models/PK.pt2") == ("models/PK.pt2", None)
    assert named(b"m\xff.pt2") == ("m\udcff.pt2", None)


def test_all_of_a_buffer_is_taken_wherever_its_position_is(contents):
    buffer = io.BytesIO(contents)
    buffer.seek(100)
    assert named(buffer)[1] == contents
    assert buffer.tell() == 100


def test_what_is_changed_later_changes_nothing(contents):
    given = bytearray(contents)
    taken = named(given)[1]
    given[:] = b"x" * len(given)
    assert taken == contents


@pytest.mark.parametrize(
    "given", [b"", b"a\0b", b"x" * 5000, bytearray(b"m.pt2"), io.BytesIO(b"m.pt2")]
)
def test_bytes_that_are_neither_are_refused(given):
    with pytest.raises(ConfigError, match="path: "):
        named(given)


def test_a_package_in_memory_is_extracted_like_the_file(contents, tmp_path):
    package = open_package(
        "model.pt2 (in memory)", contents=contents, sha256=hashlib.sha256(contents).hexdigest()
    )
    of_file = open_package(tmp_path / "m.pt2")
    assert (package.sha256, package.models) == (of_file.sha256, of_file.models)
    extracted = package.extract(cache_dir=tmp_path / "cache")
    assert extracted == of_file.extract(cache_dir=tmp_path / "cache"), (
        "the content is in the cache once"
    )


def test_a_package_in_memory_of_another_hash_is_refused(contents):
    with pytest.raises(PackageHashError, match=r"model.pt2 \(in memory\): expected sha256 0000"):
        open_package("model.pt2 (in memory)", contents=contents, sha256="0" * 64)


@pytest.mark.parametrize("size", [4, 100, -1])
def test_a_truncated_package_in_memory_is_refused(contents, size):
    with pytest.raises(PackageFormatError, match=r"^model.pt2 \(in memory\) is truncated"):
        open_package("model.pt2 (in memory)", contents=contents[:size])


def test_a_library_in_memory_has_no_companions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.cpp").write_text("// of another model")
    package = open_package("model.so (in memory)", contents=elf())
    assert package.models == ("model",)
    assert package.wrapper_source() is None
    assert package.extract(cache_dir=tmp_path / "cache").library.read_bytes() == elf()


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_file_can_have_is_refused(path):
    with pytest.raises(ConfigError, match="expected the path of a file"):
        open_package(path)
