"""Pruning of the cache: by age, by size, and never what a process uses."""

import fcntl
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from aoti_sched.package import known, open_package, usage
from aoti_sched.package.prune import Pruned, prune
from tests.unit.package.files import elf, write_package

DAY = 86400.0


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(known, "_SETTLED", -1e9)


@pytest.fixture(autouse=True)
def own_file(monkeypatch):
    """This process begins without any use of a cache."""
    opened = {}
    monkeypatch.setattr(usage, "_open", opened)
    yield
    for descriptor, _ in opened.values():
        os.close(descriptor)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def extracted(cache: Path, name: str, *, days: float = 0.0) -> Path:
    """Extract a package of its own, last used so many days ago, and return the entry."""
    package = write_package(
        cache.parent / f"{name}.pt2", files={"abc.wrapper.so": elf(name.encode())}
    )
    entry = open_package(package).extract(cache_dir=cache).directory.parent.parent
    then = time.time() - days * DAY
    os.utime(entry, (then, then))
    return entry


def forget_uses():
    """Let this process end as a user of the cache, as the end of a process does."""
    for descriptor, _ in usage._open.values():
        os.close(descriptor)
    usage._open.clear()


def bytes_of(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())


def test_what_was_not_used_for_long_is_deleted(cache):
    old, new = extracted(cache, "old", days=8), extracted(cache, "new", days=6)
    forget_uses()
    size = bytes_of(old)
    assert prune(cache, limit=None, age=7 * DAY) == Pruned(1, size, bytes_of(new))
    assert not old.exists()
    assert new.exists()


def test_the_least_recently_used_go_until_the_rest_is_small_enough(cache):
    entries = [extracted(cache, f"p{days}", days=days) for days in (3, 1, 2)]
    forget_uses()
    prune(cache, limit=bytes_of(entries[1]), age=None)
    assert [entry.exists() for entry in entries] == [False, True, False]


def test_a_cache_within_its_limits_is_left_alone(cache):
    entry = extracted(cache, "p")
    forget_uses()
    assert prune(cache, limit=1 << 40, age=DAY) == Pruned(0, 0, bytes_of(entry))


def test_a_cache_that_is_not_there_yet_has_nothing_to_prune(cache):
    assert prune(cache, limit=0, age=0.0) == Pruned(0, 0, 0)


def test_what_this_process_uses_stays(cache):
    entry = extracted(cache, "p", days=30)
    assert prune(cache, limit=0, age=DAY).entries == 0
    assert entry.exists()


def test_a_use_is_the_newest_time(cache):
    entry = extracted(cache, "p", days=30)
    open_package(cache.parent / "p.pt2").extract(cache_dir=cache)
    forget_uses()
    prune(cache, limit=None, age=DAY)
    assert entry.exists()


def test_what_another_process_uses_stays_until_that_process_ends(cache):
    entry = extracted(cache, "p", days=30)
    forget_uses()
    program = """
        import sys
        from pathlib import Path
        from aoti_sched.package import open_package
        open_package(sys.argv[1]).extract(cache_dir=Path(sys.argv[2]))
        print("ready", flush=True)
        sys.stdin.readline()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(cache.parent / "p.pt2"), str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "ready\n"
    assert prune(cache, limit=0, age=None).entries == 0
    assert entry.exists()
    other.kill()
    other.communicate()
    assert prune(cache, limit=0, age=None).entries == 1
    assert not entry.exists()
    assert list((cache / "users").iterdir()) == []


def test_what_is_being_made_stays(cache):
    entry = extracted(cache, "p", days=30)
    forget_uses()
    with (cache / f"{entry.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prune(cache, limit=0, age=None).entries == 0
    assert entry.exists()


def test_what_is_used_in_the_last_moment_stays(cache, monkeypatch):
    entry = extracted(cache, "p", days=30)
    forget_uses()
    answers = iter([set(), {entry.name}])
    monkeypatch.setattr("aoti_sched.package.prune.in_use", lambda _: next(answers))
    assert prune(cache, limit=0, age=None).entries == 0
    assert entry.exists()


def test_what_is_known_of_a_pruned_package_is_forgotten(cache):
    extracted(cache, "old", days=9)
    extracted(cache, "new")
    forget_uses()
    assert len(list((cache / "known").iterdir())) == 2
    prune(cache, limit=None, age=DAY)
    assert len(list((cache / "known").iterdir())) == 1


def test_a_pruned_package_is_extracted_again(cache):
    extracted(cache, "p", days=9)
    forget_uses()
    prune(cache, limit=0, age=None)
    library = open_package(cache.parent / "p.pt2").extract(cache_dir=cache).library
    assert library.read_bytes() == elf(b"p")


def test_nothing_but_entries_is_deleted(cache):
    extracted(cache, "p", days=9)
    forget_uses()
    (cache / "notes").mkdir()
    (cache / "notes" / "mine").touch()
    prune(cache, limit=0, age=0.0)
    assert (cache / "notes" / "mine").exists()


def test_a_cache_that_knows_no_package_is_pruned(cache):
    extracted(cache, "p", days=8)
    forget_uses()
    shutil.rmtree(cache / known.FOLDER, ignore_errors=True)
    assert prune(cache, limit=None, age=DAY).entries == 1
