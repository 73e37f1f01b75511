"""The unpacked files: where they lie, who may write there, and what happens when something
breaks.
"""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from aoti_sched.errors import PackageError
from aoti_sched.package import Package, manifest, open_package
from aoti_sched.package import cache as package_cache
from aoti_sched.package.cache import default_cache_dir
from tests.unit.package.files import elf, write_package


@pytest.fixture
def package(tmp_path) -> Package:
    return open_package(write_package(tmp_path / "p.pt2"))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    """Everything in the cache but locks, which mean nothing when they are free, and what is
    known of packages.
    """
    found = (path for path in cache.rglob("*") if path.suffix != ".lock")
    return sorted(
        path for path in found if not {"known", "users"} & {*path.relative_to(cache).parts}
    )


def directories(cache: Path) -> list[Path]:
    return [path for path in entries(cache) if path.is_dir()]


# --- where ----------------------------------------------------------------------------------------


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
    assert (
        package.extract(cache_dir=cache).directory.parent.parent
        == cache / f"{package.sha256}-model"
    )


# --- who ------------------------------------------------------------------------------------------


def test_nobody_else_may_enter_and_nobody_may_write(package, cache):
    extracted = package.extract(cache_dir=cache)
    assert {stat.S_IMODE(path.stat().st_mode) for path in [cache, *directories(cache)]} == {0o700}
    files = [path for path in entries(cache) if not path.is_dir()]
    assert extracted.library in files
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o400}


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_may_write_to_is_refused(package, cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(
        PackageError,
        match=rf"may be written by others \(mode 0{mode:o}\).*Delete everything in it, then chmod "
        rf"700",
    ):
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
    with pytest.raises(PackageError, match=r"Cannot unpack .*p\.pt2 into .*cache: Not a directory"):
        package.extract(cache_dir=cache)


# --- once -----------------------------------------------------------------------------------------


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


# --- damage ---------------------------------------------------------------------------------------


def truncate(library: Path) -> None:
    library.chmod(0o600)
    os.truncate(library, 10)


def remove(library: Path) -> None:
    library.unlink()


def link(library: Path) -> None:
    copy = library.parents[3] / "elsewhere.so"
    library.rename(copy)
    library.symlink_to(copy)


def zero(library: Path) -> None:
    library.chmod(0o600)
    library.write_bytes(bytes(library.stat().st_size))


def zero_and_set_back_its_time(library: Path) -> None:
    status = library.stat()
    zero(library)
    os.utime(library, ns=(status.st_atime_ns, status.st_mtime_ns))


def the_manifest(library: Path) -> Path:
    return library.parents[1] / "manifest.json"


def rewrite_manifest(library: Path, write: Callable[[dict], object]) -> None:
    content = json.loads(the_manifest(library).read_bytes())
    write(content)
    the_manifest(library).unlink()
    the_manifest(library).write_text(json.dumps(content))


def lose_the_manifest(library: Path) -> None:
    the_manifest(library).unlink()


def cut_the_manifest(library: Path) -> None:
    the_manifest(library).chmod(0o600)
    os.truncate(the_manifest(library), 20)


def pipe_for_a_manifest(library: Path) -> None:
    the_manifest(library).unlink()
    os.mkfifo(the_manifest(library), 0o600)


def be_of_a_later_version(library: Path) -> None:
    rewrite_manifest(library, lambda content: content.update(version=2))


def be_another_packages(library: Path) -> None:
    rewrite_manifest(library, lambda content: content.update(key="another"))


def list_another_file(library: Path) -> None:
    rewrite_manifest(library, lambda content: content["files"].pop(library.name))


def be_of_the_first_layout(library: Path) -> None:
    the_manifest(library).unlink()
    for path in library.parent.iterdir():
        path.rename(library.parents[1] / path.name)
    library.parent.rmdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        remove,
        link,
        zero,
        zero_and_set_back_its_time,
        lose_the_manifest,
        cut_the_manifest,
        pipe_for_a_manifest,
        be_of_a_later_version,
        be_another_packages,
        list_another_file,
        be_of_the_first_layout,
    ],
)
@pytest.mark.parametrize("pinned", [False, True])
def test_a_damaged_entry_is_made_again_at_a_new_place(package, cache, damage, pinned):
    package = open_package(package.path, sha256=package.sha256 if pinned else None)
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
    assert directories(cache) == sorted([*extracted.directory.parents[:2], extracted.directory])


