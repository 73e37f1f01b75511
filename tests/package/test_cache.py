"""The unpacked files: where they lie, who may write there, and what happens when something breaks."""

import errno
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from aoti_sched.errors import PackageError
from aoti_sched.package import Package, open_package
from aoti_sched.package import cache as package_cache
from aoti_sched.package.cache import default_cache_dir
from tests.package.files import elf, write_package


@pytest.fixture
def package(tmp_path) -> Package:
    return open_package(write_package(tmp_path / "p.pt2"))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    """Everything in the cache but locks, which mean nothing when nobody holds them."""
    return sorted(path for path in cache.rglob("*") if path.suffix != ".lock")


def directories(cache: Path) -> list[Path]:
    return [path for path in entries(cache) if path.is_dir()]


# --- where --------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("AOTI_SCHED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_the_cache_is_in_the_home_directory(environment, tmp_path):
    assert default_cache_dir() == tmp_path / ".cache" / "aoti_sched"


def test_the_cache_follows_the_xdg_specification(environment, tmp_path):
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "aoti_sched"


def test_a_relative_xdg_directory_is_ignored_as_the_specification_asks(environment, tmp_path):
    environment.setenv("XDG_CACHE_HOME", "xdg")
    assert default_cache_dir() == tmp_path / ".cache" / "aoti_sched"


def test_our_own_variable_comes_first_and_names_the_directory_itself(environment, tmp_path):
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    environment.setenv("AOTI_SCHED_CACHE", "~/packages")
    assert default_cache_dir() == tmp_path / "packages"


def test_without_a_home_the_variable_is_asked_for(environment):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    environment.setattr(Path, "home", homeless)
    with pytest.raises(PackageError, match="Set AOTI_SCHED_CACHE"):
        default_cache_dir()


def test_without_being_told_a_package_goes_to_the_default_cache(environment, package, tmp_path):
    environment.setenv("AOTI_SCHED_CACHE", str(tmp_path / "mine"))
    assert package.extract().directory.is_relative_to(tmp_path / "mine")


def test_the_directory_is_named_by_the_hash_and_the_model(package, cache):
    assert package.extract(cache_dir=cache).directory.parent == cache / f"{package.sha256}-model"


# --- who ----------------------------------------------------------------------------------------------------------


