"""Other users of the machine: real ones, who swap folders and plant files.

They need root to be played.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoti_sched.errors import PackageError
from aoti_sched.package import open_package, trust
from tests.unit.package.files import elf, write_package

US, THEM, NOBODY = 61001, 61002, 65534

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="playing other users needs root"
)
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="files are mapped through descriptors on Linux only"
)

# Becomes another user when everything is imported: that user may have no access to this
# interpreter. Extracts; on each further line on its input says what lies where it extracted to, and
# extracts again.
VICTIM = textwrap.dedent(
    """
    import json, os, sys, tempfile
    from pathlib import Path
    from aoti_sched.errors import PackageError
    from aoti_sched.package import open_package

    path, cache, sha256, user = sys.argv[1:]
    with tempfile.TemporaryDirectory() as elsewhere:
        open_package(path).extract(cache_dir=Path(elsewhere))
    os.setgroups([])
    os.setgid(int(user))
    os.setuid(int(user))
    package = open_package(path, sha256=sha256 or None)
    library = None
    while True:
        content = None if library is None else library.read_bytes().hex()
        try:
            library = package.extract(cache_dir=Path(cache)).library
            answer = str(library)
        except PackageError as error:
            answer = f"refused: {error}"
        print(json.dumps([answer, content]), flush=True)
        if not sys.stdin.readline():
            break
    """
)

PLANTED = elf(b"evil")


class Victim:
    """A process of another user that uses the package and the cache."""

    def __init__(self, package: Path, cache: Path, user: int, sha256: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(package), str(cache), sha256, str(user)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer, _ = self._read()

    def again(self) -> bytes:
        """What lies at the path that it was given; then it extracts again."""
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        self.answer, content = self._read()
        return bytes.fromhex(content)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> tuple[str, str | None]:
        return json.loads(self._process.stdout.readline())


def as_user(user: int, command: str, *arguments: object, group: int | None = None) -> None:
    """Run a shell command as that user, who must be able to."""
    subprocess.run(
        ["/bin/sh", "-ec", command, "sh", *map(str, arguments)],
        user=user,
        group=user if group is None else group,
        extra_groups=[],
        check=True,
    )


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of root's that all may enter; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="aoti_sched_trust_"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def path(place) -> Path:
    package = write_package(place / "p.pt2")
    package.chmod(0o644)
    return package


@pytest.fixture
def start(path) -> Iterator:
    victims = []

    def begin(cache: Path, user: int = US, sha256: str = "") -> Victim:
        victims.append(Victim(path, cache, user, sha256))
        return victims[-1]

    yield begin
    for victim in victims:
        victim.end()


def folder(path: Path, mode: int = 0o755, owner: int = 0) -> Path:
    path.mkdir()
    path.chmod(mode)
    os.chown(path, owner, owner)
    return path


def plant(cache: Path, original: Path) -> None:
    """A copy of a cache, with another library in it, and a manifest that fits."""
    shutil.copytree(original, cache)
    (library,) = cache.rglob("*.so")
    library.unlink()
    library.write_bytes(PLANTED)


# --- the way to the cache -------------------------------------------------------------------------


@needs_root
@needs_proc
@pytest.mark.parametrize(
    ("mode", "owner", "group"),
    [(0o777, 0, 0), (0o775, 0, THEM), (0o775, US, THEM), (0o755, THEM, THEM), (0o1777, THEM, THEM)],
)
@pytest.mark.parametrize("deeper", [False, True])
def test_another_user_who_swaps_the_cache_changes_nothing_that_we_map(
    start, place, mode, owner, group, deeper
):
    parent = folder(place / "parent", mode)
    os.chown(parent, owner, group)
    (swapped := parent / "a").mkdir(mode=0o700)
    os.chown(swapped, US, US)
    cache = swapped / "b" / "c" if deeper else swapped
    victim = start(cache)
    assert victim.answer.startswith("/proc/self/fd/")

    plant(place / "evil", Path(cache))
    subprocess.run(["chown", "-R", f"{THEM}:{THEM}", place / "evil"], check=True)
    swap = 'mv "$1" "$1.ours"; mkdir -p "$(dirname "$3")"; cp -r "$2" "$3"'
    as_user(THEM, swap, swapped, place / "evil", cache, group=THEM)
    assert PLANTED in [library.read_bytes() for library in parent.rglob("*.so")]

    assert victim.again() == elf()
    assert victim.answer.startswith("refused: ")
    assert f"belongs to user {THEM}" in victim.answer


@needs_root
@needs_proc
def test_another_user_who_puts_another_folder_of_ours_in_the_caches_place_changes_nothing(
    start, place
):
    parent = folder(place / "parent", 0o777)
    cache = folder(parent / "cache", 0o700, US)
    victim = start(cache)
    # What others may fill in our name, such as a folder of uploads.
    plant(parent / "uploads", cache)
    subprocess.run(["chown", "-R", f"{US}:{US}", parent / "uploads"], check=True)
    as_user(THEM, 'mv "$1/cache" "$1/gone"; mv "$1/uploads" "$1/cache"', parent)
    assert victim.again() == elf()
    assert victim.again() == elf()


@needs_root
@needs_proc
def test_a_link_of_another_user_on_the_way_changes_nothing(start, place):
    shared = folder(place / "shared", 0o1777)
    ours, theirs = folder(place / "ours", 0o700, US), folder(place / "theirs", 0o755, THEM)
    as_user(THEM, 'ln -s "$1" "$2"', ours, shared / "link")
    victim = start(shared / "link" / "cache")
    assert victim.answer.startswith("/proc/self/fd/")
    plant(theirs / "cache", ours / "cache")
    as_user(THEM, 'ln -sfn "$1" "$2"', theirs, shared / "link")
    assert victim.again() == elf()
    assert "refused: " in victim.answer


@needs_root
@pytest.mark.parametrize(
    ("mode", "owner"),
    [(0o755, 0), (0o1777, 0), (0o700, US), (0o755, US), (0o750, US), (0o1777, US)],
)
def test_a_way_that_only_we_and_root_can_change_is_used_as_it_is(start, place, mode, owner):
    cache = folder(folder(place / "parent", mode, owner) / "cache", 0o700, US)
    victim = start(cache)
    assert Path(victim.answer).is_relative_to(cache)


@needs_root
def test_links_of_ours_and_of_root_are_followed(start, place):
    home = folder(place / "home", 0o700, US)
    (place / "by_root").symlink_to("home/../home")
    as_user(US, 'ln -s "$1" "$2"', place / "by_root", home / "by_us")
    victim = start(home / "by_us" / "cache")
    assert Path(victim.answer).is_relative_to(home / "cache")


@needs_root
@needs_proc
def test_a_home_that_a_group_may_write_to_is_not_trusted_even_if_the_group_seems_to_be_private(
    start, place
):
    # Who is in a group can't be known: a directory service need not list its members.
    home = folder(place / "home", 0o775, US)
    assert start(home / "cache").answer.startswith("/proc/self/fd/")


@needs_root
@needs_proc
def test_a_folder_above_of_a_user_who_is_not_mapped_here_is_not_trusted(start, place):
    # As in a container whose user namespace does not have that user.
    parent = folder(place / "parent", 0o755, NOBODY)
    folder(parent / "cache", 0o700, US)
    assert start(parent / "cache").answer.startswith("/proc/self/fd/")
    folder(place / "cache", 0o700, NOBODY)
    assert f"belongs to user {NOBODY}" in start(place / "cache").answer


@needs_root
def test_root_does_not_use_the_cache_of_a_user(path, place):
    cache = folder(place / "cache", 0o700, US)
    with pytest.raises(PackageError, match=f"belongs to user {US}, but this process is user 0"):
        open_package(path).extract(cache_dir=cache)
    assert not list(cache.iterdir())


@needs_root
@needs_proc
def test_roots_own_cache_in_a_users_home_is_used_through_its_descriptor(path, place):
    home = folder(place / "home", 0o755, US)
    library = open_package(path).extract(cache_dir=home / "cache").library
    assert library.is_relative_to("/proc/self/fd")
    assert library.read_bytes() == elf()


@needs_root
def test_a_cache_of_another_user_is_refused(start, place):
    cache = folder(place / "cache", 0o700, THEM)
    assert f"belongs to user {THEM}, but this process is user {US}" in start(cache).answer


@needs_root
def test_a_shared_folder_for_all_is_no_cache_and_a_folder_beneath_is_advised(start, place):
    shared = folder(place / "shared", 0o1777)
    answer = start(shared).answer
    assert f"Name a directory of your own beneath it, such as {shared / 'aoti_sched'}" in answer
    assert "Delete" not in answer


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_where_no_file_can_be_mapped_through_a_descriptor_such_a_way_is_refused(
    tmp_path, monkeypatch
):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent").chmod(0o777)
    package = open_package(write_package(tmp_path / "p.pt2"))
    monkeypatch.setattr(trust, "_through", lambda descriptor: Path(f"/no/such/{descriptor}"))
    before = descriptors()
    with pytest.raises(
        PackageError,
        match=r"can be replaced by others: .*parent may be written by others \(mode 0777\)",
    ):
        package.extract(cache_dir=tmp_path / "parent" / "cache")
    assert descriptors() == before


@needs_proc
def test_a_held_cache_costs_one_descriptor_however_often_it_is_used(tmp_path):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent").chmod(0o777)
    package = open_package(write_package(tmp_path / "p.pt2"))
    first = package.extract(cache_dir=tmp_path / "parent" / "cache")
    before = descriptors()
    for _ in range(5):
        assert package.extract(cache_dir=tmp_path / "parent" / "cache") == first
    assert descriptors() == before

    os.close(int(first.library.parts[4]))  # as os.closerange() does when a program becomes a daemon
    again = package.extract(cache_dir=tmp_path / "parent" / "cache")
    assert again.library.read_bytes() == elf()


# --- what lies in it ------------------------------------------------------------------------------


def change_owner(path: Path) -> None:
    os.chown(path, THEM, THEM, follow_symlinks=False)


def open_to_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | stat.S_IWOTH)


def the_key(library: Path) -> Path:
    return library.parents[2]


def the_entry(library: Path) -> Path:
    return library.parents[1]


def the_files(library: Path) -> Path:
    return library.parent


def the_library(library: Path) -> Path:
    return library


def the_manifest(library: Path) -> Path:
    return library.parents[1] / "manifest.json"


def the_lock(library: Path) -> Path:
    return library.parents[2].with_suffix(".lock")


def a_file_beside(library: Path) -> Path:
    (library.parent / "custom_objs_config.json").write_text("{}")
    return library.parent / "custom_objs_config.json"


@needs_root
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(
    "which", [the_key, the_entry, the_files, the_library, the_manifest, a_file_beside, the_lock]
)
@pytest.mark.parametrize("planted", [change_owner, open_to_all])
def test_what_another_user_has_or_can_write_is_not_used(path, place, which, planted, pinned):
    cache = folder(place / "cache", 0o700)
    sha256 = open_package(path).sha256
    library = open_package(path).extract(cache_dir=cache).library
    planted(which(library))
    if which is the_lock:  # else nobody takes it
        library.unlink()
    with pytest.raises(
        PackageError,
        match=r"(belongs to user 61002|may be written by others).*planted\. Delete everything in "
        r".*cache, or",
    ):
        open_package(path, sha256=sha256 if pinned else None).extract(cache_dir=cache)


@needs_root
@pytest.mark.parametrize("pinned", [False, True])
def test_what_was_planted_does_not_run_after_the_cache_was_closed_to_others(
    start, path, place, pinned
):
    honest = open_package(path).extract(cache_dir=place / "honest").library
    cache = folder(place / "cache", 0o777, US)
    shutil.chown(place / "honest", THEM, THEM)
    plant(place / "evil", place / "honest")
    (place / "evil").chmod(0o755)
    subprocess.run(["chmod", "-R", "a+rX", place / "evil"], check=True)
    as_user(THEM, 'cp -r "$1"/* "$2"', place / "evil", cache)

    sha256 = open_package(path).sha256 if pinned else ""
    assert "Delete everything in it, then chmod 700" in start(cache, sha256=sha256).answer
    cache.chmod(0o700)
    answer = start(cache, sha256=sha256).answer
    assert f"belongs to user {THEM}" in answer
    assert f"Delete everything in {cache}" in answer
    for entry in cache.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    victim = start(cache, sha256=sha256)
    assert victim.again() == elf()
    assert honest.exists()


def test_a_link_for_a_lock_writes_to_nothing(tmp_path):
    package = open_package(write_package(tmp_path / "p.pt2"))
    cache, precious = tmp_path / "cache", tmp_path / "precious"
    cache.mkdir(mode=0o700)
    precious.write_text("precious")
    (cache / f"{package.sha256}-model.lock").symlink_to(precious)
    with pytest.raises(PackageError, match=r"-model\.lock is not a plain file"):
        package.extract(cache_dir=cache)
    assert precious.read_text() == "precious"


# --- a cache that was prepared by root ------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("pinned", [False, True])
def test_a_prepared_cache_of_roots_serves_every_user_and_is_not_written_to(
    start, path, place, pinned
):
    cache = place / "cache"
    package = open_package(path)
    library = package.extract(cache_dir=cache).library
    subprocess.run(["chmod", "-R", "a+rX", cache], check=True)
    (cache / f"{package.sha256}-model.lock").unlink()
    before = {file: file.lstat() for file in cache.rglob("*")}
    victim = start(cache, sha256=package.sha256 if pinned else "")
    assert victim.answer == str(library)
    assert victim.again() == elf()
    after = {file: file.lstat() for file in cache.rglob("*")}
    assert before.keys() == after.keys()
    assert all(before[file].st_ctime_ns == after[file].st_ctime_ns for file in before)


@needs_root
def test_a_prepared_cache_that_lacks_the_package_or_hides_it_says_so(start, path, place):
    cache = folder(place / "cache")
    assert "Permission denied" in start(cache).answer
    open_package(path).extract(cache_dir=cache)
    assert "Permission denied" in start(cache).answer
