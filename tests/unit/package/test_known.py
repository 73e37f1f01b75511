"""What is known of a package from an earlier load, and when it is not believed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from aoti_sched.errors import ModelNotFoundError, PackageError, PackageHashError
from aoti_sched.package import Package, archive, find_package, known, open_package
from aoti_sched.package.known import KnownPackage
from tests.unit.package.files import elf, model_members, write_package, zipped


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files of this test count as old enough to be told from later ones."""
    monkeypatch.setattr(known, "_SETTLED", -1e9)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path, cache) -> Path:
    """A package that was extracted before."""
    path = write_package(tmp_path / "p.pt2")
    open_package(path).extract(cache_dir=cache)
    return path


@pytest.fixture
def unhashed(monkeypatch):
    """No file may be hashed as a whole."""

    def fail(*_: object) -> None:
        raise AssertionError("a package was hashed")

    monkeypatch.setattr(archive.FileDigest, "__init__", fail)


def descriptions(cache: Path) -> list[Path]:
    return sorted((cache / "known").iterdir())


def test_a_known_package_answers_as_the_package_itself(path, cache):
    package, found = open_package(path), find_package(path, cache_dir=cache)
    assert isinstance(found, KnownPackage)
    assert found.path == package.path
    assert found.sha256 == package.sha256
    assert found.model() == package.model()
    assert found.wrapper_source() == package.wrapper_source()
    assert found.extract() == package.extract(cache_dir=cache)


def test_a_known_package_is_not_hashed(path, cache, unhashed):
    assert isinstance(find_package(path, cache_dir=cache), KnownPackage)


def test_pickled_weights_and_a_blob_are_found_again(tmp_path, cache):
    config = json.dumps({"weight": ["w0", [2, 3], [3, 1], 4]})
    files = {"weights_config.json": config, "abc.wrapper_weights.blob": b"blob"}
    members = [*model_members(files=files)]
    members.append(type(members[0])("p/data/weights/w0", b"pickled"))
    path = tmp_path / "p.pt2"
    path.write_bytes(zipped(members))
    first = open_package(path).extract(cache_dir=cache)
    again = find_package(path, cache_dir=cache)
    assert isinstance(again, KnownPackage)
    assert again.extract() == first
    assert first.weights_blob is not None
    assert list(first.stored_weights) == ["weight"]


def test_each_extracted_model_of_a_package_is_known_and_no_other(tmp_path, cache):
    path = tmp_path / "p.pt2"
    names = ["one", "two", "three"]
    path.write_bytes(zipped([member for name in names for member in model_members(name)]))
    for name in names[:2]:
        open_package(path).extract(name, cache_dir=cache)
    for name in names[:2]:
        found = find_package(path, name, cache_dir=cache)
        assert isinstance(found, KnownPackage)
        assert found.model().name == name
    assert isinstance(find_package(path, "three", cache_dir=cache), Package)
    with pytest.raises(ModelNotFoundError, match="Say which"):
        find_package(path, cache_dir=cache).model()
    assert len(descriptions(cache)) == 1


def test_the_default_among_several_models_is_known(tmp_path, cache):
    path = tmp_path / "p.pt2"
    path.write_bytes(zipped([*model_members("model"), *model_members("other")]))
    open_package(path).extract(cache_dir=cache)
    assert find_package(path, cache_dir=cache).model().name == "model"


# --- changes --------------------------------------------------------------------------------------


def rewrite(path: Path) -> None:
    """Another model of the same size, in the same file, with the old time."""
    status = path.stat()
    write_package(path, files={"abc.wrapper.so": elf(b"next")})
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    write_package(path.with_suffix(".new"), files={"abc.wrapper.so": elf(b"next")})
    path.with_suffix(".new").replace(path)


def append(path: Path) -> None:
    write_package(path, files={"abc.wrapper.so": elf(b"next"), "more": b"more"})


@pytest.mark.parametrize("change", [rewrite, replace, append])
def test_a_package_that_changed_is_read_anew(path, cache, change):
    change(path)
    found = find_package(path, cache_dir=cache)
    assert isinstance(found, Package)
    assert found.extract(cache_dir=cache).library.read_bytes() != elf()
    assert isinstance(find_package(path, cache_dir=cache), KnownPackage)


def test_a_touched_package_is_read_once_more(path, cache):
    os.utime(path)
    assert isinstance(find_package(path, cache_dir=cache), Package)
    find_package(path, cache_dir=cache).extract(cache_dir=cache)
    assert isinstance(find_package(path, cache_dir=cache), KnownPackage)