def test_nobody_else_may_enter_and_nobody_may_write(package, cache):
    extracted = package.extract(cache_dir=cache)
    for directory in (cache, extracted.directory, extracted.directory.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(extracted.library.stat().st_mode) == 0o400


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_may_write_to_is_refused(package, cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(PackageError, match=rf"may be written by others \(mode 0{mode:o}\).*chmod 700"):
        package.extract(cache_dir=cache)
    assert not entries(cache)


def test_a_cache_of_another_user_is_refused(package, cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(PackageError, match=r"belongs to user \d+, but this process is user \d+"):
        package.extract(cache_dir=cache)
    assert not entries(cache)


def test_a_link_to_a_cache_of_another_user_is_refused(package, cache, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir(mode=0o777)
    (tmp_path / "theirs").chmod(0o777)
    cache.symlink_to(tmp_path / "theirs")
    with pytest.raises(PackageError, match="theirs may be written by others"):
        package.extract(cache_dir=cache)


def test_a_cache_from_which_nothing_can_be_loaded_is_refused(package, cache, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(PackageError, match=r"mounted noexec.*AOTI_SCHED_CACHE"):
        package.extract(cache_dir=cache)


def test_a_cache_that_is_a_file_is_explained(package, cache):
    cache.touch()
    with pytest.raises(PackageError, match=r"Cannot unpack .*p\.pt2 into .*cache: File exists"):
        package.extract(cache_dir=cache)


# --- once ---------------------------------------------------------------------------------------------------------


def test_a_package_is_unpacked_once(package, cache):
    first = package.extract(cache_dir=cache)
    written = first.library.stat()
    second = package.extract(cache_dir=cache)
    assert second == first
    assert (second.library.stat().st_ino, second.library.stat().st_mtime_ns) == (
        written.st_ino,
        written.st_mtime_ns,
    )


def test_the_same_content_under_another_name_is_the_same_entry(package, cache, tmp_path):
    first = package.extract(cache_dir=cache)
    shutil.copy(tmp_path / "p.pt2", tmp_path / "renamed.pt2")
    assert open_package(tmp_path / "renamed.pt2").extract(cache_dir=cache) == first


def test_other_content_under_the_same_name_is_another_entry(package, cache, tmp_path):
    first = package.extract(cache_dir=cache)
    second = open_package(write_package(tmp_path / "p.pt2", files={"abc.wrapper.so": elf(b"next")}))
    assert second.extract(cache_dir=cache).library.read_bytes() == elf(b"next")
    assert first.library.read_bytes() == elf()


def test_an_unpacked_package_is_found_when_the_file_is_gone(package, cache, tmp_path):
    first = package.extract(cache_dir=cache)
    (tmp_path / "p.pt2").unlink()
    assert package.extract(cache_dir=cache) == first


# --- damage ---------------------------------------------------------------------------------------------------------


def truncate(library: Path) -> None:
    library.chmod(0o600)
    os.truncate(library, 10)


def remove(library: Path) -> None:
    library.unlink()


def link(library: Path) -> None:
    copy = library.parent.parent.parent / "elsewhere.so"
    library.rename(copy)
    library.symlink_to(copy)


@pytest.mark.parametrize("damage", [truncate, remove, link])
def test_a_damaged_entry_is_made_again_at_a_new_place(package, cache, damage):
    first = package.extract(cache_dir=cache)
    damage(first.library)
    second = package.extract(cache_dir=cache)
    assert second.directory != first.directory
    assert second.library.read_bytes() == elf()
    assert not first.directory.exists()


def test_a_damaged_library_that_is_mapped_somewhere_is_never_written_to(package, cache):
    first = package.extract(cache_dir=cache)
    truncate(first.library)
    with first.library.open("rb") as mapped:
        package.extract(cache_dir=cache)
        assert mapped.read() == elf()[:10]


def test_what_a_crash_left_is_removed_by_the_next_one(package, cache):
    left = cache / f"{package.sha256}-model" / ".new-0123"
    left.mkdir(parents=True)
    cache.chmod(0o700)
    (left / "abc.wrapper.so").write_bytes(b"half")
    extracted = package.extract(cache_dir=cache)
    assert directories(cache) == sorted([extracted.directory.parent, extracted.directory])


def test_a_full_disk_is_told_beforehand(package, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(PackageError, match=r"p\.pt2 needs \d+ bytes in .*cache, where 10 are free"):
        package.extract(cache_dir=cache)


def test_a_write_that_fails_leaves_nothing(package, cache, monkeypatch):
    private = package_cache._private

    def failing(path: str, flags: int) -> int:
        if path.endswith(".so"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return private(path, flags)

    monkeypatch.setattr(package_cache, "_private", failing)
    with pytest.raises(PackageError, match=r"Cannot unpack .*p\.pt2 into .*cache: No space left on device"):
        package.extract(cache_dir=cache)
    assert not entries(cache)
    monkeypatch.undo()
    assert package.extract(cache_dir=cache).library.read_bytes() == elf()


def test_an_interrupt_leaves_nothing(package, cache, monkeypatch):
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(package_cache, "_private", interrupted)
    with pytest.raises(KeyboardInterrupt):
        package.extract(cache_dir=cache)
    assert not entries(cache)


def test_a_cache_in_the_home_of_nobody_is_refused_with_the_variable(monkeypatch):
    monkeypatch.setenv("AOTI_SCHED_CACHE", "~nosuchuser/x")
    with pytest.raises(
        PackageError, match=r"AOTI_SCHED_CACHE='~nosuchuser/x': .* Write the directory in full"
    ):
        default_cache_dir()