def test_a_full_disk_is_told_beforehand(package, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(PackageError, match=r"p\.pt2 needs \d+ bytes in .*cache, where 10 are free"):
        package.extract(cache_dir=cache)


def test_a_disk_that_is_full_at_any_byte_leaves_nothing(package, cache):
    # A limit on the size of files makes real writes fail, in every file and in the manifest.
    script = """
        import resource, sys
        from pathlib import Path
        from aoti_sched.errors import PackageError
        from aoti_sched.package import open_package

        package, cache = open_package(sys.argv[1]), Path(sys.argv[2])
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        refused = 0
        for limit in range(0, 5000, 7):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
            try:
                package.extract(cache_dir=cache)
                break
            except PackageError as error:
                assert "File too large" in str(error), error
                refused += 1
                left = [path for path in cache.glob("*-*/**/*") if path.suffix != ".lock"]
                assert not left, left
        print(refused)
        """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), package.path, cache],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (written,) = cache.rglob("manifest.json")
    sizes = [written.stat().st_size, *package._source.members.values()]
    assert int(process.stdout) == max(sizes) // 7 + (max(sizes) % 7 > 0)
    assert package.extract(cache_dir=cache).library.read_bytes() == elf()


def test_a_disk_that_is_full_when_files_are_synced_leaves_nothing(package, cache, monkeypatch):
    sync, calls = os.fsync, 0
    failing = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    package.extract(cache_dir=cache)
    needed = calls
    assert needed == 9  # 4 files, the manifest, 2 folders before the rename; 2 folders after it
    shutil.rmtree(cache)
    for call in range(1, needed + 1):
        calls, failing = 0, call
        with pytest.raises(PackageError, match="No space left on device"):
            package.extract(cache_dir=cache)
        assert not entries(cache)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_knows_no_sync_serves(package, cache, monkeypatch, code):
    def unknown(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", unknown)
    assert package.extract(cache_dir=cache).library.read_bytes() == elf()


def test_all_is_on_the_disk_before_it_gets_its_name(package, cache, monkeypatch):
    sync, rename = os.fsync, Path.rename
    synced, checked = set(), []

    def noted(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def checking(path: Path, target: Path) -> Path:
        found = [path, *path.rglob("*")]
        checked.extend(found)
        assert {item.stat().st_ino for item in found} <= synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", checking)
    extracted = package.extract(cache_dir=cache)
    assert len(checked) == 7
    assert extracted.directory.parent.parent.stat().st_ino in synced


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


# --- what is looked at again ----------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files whose content was looked at, in order."""
    names: list[str] = []
    digest, holds = manifest.digest, manifest.holds

    def noted_digest(path: Path):
        names.append(path.name)
        return digest(path)

    def noted_holds(path: Path, chunks):
        names.append(path.name)
        return holds(path, chunks)

    monkeypatch.setattr(manifest, "digest", noted_digest)
    monkeypatch.setattr(manifest, "holds", noted_holds)
    return names


def test_a_file_that_is_unchanged_is_not_read_again(package, cache, read):
    for _ in range(3):
        package.extract(cache_dir=cache)
    assert not read


def test_a_file_that_was_touched_is_read_once_and_stays(package, cache, read):
    first = package.extract(cache_dir=cache)
    first.library.touch()
    assert package.extract(cache_dir=cache) == first
    assert package.extract(cache_dir=cache) == first
    assert read == [first.library.name]


def test_a_copied_cache_is_read_once_and_used(package, cache, read, tmp_path):
    first = package.extract(cache_dir=cache)
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    copied = package.extract(cache_dir=copy)
    assert copied.library == copy / first.library.relative_to(cache)
    assert sorted(read) == sorted(path.name for path in first.directory.iterdir())
    read.clear()
    assert package.extract(cache_dir=copy) == copied
    assert not read


@pytest.mark.parametrize("file", ["abc.wrapper.so", "abc.wrapper.cpp"])
def test_a_copy_that_went_wrong_is_made_again(package, cache, tmp_path, file):
    first = package.extract(cache_dir=cache)
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    (damaged,) = copy.rglob(file)
    zero(damaged)
    second = package.extract(cache_dir=copy)
    assert not damaged.exists()
    assert (second.directory / file).read_bytes() == (first.directory / file).read_bytes()


def test_a_copied_cache_that_cannot_be_written_to_is_read_each_time(package, cache, read):
    # The disk is full, or the cache is read-only; another process may have the lock.
    first = package.extract(cache_dir=cache)
    with package_cache._lock(
        package_cache.private_folder(cache), f"{package.sha256}-model", timeout=1.0
    ):
        first.library.touch()
        assert package.extract(cache_dir=cache) == first
        assert package.extract(cache_dir=cache) == first
    assert read == [first.library.name] * 2


def test_with_its_hash_named_every_file_is_compared_with_the_package_each_time(
    package, cache, read
):
    first = package.extract(cache_dir=cache)
    pinned = open_package(package.path, sha256=package.sha256)
    assert pinned.extract(cache_dir=cache) == first
    assert sorted(read) == sorted(path.name for path in first.directory.iterdir())


def test_with_its_hash_named_an_entry_whose_manifest_was_forged_is_made_again(package, cache):
    first = package.extract(cache_dir=cache)
    zero(first.library)
    forged = json.loads(msgspec.json.encode(manifest.digest(first.library)))
    rewrite_manifest(
        first.library, lambda content: content["files"].update({first.library.name: forged})
    )
    assert package.extract(cache_dir=cache) == first  # our own user did this; nobody can tell

    second = open_package(package.path, sha256=package.sha256).extract(cache_dir=cache)
    assert second.library != first.library
    assert second.library.read_bytes() == elf()


@pytest.mark.parametrize("longer", [b"", b"more"])
def test_a_file_of_the_right_beginning_is_not_the_file(tmp_path, longer):
    (tmp_path / "file").write_bytes(b"abcdef" + longer)
    assert manifest.holds(tmp_path / "file", [b"abc", b"def"]) is (longer == b"")
    assert not manifest.holds(tmp_path / "file", [b"abc", b"def" + longer, b"x"])


def test_stray_files_are_ignored(package, cache):
    first = package.extract(cache_dir=cache)
    for folder in (first.directory, first.directory.parent, first.directory.parent.parent):
        (folder / ".nfs0000000000000001").touch(0o600)
    assert package.extract(cache_dir=cache) == first
    assert open_package(package.path, sha256=package.sha256).extract(cache_dir=cache) == first


def test_with_its_hash_named_a_file_that_the_package_lacks_is_not_beside_its_library(
    package, cache
):
    first = package.extract(cache_dir=cache)
    (first.directory / "custom_objs_config.json").write_text("{}")
    assert package.extract(cache_dir=cache) == first
    second = open_package(package.path, sha256=package.sha256).extract(cache_dir=cache)
    assert second.directory != first.directory
    assert not (second.directory / "custom_objs_config.json").exists()


def test_stray_files_do_not_stop_a_damaged_entry_from_being_made_again(package, cache):
    first = package.extract(cache_dir=cache)
    (first.directory.parent.parent / ".nfs0000000000000001").touch(0o600)
    (first.directory.parent.parent / ".new-0123").touch(
        0o600
    )  # of a process killed while it kept an identity
    zero(first.library)
    second = package.extract(cache_dir=cache)
    assert second.library.read_bytes() == elf()
    assert list(second.directory.parent.parent.iterdir()) == [second.directory.parent]


def test_whatever_the_umask_no_other_user_can_write(tmp_path):
    path = write_package(tmp_path / "p.pt2", files={"a/b/c.cubin": b"kernel"})
    script = """
        import os, sys
        from pathlib import Path
        from aoti_sched.package import open_package
        os.umask(0)
        for _ in range(2):
            cache = Path(sys.argv[2]) / "x" / "y"
            print(open_package(sys.argv[1]).extract(cache_dir=cache).directory)
        """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), path, tmp_path / "cache"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert len(set(process.stdout.split())) == 1
    assert not any(item.stat().st_mode & 0o077 for item in [*(tmp_path / "cache").rglob("*")])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_companion_whose_name_is_not_text_is_found_again(tmp_path, read):
    library = tmp_path / "lib" / os.fsdecode(b"m\xff.so")
    library.parent.mkdir()
    library.write_bytes(elf())
    first = open_package(library).extract(cache_dir=tmp_path / "cache")
    assert open_package(library).extract(cache_dir=tmp_path / "cache") == first
    assert not read


@pytest.mark.parametrize("name", ["a\0b", "~nosuchuser/x"])
def test_a_directory_that_cannot_be_is_explained(package, environment, name):
    if "\0" in name:
        with pytest.raises(PackageError, match=r"'a\\x00b' has a NUL in its name"):
            package.extract(cache_dir=Path(name))
    else:
        environment.setenv("AOTI_SCHED_CACHE", name)
        with pytest.raises(
            PackageError, match=r"AOTI_SCHED_CACHE='~nosuchuser/x': .*Write the directory in full"
        ):
            package.extract()