def test_another_end_with_equal_times_is_another_state(path, cache):
    # An image's files may all bear one time: then the checksums at a zip's end tell.
    (file,) = descriptions(cache)
    content = json.loads(file.read_bytes())
    content["state"]["end"] = "0" * 64
    file.unlink()
    file.write_text(json.dumps(content))
    assert isinstance(find_package(path, cache_dir=cache), Package)


def test_a_file_that_has_just_been_written_is_not_described(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(known, "_SETTLED", 1e9)
    path = write_package(tmp_path / "p.pt2")
    open_package(path).extract(cache_dir=cache)
    assert not (cache / "known").exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_described(tmp_path, cache, monkeypatch):
    path = write_package(tmp_path / "p.pt2")
    state_of = known._state_of

    def touched_before(file: Path) -> known.FileState:
        os.utime(file)
        return state_of(file)

    monkeypatch.setattr(known, "_state_of", touched_before)
    open_package(path).extract(cache_dir=cache)
    assert not (cache / "known").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_entry_is_extracted_anew(path, cache, damage):
    library = find_package(path, cache_dir=cache).extract().library
    library.unlink()
    if damage == "truncate":
        library.write_bytes(elf()[:10])
    found = find_package(path, cache_dir=cache)
    assert isinstance(found, Package)
    assert found.extract(cache_dir=cache).library.read_bytes() == elf()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b"\xff", b"[" * 100_000])
def test_a_broken_description_is_ignored(path, cache, content):
    (file,) = descriptions(cache)
    file.unlink()
    file.write_bytes(content)
    assert isinstance(find_package(path, cache_dir=cache), Package)


@pytest.mark.parametrize("change", [{"version": 0}, {"path": "/elsewhere/p.pt2"}])
def test_a_description_of_another_version_or_path_is_ignored(path, cache, change):
    (file,) = descriptions(cache)
    content = json.loads(file.read_bytes()) | change
    file.unlink()
    file.write_text(json.dumps(content))
    assert isinstance(find_package(path, cache_dir=cache), Package)


def test_a_copy_at_another_path_is_read_once(path, cache, tmp_path):
    copy = Path(shutil.copy(path, tmp_path / "q.pt2"))
    first = find_package(copy, cache_dir=cache)
    assert isinstance(first, Package)
    assert first.extract(cache_dir=cache) == find_package(path, cache_dir=cache).extract()
    assert isinstance(find_package(copy, cache_dir=cache), KnownPackage)


# --- trust ----------------------------------------------------------------------------------------


def test_a_hash_that_is_asked_for_is_computed(path, cache):
    assert isinstance(
        find_package(path, sha256=open_package(path).sha256, cache_dir=cache), Package
    )
    with pytest.raises(PackageHashError):
        find_package(path, sha256="0" * 64, cache_dir=cache)


def test_a_package_in_memory_is_read(path, cache):
    contents = path.read_bytes()
    assert isinstance(find_package(path, contents=contents, cache_dir=cache), Package)


def test_a_description_that_others_can_write_to_is_refused(path, cache):
    (file,) = descriptions(cache)
    file.chmod(0o602)
    with pytest.raises(PackageError, match=r"may be written by others \(mode 0602\)"):
        find_package(path, cache_dir=cache)


def test_a_folder_of_descriptions_that_others_can_write_to_is_refused(path, cache):
    (cache / "known").chmod(0o777)
    with pytest.raises(PackageError, match="holds known, which may be written by others"):
        find_package(path, cache_dir=cache)


def test_a_link_in_place_of_a_description_is_not_followed(path, cache, tmp_path):
    (file,) = descriptions(cache)
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    assert isinstance(find_package(path, cache_dir=cache), Package)


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="files are mapped through descriptors on Linux only"
)
def test_where_the_cache_can_be_replaced_nothing_is_believed(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    path = write_package(tmp_path / "p.pt2")
    for _ in range(2):
        found = find_package(path, cache_dir=shared / "cache")
        assert isinstance(found, Package)
        found.extract(cache_dir=shared / "cache")


def test_a_cache_that_cannot_be_written_to_keeps_no_description(tmp_path, cache, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(known, "make_private", refuse)
    path = write_package(tmp_path / "p.pt2")
    assert open_package(path).extract(cache_dir=cache).library.exists()
    assert isinstance(find_package(path, cache_dir=cache), Package)


def test_a_missing_package_is_named_though_it_is_known(path, cache):
    path.unlink()
    with pytest.raises(PackageError, match="There is no package"):
        find_package(path, cache_dir=cache)
